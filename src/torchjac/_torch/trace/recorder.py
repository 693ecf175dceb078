"""Writing down the ATen operations that run.

`make_fx` does it too, in about a millisecond an operation, on tensors that are not what a user's
code expects. Here operations run as they always do, on real tensors, and are noted on the way: some
twenty microseconds an operation. What then must not happen is that values of tensors decide what is
done next; of tensors for which that matters (`Value.varies`) they are not given out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.private import private, private_type
from torchjac._torch.trace.ir import DependsOnValues, Instruction, NeedsTracing, NotRecorded, Value
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
    """Notes the operations that run while it is active.

    Args:
        keep: Backward operations not to decompose.
        parameters_vary: Whether training changes what is there to be trained.

    Attributes:
        calls: Operations, in order.
        constants: Tensors that were not made by them, as they were before anything wrote to them.
        inputs: Values of the inputs.
        cotangents: Inputs that were asked for on the way.
        number: Sequence number of the autograd node that runs, or None.
        refusals: What should have ended it, even if a user's code went on regardless.
        failures: Operations that failed, perhaps on account of values.
        in_function: Whether what runs now is the function itself.
        stops_gradients: Whether an operation of the function takes numbers that vary without a
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
        # By their memory, whose address is not given away while there is a reference to it.
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
        return False  # or torch imports its compiler, which takes more than a second

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Code that asks whether modes are active need not know of this one."""
        return True

    supports_higher_order_operators = True

    def input(self, tensor: Tensor, varies: bool = True) -> Value:
        """Makes a tensor an input."""
        value = self._external_value(tensor, "input", len(self.inputs), varies)
        self.inputs.append(value)
        return value

    def constant(self, tensor: Tensor, original: Tensor, varies: bool) -> Value:
        """Makes a tensor stand for a constant."""
        value = self._external_value(tensor, "constant", len(self.constants), varies)
        self.constants.append(original)
        return value

    def _external_value(self, tensor: Tensor, kind: str, position: int, varies: bool) -> Value:
        memory = tensor.untyped_storage()._cdata
        value = Value(kind, position, None, *_metadata(tensor), memory)
        self._external.setdefault(memory, []).append(value)
        value.varies = varies or memory in self._varying
        if value.varies:
            self._varying.add(memory)
        return self._enter(tensor, value)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is an input, or was made while this was active."""
        value = self.find(tensor)
        return value is not None and value.kind != "constant"

    def varies(self, tensor: Tensor) -> bool:
        """Whether the numbers of a tensor are different ones for other inputs."""
        return self.value(tensor).base.varies

    def cotangent(self, output: Tensor) -> Tensor:
        """An input to begin a backward pass with.

        No zeros: what a pass takes out of the graph must not look like one.
        """
        with _disable_current_modes():
            cotangent = distinct_cotangent(output)
        self.input(cotangent)
        self.cotangents.append(cotangent)
        return cotangent

    def enter(self, number: int | None) -> None:
        """Says which autograd node runs from here on."""
        self.number = number

    def find(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, if it was met."""
        entry = self._values.get(tensor._cdata)
        return None if entry is None or entry[0].expired() else entry[1]

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; a constant if it was not met before."""
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
        """Whether something wrote to a tensor from elsewhere."""
        return bool(self._saved_memory)

    def restore(self) -> None:
        """Gives tensors from elsewhere that were written to their numbers back.

        Generators are where they were as well.
        """
        for generator, state in self._generators.values():
            generator.set_state(state)
        with torch.no_grad():
            for memory, before in reversed(self._saved_contents):
                memory.copy_(before)
        self._saved_contents.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes it."""
        watched = self.in_function and not self._depth
        arguments = (*args, *(kwargs or {}).values())
        self._depth += 1
        try:
            with _DisableTorchFunction():  # what happens inside is not the user's doing
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
        """Notes where numbers that vary go on without a gradient."""
        carried = [t for t in _tensors(arguments) if self._is_carrier(t)]
        if not (torch.is_grad_enabled() and all(t.requires_grad for t in carried)):
            self.stops_gradients |= bool(carried)
        if not carried:
            self._steps.update(self.value(t) for t in _tensors((result,)) if self.knows(t))

    def _is_carrier(self, tensor: Tensor) -> bool:
        """Whether a tensor has numbers that vary, and not in steps as a comparison does."""
        smooth = tensor.is_floating_point() or tensor.is_complex()
        value = self.find(tensor) if smooth else None
        if value is None or not value.base.varies or value in self._steps:
            return False
        return value.kind != "input" or tensor.requires_grad

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, OpOverload):
            if str(func) not in UNROLLED:
                raise NeedsTracing(str(func))
            with self:  # how often it runs must not depend on values; if it does, that shows
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
        if func in FILLED and not traits.is_random:  # only the shape is taken
            varies = False
        if traits.decides and varies:
            raise DependsOnValues(func._schema.name.removeprefix("aten::"))
        written = self._mark_written(traits, args, kwargs, varies) if traits.written else ()
        for position in traits.silent:
            if args[position] is not None:
                self._save_memory(args[position])
        try:
            out = func(*args, **kwargs)
        except Exception as error:  # a function that catches it goes on as it would not elsewhere
            if varies:
                self.failures.append(NotRecorded(f"{func} failed: {error}"))
            raise
        if func is LIFTED:  # a tensor that is nobody's yet, and may be written to from here on
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
        """The generator that a random operation draws from, and where it stands."""
        generators = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        if generators:
            self._generators.setdefault(id(generator), (generator, state))
        return generator, state

    def _results(
        self, out: Any, position: int, varies: bool, base: Value | None
    ) -> tuple[Value | None, ...] | None:
        """Values of what a call returned; None if that was no tensor."""
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
            value = Value("made", position, None if single else item, *_metadata(part))
            known = self._values.get(part._cdata)
            if known is not None and not known[0].expired():
                value.base = known[1].base  # it is one of the arguments, written to
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
        """An argument with values in the places of tensors."""
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
        """Prepares for a write: what is written to varies as what is written does."""
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
                for other in self._external[base.memory]:  # others that share it
                    other.varies = True
            base.varies |= varies
            bases.append(base)
        return tuple(bases)

    def _save_memory(self, tensor: Tensor) -> None:
        """Notes the numbers of a tensor from elsewhere, all that share its memory included."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._saved_memory:
            return
        self._saved_memory.add(storage._cdata)
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._saved_contents.append((memory, memory.clone()))

    def _with_positions(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Known masks among indices written as positions: the result's shape is then known too."""
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


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """All tensors in arguments."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors += _tensors(argument)
    return tensors


def distinct_cotangent(output: Tensor) -> Tensor:
    """A cotangent that tells elements apart; none of it is zero."""
    with torch.no_grad():
        return torch.linspace(
            0.3, 1.7, output.numel(), dtype=output.dtype, device=output.device
        ).reshape(output.shape)


def _metadata(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
