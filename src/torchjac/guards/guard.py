"""Guards: whether the values that a capture froze are as they were.

`build_guard(call)` walks every value that the function can read, and returns a `Guard`. Its method
`mismatch(call)` names the first difference of a later call, or returns None. A function that reads
a value whose changes cannot be seen is `Unguardable`, and its captures are not used twice.

The checks of a guard are data (`guards.rules`, `guards.checks`) with two interpreters: the walk of
`mismatch`, and the guard predicate (`guards.predicate`), one compiled function for the fast path.

**Values that count as read.** Code; closure variables, default arguments, global variables and
builtins that code names, through functions of a user's own modules; attributes of objects, classes
and modules that code names (all attributes where names are computed, as with `getattr`); results in
the caches of `functools.lru_cache`; registrations of an object's class (trees, abstract classes);
all parameters, buffers, submodules, hooks and training flags of an `nn.Module`; containers with
all their items; settings of torch. Tensors are compared by identity, version and memory, NumPy
arrays and numbers by value.

**Arguments.** The numbers in floating-point and complex tensors are unknown while a function is
traced, so only shape, strides, dtype and device of these count. Integer and bool tensors, and all
other arguments, count by value.

**Refused code.** Code that reads the world outside (files, clocks, random numbers, the environment)
or reaches everything (`globals()`, `sys.modules`, `import_module`, frames); operators of
`torch.ops` that are not PyTorch's own; modules and classes that compute their attributes; dispatch
by type (`singledispatch`); modes of torch other than a default device; a user's attributes of
tensors, where code names them. A name counts where code reads it of the module in question:
`self.load` is not `torch.load`.

**Changes that no guard sees.** Writes that leave no trace in a tensor's version: through
`tensor.data`, a storage, DLPack, the array of `tensor.numpy()`, from C extensions. Code of torch,
NumPy, SciPy and the standard library that is replaced while the program runs, and state of these
libraries (other loggers than the one that code asks; registrations with an abstract class of a
library). Reads from outside of the process by other ways than the refused ones. The results of
`__repr__` and `__str__`. Attributes read by computed names in code that hides the computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchjac._torch.state import foreign_mode
from torchjac.call import Call
from torchjac.guards.arguments import Arguments, arguments, leaves_of
from torchjac.guards.builder import Policy
from torchjac.guards.checks import All, Parts
from torchjac.guards.constants import NotUnderstood
from torchjac.guards.functions import ROOT
from torchjac.guards.objects import ObjectBuilder
from torchjac.guards.predicate import GuardCode, Predicate, Unchanged
from torchjac.guards.rules import ATTRIBUTE, Check, Mismatch, Seen
from torchjac.guards.settings import Settings, State, settings


@dataclass(frozen=True, slots=True)
class Unguardable:
    """A call without a guard: it reads a value whose changes cannot be seen.

    Attributes:
        reason: The value, in words.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Guard:
    """Checks of every value that a call reads.

    Attributes:
        size: Number of values that are checked.
    """

    size: int
    _settings: Settings = field(repr=False)
    _arguments: Arguments = field(repr=False)
    _options: Check = field(repr=False)
    _function: Check = field(repr=False)
    _caches: tuple[tuple[weakref.ref[Any], int], ...] = field(repr=False)

    def mismatch(self, call: Call) -> Mismatch | None:
        """The first thing that differs in another call; None if the guard holds for it."""
        seen: Seen = {}
        try:
            return (
                self._settings.explain(call, seen)
                or self._arguments.explain(call, seen)
                or self._options.explain(call, seen)
                or self._function.explain(call.function, seen)
            )
        except Exception as error:  # an object of another kind than it was
            return Mismatch(f"what it reads cannot be compared ({type(error).__name__}: {error})")

    def predicate(
        self,
        call: Call,
        states: Sequence[Callable[[], Any]] = (),
        unchanged: Unchanged = lambda _: None,
    ) -> Predicate | None:
        """The guard predicate: a function of positional arguments, whether the guard holds.

        Arguments that the predicate does not pass may still match. The predicate is for the
        function of this call alone.

        Args:
            call: The call.
            states: Further functions whose results must stay the same.
            unchanged: Makes a test of readings of torch's library, or None.

        Returns:
            The predicate; None for a call that it cannot pass, or without a fast comparison.
        """
        if call.kwargs or not self._arguments.flat or self.mismatch(call) is not None:
            return None
        code = GuardCode(call.args)
        for read in states:
            State(read, read()).emit(code, "")
        self._settings.emit(code, "")
        self._arguments.emit(code, "")
        self._function.emit(code, code.hold(call.function))
        return code.function(unchanged)

    def has_grown(self) -> bool:
        """Whether a cached function has computed further results since."""
        caches = [(cache(), misses) for cache, misses in self._caches]
        return any(c is not None and c.cache_info().misses != n for c, n in caches)


def build_guard(call: Call, policy: Policy = Policy()) -> Guard | Unguardable:  # noqa: B008
    """The guard of everything that a call reads, for later calls.

    Args:
        call: The function and its arguments.
        policy: The level at which a module's tensors are compared.

    Returns:
        The guard, or `Unguardable`.
    """
    names: frozenset[str] = frozenset()
    mode = foreign_mode()
    if mode is not None:
        return Unguardable(f"a torch mode is active, {mode}, which may change what operations do")
    try:
        leaves, of_torch = leaves_of(call), settings()
        while True:  # until no more code is reached
            builder = ObjectBuilder(policy, names)
            checks = arguments(leaves, builder), *_checks(call, builder)
            builder.alive.clear()  # now, not when garbage is collected
            if builder.reached <= names:
                return Guard(builder.count, of_torch, *checks, tuple(builder.caches))
            names |= builder.reached
    except NotUnderstood as reason:
        return Unguardable(str(reason))
    except RecursionError:
        return Unguardable("what the function reads is nested too deeply")
    except Exception as error:  # code of a user's objects runs here (properties, `==`)
        return Unguardable(f"what the function reads cannot be walked: {error!r}")


def _checks(call: Call, builder: ObjectBuilder) -> tuple[Check, Check]:
    """The checks of a call's options and of its function, in the order of the walk."""
    names = ("argnums", "has_aux")
    options = Parts(ATTRIBUTE, names, [builder.value(getattr(call, name), name) for name in names])
    function = builder.value(call.function, ROOT)
    return options, All([function, builder.global_hooks()]) if builder.modules else function
