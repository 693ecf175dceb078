"""Guards: whether what a capture froze is still as it was.

`fingerprint(call)` walks everything that the function can read and gives a `Guard`, whose
`mismatch(call)` says what differs in a later call, or None. The rule is that of the whole library:
what cannot be seen is not trusted, so a function that reads something whose changes are invisible
is `Unguardable`, and its captures are not used twice.

**What counts as read.** Code; closure variables, default arguments, global variables and builtins
that code names, through functions of a user's own modules; attributes of objects, classes and
modules that code names (all of them where names are computed, as with `getattr`); results that
`functools.lru_cache` remembers; what an object's class is registered for (trees, abstract classes);
all of an `nn.Module`'s parameters, buffers, submodules, hooks and training flags; containers with
all they hold; settings of torch. Tensors are known by identity, version and memory, NumPy arrays
and numbers by value.

**What counts as an argument.** Numbers in floating-point and complex tensors are not given out
while a function is traced, so of these shape, strides, dtype and device count; integer and bool
tensors and everything else by value.

**What is refused.** What reads the world outside (files, clocks, random numbers, the environment),
and what reaches everything (`globals()`, `sys.modules`, `import_module`, frames); operators of
`torch.ops` that are not PyTorch's own; modules and classes that compute their attributes; dispatch
by type (`singledispatch`); modes of torch other than a default device; attributes that were given
to tensors, where code names them. A name counts where code uses it of the module in question:
`self.load` is not `torch.load`.

**What no guard sees.** Writes that leave no trace in a tensor's version: through `tensor.data`, a
storage, DLPack, the array of `tensor.numpy()`, from C extensions. Code of torch, NumPy, SciPy and
the standard library that is replaced while the program runs, and state that it keeps (what other
loggers do than the one that is asked; what is registered with an abstract class of its own).
Anything outside of the process that is read by other ways than those that are refused. What
`__repr__` or `__str__` of an object say. Attributes read by computed names in code that hides the
computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.pytree import LEAF, TreeSpec, children, flatten, leaf_names
from torchjac._torch.state import (
    AMBIENT,
    PLAIN_TENSORS,
    ambient,
    foreign_mode,
    is_wrapped,
    plain_setting_readers,
    plain_settings,
)
from torchjac.call import Call
from torchjac.guards.builder import Check, Mismatch, Policy, Seen
from torchjac.guards.constants import NotUnderstood, shown
from torchjac.guards.functions import ROOT
from torchjac.guards.objects import ObjectWatcher
from torchjac.guards.predicate import Glance, GuardCode, Unchanged, inlined
from torchjac.guards.tensors import alike

CallCheck = Callable[[Call, Seen], Mismatch | None]


@dataclass(frozen=True, slots=True)
class Unguardable:
    """A call of which it cannot be seen whether it means the same the next time.

    Attributes:
        reason: What it reads.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Guard:
    """What a call read, as a list of checks.

    Attributes:
        size: Number of values that are checked.
    """

    size: int
    _checks: tuple[CallCheck, ...] = field(repr=False)
    _memories: tuple[tuple[weakref.ref[Any], int], ...] = field(repr=False)

    def mismatch(self, call: Call) -> Mismatch | None:
        """The first thing that differs in another call; None if what was frozen holds for it."""
        seen: Seen = {}
        try:
            for check in self._checks:
                found = check(call, seen)
                if found is not None:
                    return found
        except Exception as error:  # an object of another kind than it was
            return Mismatch(f"what it reads cannot be compared ({type(error).__name__}: {error})")
        return None

    def glance(
        self,
        call: Call,
        states: Sequence[Callable[[], Any]] = (),
        unchanged: Unchanged = lambda _: None,
    ) -> Glance | None:
        """One function that passes arguments like those of a call, of which nothing differs.

        What it does not pass may still match. It is for the function of this call alone; None
        where nothing is won.

        Args:
            call: The call.
            states: Functions that must give what they give now as well.
            unchanged: Tests readings of torch's library, where that can be done.
        """
        if call.kwargs or self.mismatch(call) is not None:
            return None
        lines = GuardCode(call.args)
        for state in states:
            lines.need_state(state, state())
        function = lines.hold(call.function)
        known = [lines.need_form(check, function) for check in self._checks]
        return lines.function(unchanged) if all(known) else None

    def has_grown(self) -> bool:
        """Whether functions that remember their results have computed others since."""
        memories = [(memory(), misses) for memory, misses in self._memories]
        return any(m is not None and m.cache_info().misses != n for m, n in memories)


