"""A function and its Jacobian as files that other programs use: the way to C and C++."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchjac._torch import modes
from torchjac._torch.inductor import NotCompiled, write_package
from torchjac._torch.pytree import flatten
from torchjac._torch.trace.recording import Recording, without_last
from torchjac.call import Call, variables
from torchjac.capture.eager import capture_function
from torchjac.capture.trace import trace_value
from torchjac.compiler.batch_invariance import first_samples, is_batch_invariant, with_samples
from torchjac.compiler.codegen.build import build_batch_source, build_source
from torchjac.compiler.codegen.c.standalone import Array, Standalone, identifier, standalone
from torchjac.compiler.codegen.c.toolchain import NoCompiler
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.scalar_ir import Deployment
from torchjac.compiler.codegen.target import SourceUnit
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.native import agree, jacobian_of, render_first
from torchjac.compiler.per_sample import record_at_sizes
from torchjac.compiler.program.optimize import plain_graph
from torchjac.compiler.program.record import recording_of
from torchjac.compiler.program.resize import resize
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import PlanError, PlanRefused, TorchjacError
from torchjac.passes.verify import Reference
from torchjac.request import Dense
from torchjac.sparsity.detect import KEEP


def export(path: Path, call: Call, plan: Compiled) -> list[Path]:
    """Writes value and Jacobian down, as the suffix of the path says.

    Args:
        path: `.pt2` for an AOTInductor package; else a file whose suffix is replaced by `.c`, `.h`
            and `.hpp`, and whose stem names the function.
        call: The function and its arguments.
        plan: Its plan.

    Raises:
        PlanError: It cannot be compiled, or has no scalar form.
    """
    if is_package(path):
        return [_package(path, call, plan)]
    name = identifier(path.stem)
    try:
        program, values = _program(call, plan, name)
    except Exception as refusal:  # whatever it is, there is no file
        raise PlanError(f"torchjac: it cannot be written as C: {refusal}") from refusal
    made = _described(call, plan, program, values, name)
    texts = {".c": made.source, ".h": made.header, ".hpp": made.tensors}
    files = [path.with_name(name + suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def is_package(path: Path) -> bool:
    """Whether a path is that of an AOTInductor package."""
    return path.suffix == ".pt2"


def _package(path: Path, call: Call, plan: Compiled) -> Path:
    inputs = [x.detach().contiguous() for x in variables(call)]
    try:
        with torch.no_grad():
            made, batch = _for_any_number(call, plan), plan.shape[2]
            if made is None:
                fixed = plain_graph(without_last(plan.program.recording))
                made, batch = _Both((trace_value(call, KEEP), ()), fixed), None
            write_package(made, inputs, path, batch)
    except (NotCompiled, TorchjacError) as refusal:
        raise PlanError(f"torchjac: it cannot be packaged: {refusal}") from refusal
    return path


# A graph of inputs and constants, and these.
_Graph = tuple[fx.GraphModule, tuple[Tensor, ...]]


class _Both(nn.Module):
    """The values of a function, then the parts of its Jacobian."""

    def __init__(self, value: _Graph, jacobian: _Graph):
        super().__init__()
        self.value, self.jacobian = value[0], jacobian[0]
        self._counts = []
        for name, (_, constants) in (("value", value), ("jacobian", jacobian)):
            self._counts.append(len(constants))
            for k, constant in enumerate(constants):
                self.register_buffer(f"{name}{k}", constant.detach().clone())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        first, second = self._counts
        values = self.value(*inputs, *[getattr(self, f"value{k}") for k in range(first)])
        constants = [getattr(self, f"jacobian{k}") for k in range(second)]
        return (*values, *self.jacobian(*inputs, *constants))


def _for_any_number(call: Call, plan: Compiled) -> _Both | None:
    """What takes any number of samples; None where there are none, or it depends on how many.

    It is compared with the function and with passes at these samples, at twice as many, and at one.
    """
    batch = plan.shape[2]
    if batch is None or not isinstance(plan.output, Dense):
        return None
    for mode in dict.fromkeys(way.mode for way in plan.programs):
        # Whatever is wrong, sizes that do not fit or a function that fails: it is for these sizes.
        with suppress(Exception), modes.ordinary_tensors():
            found = record_at_sizes(call, plan.derivative, batch, mode)
            counts, values, jacobians = zip(*found, strict=True)
            made = _Both(resize(values, counts), resize(jacobians, counts))
            if all(_agrees(made, with_samples(call, batch, n)) for n in (batch, 2 * batch, 1)):
                return made
    return None


def _agrees(made: _Both, call: Call) -> bool:
    """Whether values and Jacobian at a call are those of the function and of passes."""
    program, returned = capture_function(call, batched=True, create_graph=False, replayable=False)
    values = [x.detach() for x in flatten(returned[0] if call.has_aux else returned)[0]]
    found = made(*(x.detach().contiguous() for x in variables(call)))
    Reference(program).check(found[len(values) :], Dense())
    return all(x.shape == y.shape and agree(x, y) for x, y in zip(found, values, strict=False))


def _program(call: Call, plan: Compiled, name: str) -> tuple[SourceUnit, list[Tensor]]:
    """Value and Jacobian in C, and the values here."""
    inputs = [x.detach().contiguous() for x in variables(call)]
    with torch.no_grad():
        module = trace_value(call, KEEP)
        values = list(module(*inputs))
    value = _value(call, plan, module)

    def write(way: TensorProgram) -> SourceUnit:
        parts = [jacobian_of(way), (value, len(values))]
        if way.samples is not None:
            few, many = way.samples
            return build_batch_source(parts, few, many, f"{name}_body", Deployment.STANDALONE)
        return build_source(parts, plan.shape[2], f"{name}_body", Deployment.STANDALONE)

    _, program = render_first(plan.programs, write)
    _check(program, plan, inputs, values)
    return program, values


def _value(call: Call, plan: Compiled, module: fx.GraphModule) -> Recording:
    """The function, recorded with as many samples as the plan is."""
    samples = plan.program.samples
    if samples is not None:
        less = first_samples(call, samples[1])
        assert less is not None, "there is a plan for fewer samples"
        call, many = less[0], module
        module = trace_value(call, KEEP)
        if not is_batch_invariant(module, many, *samples):
            raise PlanRefused("with fewer samples it runs other operations")
    return recording_of(module, [x.detach().contiguous() for x in variables(call)])


def _check(
    program: SourceUnit, plan: Compiled, inputs: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Compares what C gives here with what the plan and the function give.

    Where there is no compiler it cannot be compared: it is for another machine.

    Raises:
        PlanRefused: It is something else.
    """
    try:
        kernel = Executable(program)
    except NoCompiler:
        return
    with torch.no_grad():
        got, want = kernel(inputs), plan.program(inputs)
    if want is None:
        raise PlanRefused("the result is not finite at these arguments")
    if got is None or not all(map(agree, got, [*want, *values])):
        raise PlanRefused("C does not give what the function and its plan give")


