"""A worker in the peers' Python: ``python -m benchmarks.peers FD FOLDER LIMIT``.

FOLDER holds ``workload.json`` and ``arrays.npz``; orders come over the
inherited pipe FD.
LIMIT is the memory allowed in bytes (0: no limit). Only what a method needs is imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve import limit_memory, serve

_LARGE = 2**26


def _triplets(blocks: Any, m: int) -> dict[str, Any]:
    """Entries of sparse blocks side by side, by their places; rows are the axes that make up m."""
    rows, columns, first = [], [], 0
    for block in blocks:
        shape, index = block.shape, np.asarray(block.indices)
        split = next(k for k in range(len(shape)) if np.prod(shape[:k], dtype=int) == m)
        rows.append(np.ravel_multi_index(tuple(index[:, :split].T), shape[:split]))
        columns.append(np.ravel_multi_index(tuple(index[:, split:].T), shape[split:]) + first)
        first += int(np.prod(shape[split:], dtype=int))
    return {
        "row": np.concatenate(rows),
        "column": np.concatenate(columns),
        "value": np.concatenate([np.asarray(block.data) for block in blocks]),
        "shape": np.array([m, first]),
    }


class PeerBackend:
    """One workload in JAX, asdex or CasADi."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "workload.json").read_text())
        arrays = np.load(folder / "arrays.npz")
        self.args = [arrays[f"arg{i}"] for i in range(self.meta["args"])]
        self.constants = {k[6:]: arrays[k] for k in arrays if k.startswith("const_")}
        self.argnums = self.meta["argnums"]
        if isinstance(self.argnums, list):
            self.argnums = tuple(self.argnums)

    def load(self, method: str) -> None:
        importlib.import_module({"casadi": "casadi", "asdex": "asdex"}.get(method, "jax"))

    def prepare(self, method: str) -> Callable[[], Any]:
        if method == "casadi":
            return self._casadi()
        return self._asdex() if method == "asdex" else self._jax(method)

    def settled(self) -> bool:
        """Nothing changes from call to call."""
        return True

    def matrix(self, result: Any) -> Any:
        m, batch = self.meta["m"], self.meta["batch"]
        blocks = result if isinstance(result, (tuple, list)) else (result,)
        if hasattr(blocks[0], "todense") and m * self.meta["n"] > _LARGE:
            return _triplets(blocks, m)
        shape = (m, -1) if batch is None else (batch, m, -1)
        dense = [np.asarray(b.todense() if hasattr(b, "todense") else b) for b in blocks]
        return np.concatenate([b.reshape(shape) for b in dense], -1)

    def _jax_parts(self) -> tuple[Any, Any, list[Any]]:
        import jax

        jax.config.update("jax_enable_x64", True)
        from benchmarks.peers.jax_ports import PORTS

        f = PORTS[self.meta["port"]](self.constants)
        return jax, f, [jax.numpy.asarray(a) for a in self.args]

    def _jax(self, method: str) -> Callable[[], Any]:
        jax, f, args = self._jax_parts()
        jacobian = (jax.jacrev if method == "jax-jacrev" else jax.jacfwd)(f, self.argnums)
        if self.meta["batch"] is not None:
            jacobian = jax.vmap(jacobian)
        compiled = jax.jit(jacobian)
        return lambda: jax.block_until_ready(compiled(*args))

    def _asdex(self) -> Callable[[], Any]:
        import warnings

        import asdex

        jax, f, args = self._jax_parts()
        # Where it finds nothing to save it says so; the time in the table says it too.
        warnings.simplefilter("ignore", asdex.DenseColoringWarning)
        compiled = jax.jit(asdex.jacobian(f, *args, argnums=self.argnums))
        return lambda: jax.block_until_ready(compiled(*args))

    def _casadi(self) -> Callable[[], Any]:
        import casadi as ca

        from benchmarks.peers.casadi_ports import PORTS

        batch, sparse = self.meta["batch"], self.meta["sparse"]
        sizes = [int(a[0].size if batch is not None else a.size) for a in self.args]
        symbols, out = PORTS[self.meta["port"]](self.constants, sizes)
        jacobian = ca.jacobian(out, ca.vertcat(*symbols))
        function = ca.Function("J", symbols, [jacobian if sparse else ca.densify(jacobian)])
        if batch is not None:
            function = function.map(batch)
        buffer, trigger = function.buffer()
        # Row-major (B, n) in PyTorch is CasADi's column-major (n, B): the same bytes.
        args = [np.ascontiguousarray(a, dtype=np.float64).ravel() for a in self.args]
        for i, a in enumerate(args):
            buffer.set_arg(i, memoryview(a))
        values = np.zeros(function.nnz_out(0))
        buffer.set_res(0, memoryview(values))
        m, n = self.meta["m"], self.meta["n"]
        pattern = function.sparsity_out(0)

        class Result:
            """The stored entries; dense only when the comparison asks."""

            def todense(self) -> np.ndarray[Any, Any]:
                if batch is not None:
                    return values.reshape(batch, n, m).transpose(0, 2, 1)
                return np.array(ca.DM(pattern, values))

            references = (function, buffer, args, values)  # the trigger holds bare pointers to them

        result = Result()

        def call() -> Any:
            trigger()
            return result

        return call


def main(fd: str, folder: str, limit: str) -> None:
    """Load the workload, serve."""
    with Connection(int(fd)) as channel:
        backend = PeerBackend(Path(folder))
        if int(limit):
            limit_memory(int(limit))
        channel.send({"event": "ready"})
        serve(channel, backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