def fingerprint(call: Call, policy: Policy = Policy()) -> Guard | Unguardable:  # noqa: B008
    """What a call reads, to be compared with later calls.

    Args:
        call: The function and its arguments.
        policy: What of a module's tensors matters.

    Returns:
        A `Guard`, or `Unguardable` with the reason.
    """
    names: frozenset[str] = frozenset()
    mode = foreign_mode()
    if mode is not None:
        return Unguardable(f"a torch mode is active, {mode}, which may change what operations do")
    try:
        while True:  # until no more code is reached
            watcher = ObjectWatcher(policy, names)
            checks = _checks(call, watcher)
            watcher.alive.clear()  # nothing stays alive until garbage is collected
            if watcher.found <= names:
                return Guard(watcher.count, checks, tuple(watcher.memories))
            names |= watcher.found
    except NotUnderstood as reason:
        return Unguardable(str(reason))
    except RecursionError:
        return Unguardable("what the function reads is nested too deeply")
    except Exception as error:  # code of a user's objects runs here (properties, `==`)
        return Unguardable(f"what the function reads cannot be walked: {error!r}")


def _checks(call: Call, watcher: ObjectWatcher) -> tuple[CallCheck, ...]:
    function = watcher.value(call.function, ROOT)
    argnums = watcher.value(call.argnums, "argnums")
    aux = watcher.value(call.has_aux, "has_aux")
    checks: list[CallCheck] = [
        _settings(),
        _arguments(call, watcher),
        inlined(
            lambda new, seen: argnums(new.argnums, seen) or aux(new.has_aux, seen),
            lambda lines, _: None,  # a glance is for the same ones
        ),
        inlined(
            lambda new, seen: function(new.function, seen),
            lambda lines, place: lines.need_check(function, place),
        ),
    ]
    if watcher.modules:
        hooks = watcher.global_hooks()
        checks.append(
            inlined(
                lambda new, seen: hooks(None, seen),
                lambda lines, _: lines.need_check(hooks, "None"),
            )
        )
    return tuple(checks)


def _settings() -> CallCheck:
    expected, mostly = ambient(), plain_settings()

    def check(call: Call, seen: Seen) -> Mismatch | None:
        if mostly is not None and plain_settings() == mostly:
            return None
        now = ambient()
        if now == expected:
            return None
        changes = zip(AMBIENT, expected, now, strict=True)
        name, old, new = next(c for c in changes if c[1] != c[2])
        return Mismatch(f"{name} changed from {old} to {new}")

    def form(lines: GuardCode, _: str) -> None:
        found = plain_setting_readers()
        for read, now in found or ():
            lines.need_state(read, now)
        if found is None:
            lines.need("False")  # there are modes: the long way looks at them

    return inlined(check, form)


def _arguments(call: Call, watcher: ObjectWatcher) -> CallCheck:
    leaves, spec = flatten((call.args, call.kwargs))
    names = leaf_names("", (call.args, call.kwargs))
    taken = tuple(f"[0][{position}]" for position in call.positions())
    located = "as_strided" in watcher.names or "storage_offset" in watcher.names
    checks = [
        _argument(leaf, _name(name), name.startswith(taken), located, watcher)
        for leaf, name in zip(leaves, names, strict=True)
    ]
    contexts = _contexts(spec)
    custom = watcher.value(contexts, "the structure of the arguments") if contexts else None
    bare = (
        len(leaves) == len(call.args)
        and not call.kwargs
        and all(isinstance(a, Tensor) for a in call.args)
    )

    def check(new: Call, seen: Seen) -> Mismatch | None:
        if bare and not new.kwargs and len(new.args) == len(checks):
            given: Any = new.args  # one that is not a tensor fails its check
        else:
            given, found = flatten((new.args, new.kwargs))
            if found != spec:
                return Mismatch("the nesting of the arguments changed")
            if custom is not None:
                mismatch = custom(_contexts(found), seen)
                if mismatch is not None:
                    return mismatch
        for leaf, inner in zip(given, checks, strict=True):
            mismatch = inner(leaf, seen)
            if mismatch is not None:
                return mismatch
        return None

    def form(lines: GuardCode, _: str) -> None:
        for place, inner in zip(lines.arguments, checks, strict=True):
            lines.need_check(inner, place)

    return inlined(check, form) if bare else check


