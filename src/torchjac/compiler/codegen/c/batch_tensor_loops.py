"""Tensor loops over SIMD batches of samples, and over a program without samples."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from torchjac.compiler.codegen.c.batch_loop import BatchRows
from torchjac.compiler.codegen.c.matmul_tiles import SIMD
from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.c.tensor_loops import TensorWriter
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import SCALAR, ArrayRef, Indices
from torchjac.compiler.codegen.schedule import LoopProgram
from torchjac.errors import PlanRefused


class BatchTensorWriter(BatchRows, TensorWriter):
    """Writes the loop over SIMD batches, from sample `first` up to sample `last`."""

    def __init__(self, scalars: ScalarProgram, program: LoopProgram):
        """Computes the layout of one sample."""
        (loop,) = program.loops
        super().__init__(scalars, program, loop.size)

    def body(self) -> list[str]:
        """The statements."""
        self._scalar_statements()
        tensor_loops = self._tensor_loops()
        self._allot(tensor_loops)
        for layout, numbers in tensor_loops:
            if layout is None:
                self._lines += self._render_loop(numbers, layout)
        self._lines += [
            f"  for (long i = first; i < last; i += {SIMD}) {{",
            f"    const int n = last - i < {SIMD} ? (int)(last - i) : {SIMD};",
        ]
        for layout, numbers in tensor_loops:
            if layout is not None:
                self._lines += self._render_loop(numbers, layout)
        self._lines += [*self._stores(), "  }"]
        return self._lines

    def _stores(self) -> list[str]:
        """The stores of all outputs, sample by sample."""
        (loop,) = self._program.loops
        stores: defaultdict[ArrayRef, dict[int, list[tuple[int, int]]]] = defaultdict(dict)
        for store in loop.stores:
            own = self._layouts.layouts[store.expression]
            rank = store.points if own is None else own.rank[store.points]
            if (rank != rank[0]).any():
                raise PlanRefused("samples are not computed alike")
            pairs = stores[store.array].setdefault(store.expression, [])
            pairs.append((int(rank[0]), int(store.positions[0])))
        lines = ["    for (int s = 0; s < n; s++) {"]
        for array, every in stores.items():
            width = len(self._program.fixed[array.number][1])
            lines += self.row(array)
            for number, pairs in every.items():
                lines += self._store_loop(array, width, number, *np.array(pairs).T)
        return [*lines, "    }"]

    def _store_loop(
        self, array: ArrayRef, width: int, number: int, ranks: Indices, positions: Indices
    ) -> list[str]:
        """The store of one expression."""
        t, alone = CTYPES[self._all[number].dtype], self._all[number].domain is SCALAR
        value = self.scalar_name(number) if alone else self._element(number, ranks, "r")
        self.statements += 1
        return [
            "      TORCHJAC_LOOP(bad)",
            f"      for (long r = 0; r < {len(ranks)}; r++) {{",
            f"        const {t} value = {value};",
            "        bad += value;",
            f"        {array}[(i + s) * {width} + {self.index(positions, 'r')}] = value;",
            "      }",
        ]


class TensorLoopWriter(TensorWriter):
    """Writes a program without samples: factors of products go through SIMD registers."""

    def body(self) -> list[str]:
        """The statements."""
        self._scalar_statements()
        tensor_loops = self._tensor_loops()
        self._allot(tensor_loops)
        for layout, numbers in tensor_loops:
            self._lines += self._render_loop(numbers, layout)
        for loop in self._program.loops:
            (store,) = loop.stores
            t = CTYPES[self._all[store.expression].dtype]
            self.statements += 1
            self._lines += [
                "  TORCHJAC_LOOP(bad)",
                f"  for (long r = 0; r < {loop.size}; r++) {{",
                f"    const {t} value = {self._element(store.expression, store.points, 'r')};",
                "    bad += value;",
                f"    {store.array}[{self.index(store.positions, 'r')}] = value;",
                "  }",
            ]
        return self._lines
