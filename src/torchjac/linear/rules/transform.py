"""Transforms: dense along the axes of the transform; all other axes are lanes."""

from __future__ import annotations

from torchjac._torch.operators import aten
from torchjac.linear.maps import dense
from torchjac.linear.rules.registry import Local, Op, rule


@rule(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
def fft(op: Op) -> Local:
    """A Fourier transform along axes, which may change their size."""
    operand = op.only("self")
    return [(operand, dense(op.shape, operand.shape, op["dim"], op["dim"]))]
