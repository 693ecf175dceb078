"""The check of a call's arguments."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.pytree import LEAF, TreeSpec, children, flatten, leaf_names
from torchjac._torch.state import PLAIN_TENSORS
from torchjac.call import Call
from torchjac.guards import tensors
from torchjac.guards.checks import All
from torchjac.guards.objects import ObjectBuilder
from torchjac.guards.predicate import GuardCode
from torchjac.guards.rules import Check, Clause, Mismatch, Rule, Seen, frozen


@frozen
class Arguments(Check):
    """The arguments of a call: their nesting, and each leaf.

    Attributes:
        checks: The check of each leaf.
        spec: The nesting of the leaves.
        context: The check of the data of custom containers.
        flat: Whether the leaves are the positional arguments themselves, all of them tensors.
            There is a predicate for these alone.
    """

    checks: Sequence[Check]
    spec: TreeSpec
    context: Check | None
    flat: bool

    def explain(self, x: Call, seen: Seen) -> Mismatch | None:
        """The first mismatch."""
        if self.flat and not x.kwargs and len(x.args) == len(self.checks):
            leaves: Any = x.args  # a leaf that is no tensor fails its check
        else:
            # Flattened anew: the function may have changed its arguments since.
            leaves, spec = flatten((x.args, x.kwargs))
            if spec != self.spec:
                return Mismatch("the nesting of the arguments changed")
            if self.context is not None:
                mismatch = self.context.explain(_contexts(spec), seen)
                if mismatch is not None:
                    return mismatch
        for check, leaf in zip(self.checks, leaves, strict=True):
            test = check.test
            if test is None or not test(leaf):
                mismatch = check.explain(leaf, seen)
                if mismatch is not None:
                    return mismatch
        return None

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the check of each argument."""
        for argument, check in zip(code.arguments, self.checks, strict=True):
            check.emit(code, argument)


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of a call's arguments, with all facts that depend on no name in code.

    Attributes:
        values: The leaves.
        names: The path of each leaf.
        differentiated: Whether each leaf is differentiated.
        spec: The nesting of the leaves.
        contexts: The data of custom containers.
        flat: Whether the leaves are the positional arguments themselves, all of them tensors.
    """

    values: list[Any]
    names: list[str]
    differentiated: list[bool]
    spec: TreeSpec
    contexts: list[Any]
    flat: bool


def leaves_of(call: Call) -> Leaves:
    """The leaves of a call's arguments."""
    values, spec = flatten((call.args, call.kwargs))
    paths = leaf_names("", (call.args, call.kwargs))
    positions = tuple(f"[0][{position}]" for position in call.positions())
    tensors_only = not call.kwargs and all(isinstance(a, Tensor) for a in call.args)
    return Leaves(
        values,
        [_name(path) for path in paths],
        [path.startswith(positions) for path in paths],
        spec,
        _contexts(spec),
        tensors_only and len(values) == len(call.args),
    )


def arguments(leaves: Leaves, builder: ObjectBuilder) -> Arguments:
    """The check of the arguments of a call, as far as a builder knows the names in its code."""
    each = zip(leaves.values, leaves.names, leaves.differentiated, strict=True)
    checks = [_argument(*leaf, builder) for leaf in each]
    contexts, path = leaves.contexts, "the structure of the arguments"
    context = builder.value(contexts, path) if contexts else None
    return Arguments(checks, leaves.spec, context, leaves.flat)


def _argument(leaf: Any, name: str, differentiated: bool, builder: ObjectBuilder) -> Check:
    if not isinstance(leaf, Tensor):
        return builder.value(leaf, name)
    builder.counted(name)
    tensors.refuse_wrapped(leaf, name)
    if leaf.layout is not torch.strided:
        return builder.tensor(leaf, name, "values")
    located = "as_strided" in builder.names or "storage_offset" in builder.names
    geometry = _GEOMETRY(
        name,
        type(leaf),
        tuple(leaf.shape),
        leaf.stride(),
        leaf.dtype,
        leaf.device,
        differentiated,
        leaf.requires_grad,
        located,
        leaf.storage_offset(),
    )
    check = builder.with_attributes(leaf, name, geometry)
    like = None if located else builder.like(leaf)
    if like is not None:
        check = tensors.like_argument(like, check)
    if leaf.is_floating_point() or leaf.is_complex():
        return check
    return All([check, _content(leaf, name)])


def _steps(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides of the axes that have more than one element."""
    return [step for size, step in zip(shape, strides, strict=True) if size > 1]


# Gradients count for arguments that are not differentiated. The place in the storage counts where
# code asks for the place.
_GEOMETRY = Rule(
    "kind shape strides dtype device differentiated requires located offset",
    Clause(
        "type(x) is kind or (differentiated and isinstance(x, Tensor))",
        "{path} changed from {kind.__name__} to {shown(x)}",
    ),
    Clause(
        "type(x) in plain and x.layout is strided",
        "{path} is of another kind: {type(x).__name__}, {x.layout}",
    ),
    Clause("x.shape == shape", "the shape of {path} changed from {shape} to {tuple(x.shape)}"),
    Clause(
        "x.stride() == strides or steps(x.shape, x.stride()) == steps(shape, strides)",
        "the strides of {path} changed from {strides} to {x.stride()}",
    ),
    Clause("x.dtype == dtype", "the dtype of {path} changed from {dtype} to {x.dtype}"),
    Clause("x.device == device", "the device of {path} changed from {device} to {x.device}"),
    Clause(
        "differentiated or x.requires_grad is requires",
        "requires_grad of {path} changed from {requires}",
    ),
    Clause(
        "not located or x.storage_offset() == offset",
        "the place of {path} in its storage changed",
    ),
    Tensor=Tensor,
    plain=PLAIN_TENSORS,
    strided=torch.strided,
    steps=_steps,
)


def _is_same(x: Tensor, tensor: Any, state: tuple[int, int] | None) -> bool:
    return x is tensor() and (x._version, x.data_ptr()) == state


_CONTENT = Rule(
    "tensor state copy",
    Clause(
        "is_same(x, tensor, state) or equal(x, copy)",
        "the values of {path} changed",
    ),
    is_same=_is_same,
    equal=torch.equal,
)


def _nobody() -> None:
    """A reference to no tensor: one of inference mode has no version to rely on."""


def _content(leaf: Tensor, name: str) -> Check:
    """A check for an integer or bool tensor: the same one with its version, or equal numbers."""
    if leaf.is_inference():
        return _CONTENT(name, _nobody, None, leaf.clone())
    return _CONTENT(name, weakref.ref(leaf), (leaf._version, leaf.data_ptr()), leaf.clone())


def _name(path: str) -> str:
    """`args[0]['w']` for `[0][0]['w']`, `kwargs['k']` for `[1]['k']`."""
    return ("args" if path.startswith("[0]") else "kwargs") + path[3:]


def _contexts(spec: TreeSpec) -> list[Any]:
    """Types and data of the custom containers among the arguments."""
    if spec == LEAF:
        return []
    own = [] if spec.type in (tuple, list, dict) else [spec.type, spec.context]
    return own + [part for child in children(spec) for part in _contexts(child)]
