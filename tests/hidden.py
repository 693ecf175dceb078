"""torchjac in a process where torch lacks something: an operator, or a private part.

Nothing of torchjac may be imported yet where that begins, so it is a program of its own. It imports
torch once, and forks a process for each thing to hide:

    python tests/hidden.py operators aten.sin.default aten.mm.default
    python tests/hidden.py private torch._C._functorch
    python tests/hidden.py private                      # prints all private paths

It prints what went wrong, a line each, and nothing where all results are right.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1] / "src"
# Imported by torchjac: what is there already need not be imported in every process.
PRELOADED_MODULES = (
    "scipy.sparse",
    "torch._decomp",
    "torch.fx.experimental.proxy_tensor",
    "torch._functorch.predispatch",
    "torch.fx._lazy_graph_module",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch._functorch.vmap",
    "torch._functorch.eager_transforms",
)


def preloaded(name: str) -> ModuleType:
    """A module that knows no other one but preloaded ones, before torchjac is imported."""
    path = ROOT / Path(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def hide_operator(name: str) -> None:
    """Hides an overload (`aten.sin.default`) from torchjac, and from it alone."""
    preloaded("torchjac._torch.private")
    operators: Any = preloaded("torchjac._torch.operators")
    namespace, packet, overload = name.split(".")
    parent = getattr(getattr(operators, namespace), packet)
    setattr(parent, overload, operators.MissingOperator(name))
    overloads = [o for o in parent.overloads() if o != overload]
    parent.overloads = lambda: overloads


def hide_private(path: str) -> None:
    """Hides a private path of torch, and everything in it, from torchjac."""
    private: Any = preloaded("torchjac._torch.private")
    resolve = private._resolve

    def without(asked: str, instead: Any) -> Any:
        is_hidden = asked == path or asked.startswith(f"{path}.")
        return instead if is_hidden else resolve(asked, instead)

    private._resolve = without


def private_paths() -> list[str]:
    """All private paths that torchjac asks for while it is imported."""
    private: Any = preloaded("torchjac._torch.private")
    resolve, paths = private._resolve, dict.fromkeys([""])

    def recording_resolve(path: str, instead: Any) -> Any:
        paths[path] = None
        return resolve(path, instead)

    private._resolve = recording_resolve
    importlib.import_module("torchjac")
    return sorted(filter(None, paths))


def check() -> None:
    """Jacobians of some small functions, in all ways, against the row loop."""
    import torchjac
    import torchjac.testing

    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)

    def f(x: Tensor) -> Tensor:
        y = torch.tanh(weight @ x)
        return torch.cat([y.sin() * y, x[1:] * x[:-1], x.exp().sum().reshape(1)])

    def batch(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] * x[:, 1], x.cos().sum(1)], -1)

    def energy(x: Tensor) -> Tensor:
        return (x[1:] * x[:-1]).pow(2).sum() + torch.tanh(weight @ x).sum()

    x = torch.linspace(0.3, 1.1, 4, dtype=torch.float64)
    y = x.clone().requires_grad_()
    want = torchjac.testing.oracle(f(y), y)
    close(torchjac.jac(f(y), y), want)
    for options in ({}, {"compile": True}, {"layout": torch.sparse_csr}):
        J = torchjac.jacobian(f, **options)
        for _ in range(3):
            jacobian = J(x)
            close(jacobian.to_dense() if jacobian.layout != torch.strided else jacobian, want)
    points = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)
    rows = torch.stack([points.flip(1), -points.sin()], 1)
    close(torchjac.jacobian(batch, batched=True)(points), rows)
    (gradient,) = torch.autograd.grad(energy(y), y, create_graph=True)
    close(torchjac.hessian(energy)(x), torchjac.testing.oracle(gradient, y))


def check_inside() -> None:
    """The same inside of a torch.func transform."""
    import torchjac

    points = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)
    jacobian = torch.vmap(torchjac.jacobian(lambda p: p.prod() * p))(points)
    product = points.prod(1)[:, None, None]
    turned = points.flip(1)[:, None, :] * points[:, :, None]
    close(jacobian, product * torch.eye(2) + turned)


def check_tables() -> None:
    """Law: no table of torchjac holds an operator that is missing."""
    kind: Any = sys.modules["torchjac._torch.operators"].MissingOperator
    for name, module in list(sys.modules.items()):
        if not name.startswith("torchjac."):
            continue
        for table, value in vars(module).items():
            if isinstance(value, (Mapping, Set, list, tuple)):
                assert not [x for x in value if isinstance(x, kind)], f"{name}.{table}"


def close(actual: Tensor, want: Tensor) -> None:
    """Law: the same but for rounding."""
    torch.testing.assert_close(actual, want, rtol=1e-10, atol=1e-12)


def forked(hide: Callable[[str], None], name: str) -> str | None:
    """What went wrong where something is hidden; None if nothing did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as file:
            told = file.read()
        _, status = os.waitpid(child, 0)
        return None if status == 0 else f"{name}: {told or f'exit status {status}'}"
    try:
        logging.disable()
        warnings.simplefilter("ignore")
        hide(name)
        check()
        check_inside() if hide is hide_private else check_tables()
    except BaseException:
        last = traceback.format_exc()
        os.write(writing, last[-3000:].encode())
        os._exit(1)
    os._exit(0)


def main(kind: str, *names: str) -> None:
    """See the top."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TORCHJAC_CACHE_DIR", tempfile.mkdtemp(prefix="torchjac-hidden-"))
    warnings.simplefilter("ignore")
    for module in PRELOADED_MODULES:
        with contextlib.suppress(ImportError):  # not in every torch
            importlib.import_module(module)
    if kind == "private" and not names:
        print("\n".join(private_paths()))
        return
    hide = hide_operator if kind == "operators" else hide_private
    if hide is hide_private:
        importlib.import_module("torch._dynamo")  # torch.func.jacrev does, in half a second
    for name in names:
        wrong = forked(hide, name)
        if wrong is not None:
            print(wrong)


if __name__ == "__main__":
    main(*sys.argv[1:])
