"""Plans in files: what it took to find them need not be spent again.

A plan is used only for the program that it was made for: the derivative of the function is traced
again, and has to be the same operation by operation, with the same constants. What is read is
data (JSON and arrays), never code.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.program.optimize import executable
from torchjac.compiler.program.serialize import NotStorable, bytes_of, restored, signature, stored
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import PlanError
from torchjac.request import Output, Sparse
from torchjac.sparsity import pattern_io as archive
from torchjac.sparsity.pattern import Pattern

_FORMAT, _VERSION = "torchjac plan", 1


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A plan that was written down.

    Attributes:
        about: What JSON says of it.
        arrays: Constants, as bytes.
        pattern: Structural nonzeros of a sparse result; None for a dense one.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]
    pattern: Pattern | None

    @classmethod
    def of(cls, plan: Compiled) -> Saved:
        """Writes a plan down.

        Raises:
            PlanError: It cannot be.
        """
        emitted, recording = plan.emitted, plan.emitted.recording
        named = _constants(plan.derivative)
        names = {id(tensor): name for name, tensor in named.items()}
        arrays, constants = {}, []
        try:
            for number, tensor in enumerate(recording.constants):
                if id(tensor) in names:
                    constants.append({"name": names[id(tensor)]})
                    continue
                if tensor.requires_grad or tensor.device.type != "cpu":
                    raise NotStorable("it reads a tensor that is not one of its constants")
                small = _small(tensor.shape, tensor.stride())
                arrays[f"constant{number}"] = bytes_of(tensor[tuple(slice(size) for size in small)])
                constants.append(_about(tensor))
            about = {
                "format": _FORMAT,
                "version": _VERSION,
                "torch": torch.__version__,
                "signature": _signature(plan.derivative),
                "layout": str(plan.output.layout),
                "batched": plan.shape[2] is not None,
                "mode": emitted.mode,
                "fixed": emitted.fixed,
                "waists": emitted.waists,
                "samples": emitted.samples,
                "constants": constants,
                "recording": stored(recording),
            }
        except NotStorable as wrong:
            raise PlanError(f"torchjac: the plan cannot be saved, because {wrong}.") from wrong
        return cls(about, arrays, plan.output.pattern)

    def write(self, path: str | Path) -> None:
        """Writes it to a file, which holds all of it or is not touched."""
        data = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays, "about": _text(json.dumps(self.about))}
        if self.pattern is not None:
            inner = io.BytesIO()
            archive.write(self.pattern, inner)
            arrays["pattern"] = np.frombuffer(inner.getvalue(), dtype=np.uint8)
        np.savez_compressed(data, **arrays)
        path = Path(path)
        beside = path.with_name(f"{path.name}.part")
        beside.write_bytes(data.getvalue())
        beside.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Saved:
        """Reads one from a file.

        Raises:
            PlanError: The file holds something else, or a plan of other versions.
            OSError: It cannot be read.
        """
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            inner = arrays.pop("pattern", None)
            pattern = None
            if inner is not None:
                pattern = Pattern(**archive.load(io.BytesIO(inner.tobytes())))
            found = [about.get(key) for key in ("format", "version", "torch")]
        except OSError:
            raise
        except Exception as wrong:  # whatever readers of damaged archives, arrays and JSON raise
            raise PlanError(f"torchjac: {path} is not a saved plan ({wrong}).") from wrong
        wanted = [_FORMAT, _VERSION, torch.__version__]
        if found != wanted:
            raise PlanError(
                f"torchjac: {path} has format, version and torch {found}; this torchjac reads "
                f"{wanted}. Make the plan anew with Jacobian.save."
            )
        return cls(about, arrays, pattern)

    def output(self, output: Output) -> Output:
        """An output of the layout of this plan, with the pattern of the plan."""
        return output.of_pattern(self.pattern) if isinstance(output, Sparse) else output

    def emitted(
        self, derivative: LinearProgram, output: Output, batched: bool
    ) -> TensorProgram | None:
        """The program, if it is that of this derivative and output.

        Raises:
            PlanError: It does not make sense.
        """
        about = self.about
        try:
            asked = str(output.layout), batched, _signature(derivative)
            if (about["layout"], about["batched"], about["signature"]) != asked:
                return None
            named = _constants(derivative)
            constants = [
                named[c["name"]] if "name" in c else _tensor(c, self.arrays[f"constant{i}"])
                for i, c in enumerate(about["constants"])
            ]
            recording = restored(about["recording"], constants)
            module, used = executable(recording)
            fixed, whole = about["fixed"]
            return TensorProgram(
                recording,
                module,
                used,
                module.forward,
                "forward" if about["mode"] == "forward" else "reverse",
                (int(fixed), int(whole)),
                tuple(map(str, about["waists"])),
                samples=_pair(about.get("samples")),
            )
        except (NotStorable, KeyError, TypeError, ValueError, RuntimeError) as wrong:
            raise PlanError(f"torchjac: the saved plan does not make sense ({wrong}).") from wrong


def _pair(given: Any) -> tuple[int, int] | None:
    """How many samples operations and kernel are for, if these are not the same."""
    if given is None:
        return None
    few, many = map(int, given)
    if not 0 < few < many:
        raise ValueError(f"{few} samples of {many}")
    return few, many


def _signature(derivative: LinearProgram) -> str:
    named = _constants(derivative)
    return signature(derivative.module.graph, lambda name: named[name])


def _constants(derivative: LinearProgram) -> dict[str, Tensor]:
    """What the derivative reads from elsewhere, by name."""
    module = derivative.module
    nodes = [node for node in module.graph.nodes if node.op == "get_attr"]
    return {str(node.target): getattr(module, str(node.target)) for node in nodes}


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _small(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Sizes without what is the same along an axis."""
    return [size if step else min(size, 1) for size, step in zip(shape, stride, strict=True)]


def _about(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def _tensor(about: dict[str, Any], data: np.ndarray) -> Tensor:
    """The tensor, with the strides that it had."""
    shape, stride = about["shape"], about["stride"]
    dtype: torch.dtype = getattr(torch, about["dtype"])
    small = _small(shape, stride)
    if 0 in small:
        return torch.empty_strided(shape, stride, dtype=dtype)
    reach = 1 + sum((size - 1) * step for size, step in zip(small, stride, strict=True))
    memory = torch.zeros(reach, dtype=dtype)
    memory.as_strided(small, stride).copy_(torch.from_numpy(data.copy()).view(dtype).reshape(small))
    return memory.as_strided(shape, stride)