def _argument(
    leaf: Any, name: str, differentiated: bool, located: bool, watcher: ObjectWatcher
) -> Check:
    if not isinstance(leaf, Tensor):
        return watcher.value(leaf, name)
    watcher.counted(name)
    if type(leaf) not in PLAIN_TENSORS or is_wrapped(leaf):
        raise NotUnderstood(f"{name} is a tensor of type {type(leaf).__name__}")
    if leaf.layout is not torch.strided:
        return watcher.tensor(leaf, name, "values")
    shape = watcher.beside(leaf, name, _geometry(leaf, name, differentiated, located))
    like = None if located else watcher.look(leaf)
    if like is not None:
        shape = alike(like, shape)
    if leaf.is_floating_point() or leaf.is_complex():
        return shape
    return _content(leaf, name, shape)


def _geometry(leaf: Tensor, name: str, differentiated: bool, located: bool) -> Check:
    """Shape, strides where an axis has more than one element, dtype and device.

    Whether it requires gradients counts where it is not made to, and its place in its storage only
    where a function asks for that.
    """
    shape, strides, dtype, device = leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    kind, requires, offset = type(leaf), leaf.requires_grad, leaf.storage_offset()

    def check(new: Any, seen: Seen) -> Mismatch | None:
        if type(new) is not kind and (not isinstance(new, Tensor) or not differentiated):
            return Mismatch(f"{name} changed from {kind.__name__} to {shown(new)}")
        if type(new) not in PLAIN_TENSORS or new.layout is not torch.strided:
            return Mismatch(f"{name} is of another kind: {type(new).__name__}, {new.layout}")
        if new.shape != shape:
            return Mismatch(
                f"the shape of {name} changed from {tuple(shape)} to {tuple(new.shape)}"
            )
        if new.stride() != strides and _matters(new) != _matters_of(shape, strides):
            return Mismatch(f"the strides of {name} changed from {strides} to {new.stride()}")
        if new.dtype != dtype:
            return Mismatch(f"the dtype of {name} changed from {dtype} to {new.dtype}")
        if new.device != device:
            return Mismatch(f"the device of {name} changed from {device} to {new.device}")
        if not differentiated and new.requires_grad is not requires:
            return Mismatch(f"requires_grad of {name} changed from {requires}")
        if located and new.storage_offset() != offset:
            return Mismatch(f"the place of {name} in its storage changed")
        return None

    return check


def _content(leaf: Tensor, name: str, shape: Check) -> Check:
    """Values of an integer or bool tensor: the same tensor with the same version, or equal ones."""
    copy = leaf.clone()
    original: Any = (lambda: None) if leaf.is_inference() else weakref.ref(leaf)
    state = None if leaf.is_inference() else (leaf._version, leaf.data_ptr())

    def check(new: Any, seen: Seen) -> Mismatch | None:
        mismatch = shape(new, seen)
        if mismatch is not None:
            return mismatch
        if new is original() and (new._version, new.data_ptr()) == state:
            return None
        return None if torch.equal(new, copy) else Mismatch(f"the values of {name} changed")

    return check


def _matters(tensor: Tensor) -> tuple[int, ...]:
    return _matters_of(tensor.shape, tensor.stride())


def _matters_of(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the axes that have more than one element."""
    return tuple([step for size, step in zip(shape, strides, strict=True) if size > 1])


def _name(path: str) -> str:
    """`args[0]['w']` for `[0][0]['w']`, `kwargs['k']` for `[1]['k']`."""
    return ("args" if path.startswith("[0]") else "kwargs") + path[3:]


def _contexts(spec: TreeSpec) -> list[Any]:
    """What custom containers among the arguments carry beside their leaves."""
    if spec == LEAF:
        return []
    own = [] if spec.type in (tuple, list, dict) else [spec.type, spec.context]
    return own + [part for child in children(spec) for part in _contexts(child)]