def _described(
    call: Call, plan: Compiled, program: SourceUnit, values: Sequence[Tensor], name: str
) -> Standalone:
    """The files, with names for all arguments."""
    named = _different(_names(call), name)
    many = program.samples

    def array(label: str, about: str, shape: Sequence[int], dtype: torch.dtype) -> Array:
        each = many is not None and len(shape) > 0 and shape[0] == many
        return Array(label, about, tuple(shape[1:] if each else shape), _name(dtype), None, each)

    inputs = [
        array(n, "an argument", s, d) for n, (s, d) in zip(named, program.inputs, strict=True)
    ]
    count = len(program.outputs) - len(values)
    shapes = program.outputs
    known: list[Array] = []
    pattern = plan.output.pattern
    if pattern is not None:
        rows, columns = pattern.shape
        starts, places = pattern.starts, pattern.columns
        known = [
            Array("row_starts", "where each row begins", starts.shape, "int32", starts),
            Array("columns", "the column of each entry", places.shape, "int32", places),
        ]
        about = f"entries of the {rows} x {columns} Jacobian, row by row"
        outputs = [array("jacobian", about, *shapes[0])]
    else:
        across = len(call.leaves)
        outputs = []
        for k, (shape, dtype) in enumerate(shapes[:count]):
            i, j = divmod(k, across)
            label = "jacobian" if count == 1 else f"jacobian_{i}_{j}"
            about = f"of output {i} with respect to {named[j]}"
            outputs.append(array(label, about, shape, dtype))
    for k, (shape, dtype) in enumerate(shapes[count:]):
        label = "value" if len(values) == 1 else f"value_{k}"
        outputs.append(array(label, "what the function gives", shape, dtype))
    return standalone(program, name, inputs, outputs, known)


def _names(call: Call) -> list[str]:
    """A name for each input: that of the parameter where an argument is one tensor."""
    function: Callable[..., Any] = getattr(call.function, "forward", call.function)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    positions = list(call.positions())
    order = positions + [k for k in range(len(call.args)) if k not in positions]
    found: list[str] = []
    for k in order:
        base = parameters[k] if k < len(parameters) else f"x{k}"
        leaves = _counted(call.args[k], k in positions)
        found += [base] if leaves == 1 else [f"{base}_{i}" for i in range(leaves)]
    left = len(variables(call)) - len(found)
    found += [f"more_{i}" for i in range(left)]
    return found


def _different(names: Sequence[str], function: str) -> list[str]:
    """Names that C tells apart, from each other and from what else the function takes.

    Sizes are macros, in capital letters: so names may not differ by case alone.
    """
    taken = {"jacobian", "value", "work", "samples", "in", "out", "table", function.lower()}
    found = []
    for base in map(identifier, names):
        name, k = base, 1
        while name.lower() in taken or name.startswith(("jacobian_", "value_")):
            name, k = f"{base.removeprefix('jacobian_').removeprefix('value_')}_{k}", k + 1
            name = f"of_{name}" if name.startswith(("jacobian_", "value_")) else name
        taken.add(name.lower())
        found.append(name)
    return found


def _counted(argument: Any, differentiated: bool) -> int:
    """How many inputs an argument is."""
    leaves = [x for x in flatten(argument)[0] if isinstance(x, Tensor)]
    return len(leaves if differentiated else [x for x in leaves if x.is_floating_point()])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
