"""Exports a function and its Jacobian as C sources or an AOTInductor package."""

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


def export(path: Path, call: Call, compiled: Compiled) -> list[Path]:
    """Writes the value of a function and its Jacobian to files.

    Args:
        path: With the suffix `.pt2`, an AOTInductor package. With any other one, C sources: the
            suffix is replaced by `.c`, `.h` and `.hpp`, and the stem names the function.
        call: The function and its arguments.
        compiled: The compiled Jacobian of the function.

    Returns:
        The files.

    Raises:
        PlanError: The package cannot be compiled, or the program has no scalar form.
    """
    if is_package(path):
        return [_write_package(path, call, compiled)]
    name = identifier(path.stem)
    try:
        program, values = _render_c(call, compiled, name)
    except Exception as refusal:  # no file is written after any error
        raise PlanError(f"torchjac: it cannot be written as C: {refusal}") from refusal
    unit = _describe(call, compiled, program, values, name)
    texts = {".c": unit.source, ".h": unit.header, ".hpp": unit.tensors}
    files = [path.with_name(name + suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def is_package(path: Path) -> bool:
    """Whether a path names an AOTInductor package: its suffix is `.pt2`."""
    return path.suffix == ".pt2"


def _write_package(path: Path, call: Call, compiled: Compiled) -> Path:
    inputs = [x.detach().contiguous() for x in variables(call)]
    try:
        with torch.no_grad():
            module, batch = _for_any_batch(call, compiled), compiled.shape[2]
            if module is None:
                fixed = plain_graph(without_last(compiled.program.recording))
                module, batch = _ValueAndJacobian((trace_value(call, KEEP), ()), fixed), None
            write_package(module, inputs, path, batch)
    except (NotCompiled, TorchjacError) as refusal:
        raise PlanError(f"torchjac: it cannot be packaged: {refusal}") from refusal
    return path


# A graph of inputs and constants, and its constants.
_Graph = tuple[fx.GraphModule, tuple[Tensor, ...]]


class _ValueAndJacobian(nn.Module):
    """A module that returns the outputs of a function, then the parts of its Jacobian."""

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


def _for_any_batch(call: Call, compiled: Compiled) -> _ValueAndJacobian | None:
    """A module for any number of samples; None without a batch, or if operations depend on it.

    Its results are compared with the function and with passes at the samples of the call, at twice
    as many, and at one sample.
    """
    batch = compiled.shape[2]
    if batch is None or not isinstance(compiled.output, Dense):
        return None
    for mode in dict.fromkeys(way.mode for way in compiled.programs):
        # After any error (sizes that do not fit, a function that fails) the batch size is fixed.
        with suppress(Exception), modes.ordinary_tensors():
            recordings = record_at_sizes(call, compiled.derivative, batch, mode)
            counts, values, jacobians = zip(*recordings, strict=True)
            module = _ValueAndJacobian(resize(values, counts), resize(jacobians, counts))
            if all(
                _agrees_with_passes(module, with_samples(call, batch, n))
                for n in (batch, 2 * batch, 1)
            ):
                return module
    return None


def _agrees_with_passes(module: _ValueAndJacobian, call: Call) -> bool:
    """Whether outputs agree with the function at a call, and the Jacobian with passes."""
    program, returned = capture_function(call, batched=True, create_graph=False, replayable=False)
    values = [x.detach() for x in flatten(returned[0] if call.has_aux else returned)[0]]
    results = module(*(x.detach().contiguous() for x in variables(call)))
    Reference(program).check(results[len(values) :], Dense())
    return all(x.shape == y.shape and agree(x, y) for x, y in zip(results, values, strict=False))


def _render_c(call: Call, compiled: Compiled, name: str) -> tuple[SourceUnit, list[Tensor]]:
    """The C of value and Jacobian, and the outputs of the function at the call."""
    inputs = [x.detach().contiguous() for x in variables(call)]
    with torch.no_grad():
        module = trace_value(call, KEEP)
        values = list(module(*inputs))
    value = _record_value(call, compiled, module)

    def write(way: TensorProgram) -> SourceUnit:
        parts = [jacobian_of(way), (value, len(values))]
        if way.samples is not None:
            few, many = way.samples
            return build_batch_source(parts, few, many, f"{name}_body", Deployment.STANDALONE)
        return build_source(parts, compiled.shape[2], f"{name}_body", Deployment.STANDALONE)

    _, program = render_first(compiled.programs, write)
    _verify_c(program, compiled, inputs, values)
    return program, values


def _record_value(call: Call, compiled: Compiled, module: fx.GraphModule) -> Recording:
    """The operations of the function, recorded for the number of samples of the program."""
    samples = compiled.program.samples
    if samples is not None:
        fewer = first_samples(call, samples[1])
        assert fewer is not None, "there is a plan for fewer samples"
        call, many = fewer[0], module
        module = trace_value(call, KEEP)
        if not is_batch_invariant(module, many, *samples):
            raise PlanRefused("with fewer samples it runs other operations")
    return recording_of(module, [x.detach().contiguous() for x in variables(call)])


def _verify_c(
    program: SourceUnit, compiled: Compiled, inputs: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Compares the results of the C code with those of the program and of the function.

    Without a C compiler nothing is compared: the code is for another machine.

    Raises:
        PlanRefused: The results differ, or are not finite.
    """
    try:
        kernel = Executable(program)
    except NoCompiler:
        return
    with torch.no_grad():
        got, expected = kernel(inputs), compiled.program(inputs)
    if expected is None:
        raise PlanRefused("the result is not finite at these arguments")
    if got is None or not all(map(agree, got, [*expected, *values])):
        raise PlanRefused("C does not give what the function and its plan give")


def _describe(
    call: Call, compiled: Compiled, program: SourceUnit, values: Sequence[Tensor], name: str
) -> Standalone:
    """The texts of the files, with names for all arguments."""
    input_names = _distinct_names(_input_names(call), name)
    many = program.samples

    def array(label: str, about: str, shape: Sequence[int], dtype: torch.dtype) -> Array:
        each = many is not None and len(shape) > 0 and shape[0] == many
        return Array(
            label, about, tuple(shape[1:] if each else shape), _dtype_name(dtype), None, each
        )

    inputs = [
        array(n, "an argument", s, d) for n, (s, d) in zip(input_names, program.inputs, strict=True)
    ]
    count = len(program.outputs) - len(values)
    shapes = program.outputs
    known: list[Array] = []
    pattern = compiled.output.pattern
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
            about = f"of output {i} with respect to {input_names[j]}"
            outputs.append(array(label, about, shape, dtype))
    for k, (shape, dtype) in enumerate(shapes[count:]):
        label = "value" if len(values) == 1 else f"value_{k}"
        outputs.append(array(label, "what the function gives", shape, dtype))
    return standalone(program, name, inputs, outputs, known)


def _input_names(call: Call) -> list[str]:
    """A name for each input: that of the parameter if the argument is one tensor."""
    function: Callable[..., Any] = getattr(call.function, "forward", call.function)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    positions = list(call.positions())
    order = positions + [k for k in range(len(call.args)) if k not in positions]
    names: list[str] = []
    for k in order:
        base = parameters[k] if k < len(parameters) else f"x{k}"
        leaves = _count_inputs(call.args[k], k in positions)
        names += [base] if leaves == 1 else [f"{base}_{i}" for i in range(leaves)]
    left = len(variables(call)) - len(names)
    names += [f"more_{i}" for i in range(left)]
    return names


def _distinct_names(names: Sequence[str], function: str) -> list[str]:
    """Names as C identifiers, distinct from each other and from other names of the C function.

    Macros of sizes are in capital letters: names differ by more than case.
    """
    reserved = {"jacobian", "value", "work", "samples", "in", "out", "table", function.lower()}
    distinct: list[str] = []
    for base in map(identifier, names):
        name, k = base, 1
        while name.lower() in reserved or name.startswith(("jacobian_", "value_")):
            name, k = f"{base.removeprefix('jacobian_').removeprefix('value_')}_{k}", k + 1
            name = f"of_{name}" if name.startswith(("jacobian_", "value_")) else name
        reserved.add(name.lower())
        distinct.append(name)
    return distinct


def _count_inputs(argument: Any, differentiated: bool) -> int:
    """The number of inputs among the leaves of an argument."""
    leaves = [x for x in flatten(argument)[0] if isinstance(x, Tensor)]
    return len(leaves if differentiated else [x for x in leaves if x.is_floating_point()])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
