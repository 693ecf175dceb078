"""Strips of samples as C."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from torchjac.compiler.codegen.c.batch_loop import SampleRows
from torchjac.compiler.codegen.c.matmul_tiles import STRIP
from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.c.tensor_loops import GroupWriter
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ONE, ArrayRef, Places
from torchjac.compiler.codegen.schedule import LoopProgram
from torchjac.errors import PlanRefused


class StripWriter(SampleRows, GroupWriter):
    """Writes the loop over strips of samples, from sample `first` up to sample `last`."""

    def __init__(self, scalars: ScalarProgram, plan: LoopProgram):
        """Looks at what belongs to one sample."""
        (loop,) = plan.loops
        super().__init__(scalars, plan, loop.size)

    def body(self) -> list[str]:
        """The statements."""
        self._singles()
        groups = self._groups()
        self._allot(groups)
        for home, numbers in groups:
            if home is None:
                self._lines += self._written(numbers, home)
        self._lines += [
            f"  for (long i = first; i < last; i += {STRIP}) {{",
            f"    const int n = last - i < {STRIP} ? (int)(last - i) : {STRIP};",
        ]
        for home, numbers in groups:
            if home is not None:
                self._lines += self._written(numbers, home)
        self._lines += [*self._stores(), "  }"]
        return self._lines

    def _stores(self) -> list[str]:
        """What is written, sample by sample."""
        (loop,) = self._plan.loops
        found: defaultdict[ArrayRef, dict[int, list[tuple[int, int]]]] = defaultdict(dict)
        for store in loop.stores:
            own = self._strips.homes[store.expression]
            rank = store.lanes if own is None else own.rank[store.lanes]
            if (rank != rank[0]).any():
                raise PlanRefused("samples are not computed alike")
            pairs = found[store.array].setdefault(store.expression, [])
            pairs.append((int(rank[0]), int(store.positions[0])))
        lines = ["    for (int s = 0; s < n; s++) {"]
        for array, every in found.items():
            width = len(self._plan.fixed[array.number][1])
            lines += self.row(array)
            for number, pairs in every.items():
                lines += self._stored_in(array, width, number, *np.array(pairs).T)
        return [*lines, "    }"]

    def _stored_in(
        self, array: ArrayRef, width: int, number: int, ranks: Places, places: Places
    ) -> list[str]:
        """What one expression gives."""
        t, alone = CTYPES[self._all[number].dtype], self._all[number].lanes is ONE
        value = self.alone(number) if alone else self._element(number, ranks, "r")
        self.statements += 1
        return [
            "      TORCHJAC_LOOP(bad)",
            f"      for (long r = 0; r < {len(ranks)}; r++) {{",
            f"        const {t} value = {value};",
            "        bad += value;",
            f"        {array}[(i + s) * {width} + {self.index(places, 'r')}] = value;",
            "      }",
        ]


class LayerWriter(GroupWriter):
    """Writes one sample, or whatever has none: what is multiplied goes through registers."""

    def body(self) -> list[str]:
        """The statements."""
        self._singles()
        groups = self._groups()
        self._allot(groups)
        for home, numbers in groups:
            self._lines += self._written(numbers, home)
        for loop in self._plan.loops:
            (store,) = loop.stores
            t = CTYPES[self._all[store.expression].dtype]
            self.statements += 1
            self._lines += [
                "  TORCHJAC_LOOP(bad)",
                f"  for (long r = 0; r < {loop.size}; r++) {{",
                f"    const {t} value = {self._element(store.expression, store.lanes, 'r')};",
                "    bad += value;",
                f"    {store.array}[{self.index(store.positions, 'r')}] = value;",
                "  }",
            ]
        return self._lines
