"""Plans in files, so that a later process need not compile again.

A plan is used only for the function that it was compiled for: the derivative of the function is
traced again, and must be the same operation by operation, with the same constants. A file holds
data (JSON and arrays), never code. Programs are written by `compiler/program/serialize.py`,
patterns by `sparsity/pattern_io.py`, both in the format of `host/archive.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.program.serialize import (
    NotSerializable,
    deserialize,
    serialize,
    signature,
)
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import PlanError
from torchjac.host.archive import pack, unpack
from torchjac.request import Output, Sparse
from torchjac.sparsity import pattern_io
from torchjac.sparsity.pattern import Pattern

_FORMAT, _VERSION = "torchjac plan", 1


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A plan in the form that a file has.

    Attributes:
        about: The JSON of the program and of the function that it was compiled for.
        arrays: Constants, as bytes.
        pattern: Structural nonzeros of a sparse result; None for a dense one.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]
    pattern: Pattern | None

    @classmethod
    def of(cls, plan: Compiled) -> Saved:
        """The form of a plan in a file.

        Raises:
            PlanError: It has none.
        """
        try:
            program, arrays = serialize(plan.program, _constants(plan.derivative))
            about = {
                "format": _FORMAT,
                "version": _VERSION,
                "torch": torch.__version__,
                "signature": _signature(plan.derivative),
                "layout": str(plan.output.layout),
                "batched": plan.shape[2] is not None,
                **program,
            }
        except NotSerializable as wrong:
            raise PlanError(f"torchjac: the plan cannot be saved, because {wrong}.") from wrong
        return cls(about, arrays, plan.output.pattern)

    def write(self, path: str | Path) -> None:
        """Writes the plan to a file, whole or not at all."""
        arrays = dict(self.arrays)
        if self.pattern is not None:
            data = pattern_io.to_bytes(self.pattern)
            arrays["pattern"] = np.frombuffer(data, dtype=np.uint8)
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(pack(self.about, arrays))
        part.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Saved:
        """Reads a plan from a file.

        Raises:
            PlanError: The file holds something else, or a plan of another version.
            OSError: The file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            about, arrays = unpack(data)
            inner = arrays.pop("pattern", None)
            pattern = None
            if inner is not None:
                pattern = Pattern(**pattern_io.from_bytes(inner.tobytes(), "its pattern"))
            version = [about.get(key) for key in ("format", "version", "torch")]
        except Exception as wrong:  # whatever readers of damaged archives, arrays and JSON raise
            raise PlanError(f"torchjac: {path} is not a saved plan ({wrong}).") from wrong
        expected = [_FORMAT, _VERSION, torch.__version__]
        if version != expected:
            raise PlanError(
                f"torchjac: {path} has format, version and torch {version}; this torchjac reads "
                f"{expected}. Make the plan anew with Jacobian.save."
            )
        return cls(about, arrays, pattern)

    def output(self, output: Output) -> Output:
        """An output of the layout of this plan, with the pattern of the plan."""
        return output.of_pattern(self.pattern) if isinstance(output, Sparse) else output

    def program(
        self, derivative: LinearProgram, output: Output, batched: bool
    ) -> TensorProgram | None:
        """The program; None if it was compiled for another derivative or another layout.

        Raises:
            PlanError: The file holds no program.
        """
        about = self.about
        try:
            key = str(output.layout), batched, _signature(derivative)
            if (about["layout"], about["batched"], about["signature"]) != key:
                return None
            return deserialize(about, self.arrays, _constants(derivative))
        except (NotSerializable, KeyError, TypeError, ValueError, RuntimeError) as wrong:
            raise PlanError(f"torchjac: the saved plan does not make sense ({wrong}).") from wrong


def _signature(derivative: LinearProgram) -> str:
    constants = _constants(derivative)
    return signature(derivative.module.graph, lambda name: constants[name])


def _constants(derivative: LinearProgram) -> dict[str, Tensor]:
    """Tensors that the derivative reads from outside of the function, by name."""
    module = derivative.module
    nodes = [node for node in module.graph.nodes if node.op == "get_attr"]
    return {str(node.target): getattr(module, str(node.target)) for node in nodes}
