"""The recorder: a dispatch mode that records the ATen operations that run.

`make_fx` records operations too, in about a millisecond each, on tensors that a user's code does
not expect. The recorder runs operations on real tensors, and takes some 20 microseconds each.
Values of tensors that depend on the input (`Value.varies`) must not decide control flow, so Python
cannot read them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.private import private, private_type
from torchjac._torch.trace.ir import (
    DependsOnValues,
    Instruction,
    NeedsTracing,
    NotRecorded,
    Value,
    distinct_cotangent,
    metadata,
    tensors_in,
)
from torchjac._torch.trace.op_traits import (
    COPIED,
    FILLED,
    INDEX,
    LIFTED,
    UNROLLED,
    WRITTEN_OUT,
    OpOverload,
    Traits,
    decomposition,
    traits_of,
    unrolled,
)

_TorchDispatchMode: Any = private_type("torch.utils._python_dispatch.TorchDispatchMode")
_disable_current_modes = private("torch.utils._python_dispatch._disable_current_modes")
_DisableTorchFunction = private("torch._C.DisableTorchFunction")
_StorageWeakRef = private("torch.multiprocessing.reductions.StorageWeakRef")
_WeakTensorRef = private("torch._C._WeakTensorRef")


class Recorder(_TorchDispatchMode):  # type: ignore[misc]
    """Records the operations that run while the mode is active.

    Args:
        keep: Backward operations not to decompose.
        parameters_vary: Whether parameters count as inputs, because training changes them.

    Attributes:
        calls: Recorded operations, in order.
        constants: External tensors, with their values before any write.
        inputs: Values of the inputs.
        cotangents: Inputs that `cotangent` created.
        number: Sequence number of the autograd node that runs, or None.
        refusals: All refusals, even if a user's code caught the exceptions.
        failures: Operations that failed, perhaps because of their values.
        in_function: Whether the function itself runs now.
        stops_gradients: Whether the function uses numbers that depend on the input without a
            gradient: after `detach`, under `no_grad`, inside a custom function.
    """

    def __init__(self, keep: Collection[Any], parameters_vary: bool):
        super().__init__()
        self.calls: list[Instruction] = []
        self.constants: list[Tensor] = []
        self.inputs: list[Value] = []
        self.cotangents: list[Tensor] = []
        self.number: int | None = None
        self.refusals: list[Exception] = []
        self.failures: list[NotRecorded] = []
        self.stops_gradients = False
        self.in_function = False
        self._depth = 0
        self._steps: set[Value] = set()
        # By the address of the storage, which is not reused while a reference exists.
        self._created: dict[int, tuple[Any, Value]] = {}
        self._keep = keep
        self._parameters_vary = parameters_vary
        self._values: dict[int, tuple[Any, Value]] = {}
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self._external: dict[int, list[Value]] = {}
        self._varying: set[int] = set()
        self._saved_memory: set[int] = set()
        self._saved_contents: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes more than a second

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Hides the mode from code that asks for active modes."""
        return True

    supports_higher_order_operators = True

    def input(self, tensor: Tensor, varies: bool = True) -> Value:
        """Registers a tensor as an input."""
        value = self._external_value(tensor, "input", len(self.inputs), varies)
        self.inputs.append(value)
        return value

    def constant(self, tensor: Tensor, original: Tensor, varies: bool) -> Value:
        """Registers a tensor that represents a constant."""
        value = self._external_value(tensor, "constant", len(self.constants), varies)
        self.constants.append(original)
        return value

    def _external_value(self, tensor: Tensor, kind: str, position: int, varies: bool) -> Value:
        memory = tensor.untyped_storage()._cdata
        value = Value(kind, position, None, *metadata(tensor), memory)
        self._external.setdefault(memory, []).append(value)
        value.varies = varies or memory in self._varying
        if value.varies:
            self._varying.add(memory)
        return self._enter(tensor, value)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is an input, or was created during the recording."""
        value = self.find(tensor)
        return value is not None and value.kind != "constant"

    def varies(self, tensor: Tensor) -> bool:
        """Whether the elements of a tensor depend on the input."""
        return self.value(tensor).base.varies

    def cotangent(self, output: Tensor) -> Tensor:
        """The cotangent of an output, registered as an input.

        No element is zero, as a zero could hide values that leave the graph during the pass.
        """
        with _disable_current_modes():
            cotangent = distinct_cotangent(output)
        self.input(cotangent)
        self.cotangents.append(cotangent)
        return cotangent

    def enter(self, number: int | None) -> None:
        """Sets the autograd node that runs next, by its sequence number."""
        self.number = number

    def find(self, tensor: Tensor) -> Value | None:
        """The value of a recorded tensor, or None."""
        entry = self._values.get(tensor._cdata)
        return None if entry is None or entry[0].expired() else entry[1]

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; a new tensor is a constant."""
        entry = self._values.get(tensor._cdata)
        if entry is not None and not entry[0].expired():
            return entry[1]
        if tensor.layout is not torch.strided:
            raise NotRecorded("it reads a sparse tensor")
        memory = tensor.untyped_storage()._cdata
        own = self._created.get(memory)
        if (own and own[1].varies) or any(memory == input_.memory for input_ in self.inputs):
            raise NotRecorded("it makes a tensor out of another without an operation (a Parameter)")
        trained = tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
        return self.constant(tensor, tensor, trained and self._parameters_vary)

    @property
    def wrote_elsewhere(self) -> bool:
        """Whether an operation wrote to an external tensor."""
        return bool(self._saved_memory)

    def restore(self) -> None:
        """Restores the contents of external tensors and the states of generators."""
        for generator, state in self._generators.values():
            generator.set_state(state)
        with torch.no_grad():
            for memory, before in reversed(self._saved_contents):
                memory.copy_(before)
        self._saved_contents.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and records it."""
        watched = self.in_function and not self._depth
        arguments = (*args, *(kwargs or {}).values())
        self._depth += 1
        try:
            with _DisableTorchFunction():  # calls inside are torch's, not the user's
                result = self._run(func, args, kwargs or {})
        except (DependsOnValues, NotRecorded, NeedsTracing) as refusal:
            self.refusals.append(refusal)
            raise
        finally:
            self._depth -= 1
        if watched:
            self._record_stops(arguments, result)
        return result

    def _record_stops(self, arguments: Sequence[Any], result: Any) -> None:
        """Records whether numbers that depend on the input lose their gradient."""
        carried = [t for t in tensors_in(arguments) if self._is_carrier(t)]
        if not (torch.is_grad_enabled() and all(t.requires_grad for t in carried)):
            self.stops_gradients |= bool(carried)
        if not carried:
            self._steps.update(self.value(t) for t in tensors_in((result,)) if self.knows(t))

    def _is_carrier(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the input, and not piecewise constantly (a comparison)."""
        smooth = tensor.is_floating_point() or tensor.is_complex()
        value = self.find(tensor) if smooth else None
        if value is None or not value.base.varies or value in self._steps:
            return False
        return value.kind != "input" or tensor.requires_grad

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, OpOverload):
            if str(func) not in UNROLLED:
                raise NeedsTracing(str(func))
            with self:  # raises if the number of iterations depends on values
                return unrolled(func)(*args, **kwargs)
        traits = traits_of(func)
        if traits.is_refused:
            raise NotRecorded(f"{func} changes what a tensor is")
        if traits.is_composite:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in WRITTEN_OUT:
            with self:
                result = WRITTEN_OUT[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        decompose = decomposition(func)
        if decompose is not None and func not in self._keep:
            with self:
                return decompose(*args, **kwargs)
        if traits.is_indexing:
            args = self._with_positions(func, args)
        return self._record(func, traits, args, kwargs)

    def _record(
        self, func: Any, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values: list[Value] = []
        recorded_args = tuple([self._values_for(a, values) for a in args])
        recorded_kwargs = (
            {k: self._values_for(a, values) for k, a in kwargs.items()} if kwargs else kwargs
        )
        generator_state = self._generator_state(args, kwargs) if traits.is_random else None
        varies = traits.is_random or any([v.base.varies for v in values])
        if func in FILLED and not traits.is_random:  # only the shape is read
            varies = False
        if traits.decides and varies:
            raise DependsOnValues(func._schema.name.removeprefix("aten::"))
        written = self._mark_written(traits, args, kwargs, varies) if traits.written else ()
        for position in traits.silent:
            if args[position] is not None:
                self._save_memory(args[position])
        try:
            out = func(*args, **kwargs)
        except Exception as error:  # a function that catches the error may branch on values
            if varies:
                self.failures.append(NotRecorded(f"{func} failed: {error}"))
            raise
        if func is LIFTED:  # a new constant, which the function may write to later
            self.constants[values[0].position] = args[0].clone()
            func = COPIED
            del self._values[args[0]._cdata]
        base = values[0].base if traits.is_view and values and func is not COPIED else None
        results = self._results(out, len(self.calls), varies, base)
        if results is not None:
            single = isinstance(out, Tensor)
            self.calls.append(
                Instruction(
                    func,
                    recorded_args,
                    recorded_kwargs,
                    results,
                    single,
                    written,
                    self.number,
                    generator_state,
                )
            )
        return out

    def _generator_state(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Generator, Tensor]:
        """The generator that a random operation draws from, and its state."""
        generators = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        if generators:
            self._generators.setdefault(id(generator), (generator, state))
        return generator, state

    def _results(
        self, out: Any, position: int, varies: bool, base: Value | None
    ) -> tuple[Value | None, ...] | None:
        """Values for the results of a call; None if the call returned no tensor."""
        single = isinstance(out, Tensor)
        parts = (out,) if single else out
        if not isinstance(parts, (tuple, list)):
            return () if out is None else None
        results: list[Value | None] = []
        for item, part in enumerate(parts):
            if not isinstance(part, Tensor):
                results.append(None)
                continue
            if part.layout is not torch.strided:
                raise NotRecorded("it makes a sparse tensor")
            value = Value("made", position, None if single else item, *metadata(part))
            known = self._values.get(part._cdata)
            if known is not None and not known[0].expired():
                value.base = known[1].base  # the result is an argument, written in place
            elif base is not None:
                value.base = base
            else:
                value.varies = varies
                memory = part.untyped_storage()
                reference = _StorageWeakRef(memory)
                self._created[memory._cdata] = reference, value
            results.append(self._enter(part, value))
        return tuple(results)

    def _enter(self, tensor: Tensor, value: Value) -> Value:
        self._values[tensor._cdata] = (_WeakTensorRef(tensor), value)
        return value

    def _values_for(self, argument: Any, values: list[Value]) -> Any:
        """An argument with values in place of tensors; the values are appended to `values`."""
        if isinstance(argument, Tensor):
            value = self.value(argument)
            values.append(value)
            return value
        if isinstance(argument, (list, tuple)):
            return [self._values_for(a, values) for a in argument]
        return argument

    def _mark_written(
        self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], varies: bool
    ) -> tuple[Value, ...]:
        """Marks the bases that an operation will write to.

        Args:
            traits: Traits of the operation.
            args: Positional arguments.
            kwargs: Keyword arguments.
            varies: Whether the written elements depend on the input.
        """
        targets: list[Any] = []
        for position, name in traits.written:
            argument = args[position] if position < len(args) else kwargs.get(name)
            targets += argument if isinstance(argument, (list, tuple)) else [argument]
        bases = []
        for tensor in targets:
            if tensor is None:
                continue
            base = self.value(tensor).base
            if base.kind != "made" and not base.written:
                self._save_memory(tensor)
            base.written = True
            if varies and base.kind != "made" and base.memory not in self._varying:
                self._varying.add(base.memory)
                for other in self._external[base.memory]:  # aliases
                    other.varies = True
            base.varies |= varies
            bases.append(base)
        return tuple(bases)

    def _save_memory(self, tensor: Tensor) -> None:
        """Saves the content of the storage of an external tensor, for `restore`."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._saved_memory:
            return
        self._saved_memory.add(storage._cdata)
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._saved_contents.append((memory, memory.clone()))

    def _with_positions(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with known masks replaced by positions, which fixes the result's shape."""
        indices = list(args[1])
        masks = [t for t in indices if isinstance(t, Tensor) and t.dtype in _MASKS]
        if not masks:
            return args
        if any(self.value(mask).base.varies for mask in masks):
            if func is INDEX:
                raise DependsOnValues("a boolean mask as an index")
            return args
        positions: list[Any] = []
        with self:
            for part in indices:
                is_mask = isinstance(part, Tensor) and part.dtype in _MASKS
                positions += part.nonzero().unbind(1) if is_mask else (part,)
        return (args[0], positions, *args[2:])


_MASKS = (torch.bool, torch.uint8)
