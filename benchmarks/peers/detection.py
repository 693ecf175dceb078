"""asdex's detection in the peers' Python: ``python -m benchmarks.peers.detection FD FOLDER``.

FOLDER holds a folder a problem, each as `benchmarks.peers` takes it; the name of a problem's folder
is the method to ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers import jax_ports
from benchmarks.peers.__main__ import PeerBackend
from benchmarks.serve import serve

Constants = Mapping[str, "np.ndarray[Any, Any]"]


def heat(c: Constants) -> Callable[..., Any]:
    def f(u: Any) -> Any:
        first = u[1:2] - 2 * u[:1]
        inner = u[:-2] - 2 * u[1:-1] + u[2:]
        last = u[-2:-1] - 2 * u[-1:]
        return jax.numpy.concatenate([first, inner, last])

    return f


def convnet(c: Constants) -> Callable[..., Any]:
    def f(x: Any) -> Any:
        signal = x[None, None]
        for name in sorted(c):
            signal = jax.lax.conv_general_dilated(
                signal, c[name], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
            )
            signal = jax.nn.relu(signal)
        return signal.reshape(-1)

    return f


PORTS = {**jax_ports.PORTS, "heat": heat, "convnet": convnet}


class DetectionBackend:
    """Every problem of a folder, for `serve`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        jax.config.update("jax_enable_x64", True)

    def load(self, method: str) -> None:
        import asdex  # noqa: F401

    def prepare(self, method: str) -> Callable[[], Any]:
        """A detection of a function that nobody has traced before."""
        import asdex

        problem = PeerBackend(self._folder / method)
        f = PORTS[problem.meta["port"]](problem.constants)
        args = [jax.numpy.asarray(a) for a in problem.args]
        return lambda: asdex.jacobian_sparsity(f, *args, argnums=problem.argnums)

    def settled(self) -> bool:
        """Nothing changes from call to call."""
        return True

    def matrix(self, result: Any) -> np.ndarray[Any, Any]:
        """Row and column of every entry."""
        return np.stack([np.asarray(result.rows), np.asarray(result.cols)]).astype(np.int64)


def main(fd: str, folder: str) -> None:
    """Serve the problems of a folder."""
    with Connection(int(fd)) as channel:
        backend = DetectionBackend(Path(folder))
        channel.send({"event": "ready"})
        serve(channel, backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
