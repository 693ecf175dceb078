"""Exported C: cases x the law that it gives what the function and its row loop give."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from laws import oracle_jacobian, same, value
from test_accumulate import BATCHED, PROBLEMS
from torchjac.compiler.codegen.c import toolchain as compiler
from torchjac.compiler.codegen.c import writer as source
from torchjac.errors import PlanError

CC = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include "{name}.h"
int main(void)
{{
{inputs}
{outputs}
  void *work = {WORK} ? malloc({WORK}) : NULL;
  for (int turn = 0; turn < 2; turn++)
    if (!{name}({arguments}, work)) return 1;
{prints}
  free(work);
  return 0;
}}
"""


def ran(
    files: list[Path], inputs: dict[str, Tensor], outputs: dict[str, int], first: str = ""
) -> dict[str, Tensor]:
    """Compiles what was exported with a program of its own, under sanitizers, and runs it."""
    name, folder = files[0].stem, files[0].parent
    kind = {torch.float64: "double", torch.float32: "float"}
    dtype = next(iter(inputs.values())).dtype
    numbers = {n: [*x.flatten().tolist(), 0.0] for n, x in inputs.items()}  # C has no empty arrays
    declarations = [
        f"  const {kind[x.dtype]} {n}[] = {{{', '.join(map(float.hex, numbers[n]))}}};"
        for n, x in inputs.items()
    ]
    allocations = [
        f"  {kind[dtype]} *{n} = malloc(sizeof(*{n}) * {k});" for n, k in outputs.items()
    ]
    prints = [
        f'  for (int i = 0; i < {k}; i++) printf("%a\\n", (double){n}[i]);\n  free({n});'
        for n, k in outputs.items()
    ]
    main = folder / "main.c"
    main.write_text(
        MAIN.format(
            name=name,
            WORK=f"{name.upper()}_WORK",
            inputs="\n".join(declarations),
            outputs="\n".join(allocations),
            arguments=first + ", ".join([*inputs, *outputs]),
            prints="\n".join(prints),
        )
    )
    program = folder / "main"
    command = [CC, *STRICT, *SANITIZED, str(files[0]), str(main), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    lines = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    printed = iter([float.fromhex(x) for x in lines.stdout.split()])
    return {
        n: torch.tensor([next(printed) for _ in range(k)], dtype=dtype) for n, k in outputs.items()
    }


def check(folder: Path, f: Callable[..., Any], x: Tensor, **how: Any) -> None:
    """Law: value and Jacobian are those of the function, with no warning and no bad access."""
    J = torchjac.jacobian(f, **how)
    files = J.export(folder / "made", x)
    want, value_ = oracle_jacobian(f, 0, batched=how.get("batched", False))(x), f(x)
    sparse = "layout" in how
    entries = J(x) if sparse else want
    size = entries._nnz() if sparse else want.numel()
    name = next(n for n in files[1].read_text().split() if n.endswith(":"))[:-1]
    got = ran(files, {name: x}, {"jacobian": size, "value": value_.numel()})
    same(got["value"].view(value_.shape), value_)
    if sparse:
        rows, columns = arrays(files[0].read_text())
        jacobian = torch.sparse_csr_tensor(
            rows, columns, got["jacobian"], entries.shape, check_invariants=True
        ).to_dense()
        same(jacobian.reshape(want.shape), want)
    else:
        same(got["jacobian"].view(want.shape), want)


def arrays(text: str) -> tuple[Tensor, Tensor]:
    """The pattern, as it stands in the file."""
    tables = []
    for label in ("row_starts", "columns"):
        begin = text.index(f"const int made_{label}[] = {{") + len(f"const int made_{label}[] = {{")
        numbers = text[begin : text.index("}", begin)].split(",")
        tables.append(torch.tensor([int(n) for n in numbers]))
    return tables[0], tables[1]


NAMES = ["the question", "pairs", "edges twice", "stencil", "softmax", "norm", "conv"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
@pytest.mark.parametrize("name", NAMES)
def test_problems(tmp_path: Path, name: str, layout: torch.layout) -> None:
    """In C99, without a warning, under sanitizers."""
    f, shape = PROBLEMS[name]
    check(tmp_path, f, value(*shape), **({} if layout is torch.strided else {"layout": layout}))


def test_a_batch(tmp_path: Path) -> None:
    check(tmp_path, BATCHED["network"], value(7, 6), batched=True)


@pytest.mark.parametrize("shape", [(8,), (65, 2)])
def test_large_numbers_are_finite(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Though their sum is not: the function says that it went well."""

    def f(x: Tensor) -> Tensor:
        return x.sin() + 1e308 + 1e308 * (x - 5).relu()

    files = torchjac.jacobian(f, batched=len(shape) > 1).export(tmp_path / "made", value(*shape))
    x = value(*shape, seed=1)
    first = "65, " if "samples" in files[1].read_text() else ""
    size = x.numel() * shape[-1]
    got = ran(files, {"x": x}, {"jacobian": size, "value": x.numel()}, first)
    assert torch.equal(got["value"].view(shape), f(x))
    x[3] = 7
    with pytest.raises(subprocess.CalledProcessError, match=r"main'.* status 1"):
        ran(files, {"x": x}, {"jacobian": size, "value": x.numel()}, first)


def test_single_precision(tmp_path: Path) -> None:
    check(tmp_path, lambda x: x.sin() * x.sum(), value(5, dtype=torch.float32))


def test_two_arguments(tmp_path: Path) -> None:
    def f(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left * right.sum(), right.cos()

    x, y = value(3), value(2, seed=1)
    files = torchjac.jacobian(f, argnums=(0, 1)).export(tmp_path / "two-arguments", x, y)
    assert [file.name for file in files] == [
        "two_arguments.c",
        "two_arguments.h",
        "two_arguments.hpp",
    ]
    sizes = {"jacobian_0_0": 9, "jacobian_0_1": 6, "jacobian_1_0": 6, "jacobian_1_1": 4}
    got = ran(files, {"left": x, "right": y}, sizes | {"value_0": 3, "value_1": 2})
    want = oracle_jacobian(f, (0, 1))(x, y)
    for i in range(2):
        for j in range(2):
            same(got[f"jacobian_{i}_{j}"].view(want[i][j].shape), want[i][j])
    same(got["value_0"], f(x, y)[0])


def test_one_tensor_for_two_arguments(tmp_path: Path) -> None:
    """The file is for two arrays all the same."""

    def f(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sin() + left

    x, y = value(3), value(3, seed=1)
    files = torchjac.jacobian(f, argnums=(0, 1)).export(tmp_path / "two", x, x)
    sizes = {"jacobian_0_0": 9, "jacobian_0_1": 9, "value": 3}
    got = ran(files, {"left": x, "right": y}, sizes)
    want = oracle_jacobian(f, (0, 1))(x, y)
    for j in range(2):
        same(got[f"jacobian_0_{j}"].view(3, 3), want[j])
    same(got["value"], f(x, y))


def test_parameters_are_as_they_were(tmp_path: Path) -> None:
    """A file cannot see that a network is trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = value(3)
    check(tmp_path, net, x)


def test_what_has_no_scalar_form(tmp_path: Path) -> None:
    matrix = value(9, 9) + 9 * torch.eye(9, dtype=torch.float64)
    J = torchjac.jacobian(lambda b: torch.linalg.solve(matrix * b.sum(), b))
    with pytest.raises(PlanError, match="cannot be written as C"):
        J.export(tmp_path / "solve", value(9))
    assert not list(tmp_path.iterdir())


def test_names(tmp_path: Path) -> None:
    """Whatever a user calls things, C takes it."""

    def f(int: Tensor, work: Tensor) -> Tensor:
        return int * work

    files = torchjac.jacobian(f).export(tmp_path / "7-up.plan", value(2), value(2, seed=1))
    got = ran(files, {"f_int": value(2), "work_": value(2, seed=1)}, {"jacobian": 4, "value": 2})
    same(got["value"], value(2) * value(2, seed=1))


def test_not_finite(tmp_path: Path) -> None:
    """It says so."""
    files = torchjac.jacobian(lambda x: 1 / x).export(tmp_path / "made", value(2) + 2)
    with pytest.raises(subprocess.CalledProcessError):
        ran(files, {"x": torch.zeros(2, dtype=torch.float64)}, {"jacobian": 4, "value": 2})


@pytest.mark.slow
def test_package(tmp_path: Path) -> None:
    """For `AOTIModelPackageLoader`."""
    weight = value(4, 3, seed=1)

    def f(x: Tensor) -> Tensor:
        return (weight @ x).sin()

    x = value(3)
    (file,) = torchjac.jacobian(f).export(tmp_path / "made.pt2", x)
    loaded = torch._inductor.aoti_load_package(str(file))
    for point in (x, 0.5 * x + 1):
        result, J = loaded(point)
        same(result, f(point))
        same(J, oracle_jacobian(f)(point))


def awkward(value: Tensor, value_: Tensor, Value: Tensor, template: Tensor) -> Tensor:
    """Every name is a trap."""
    return value * value_ + Value * template


@pytest.mark.parametrize("stem", ["template", "sin", "memcpy", "NULL", "true", "é", "_", "class"])
def test_names_that_are_reserved(tmp_path: Path, stem: str) -> None:
    """By C, C++, the C library, or each other."""
    args = [value(2, seed=k) for k in range(4)]
    files = torchjac.jacobian(awkward).export(tmp_path / f"{stem}.c", *args)
    header = files[1].read_text()
    names = [line.split()[1][:-1] for line in header.splitlines() if line.endswith("(in)")]
    assert len({n.lower() for n in names}) == 4
    got = ran(files, dict(zip(names, args, strict=True)), {"jacobian": 4, "value": 2})
    same(got["value"], awkward(*args))
    both = f'#include "{files[1].name}"\nint main() {{ return 0; }}\n'
    (tmp_path / "both.cpp").write_text(both)
    command = ["c++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", tmp_path / "both.cpp"]
    subprocess.run(command, check=True, capture_output=True)


def test_what_is_wrong_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C is compared with the plan before there is a file."""
    monkeypatch.setattr(source, "C", {**source.C, "cos": "sin{f}({0})"})
    with pytest.raises(PlanError, match="C does not give"):
        torchjac.jacobian(torch.sin).export(tmp_path / "made", value(3))
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be compared here, and is for another machine."""
    monkeypatch.setattr(compiler, "_command", lambda: None)
    files = torchjac.jacobian(lambda x: x.sin() * x.sum()).export(tmp_path / "f", value(3))
    assert all(file.exists() for file in files)
