"""Blocks of small floats with a shared scale: NVFP4, MXFP4 and MXFP8, encoded and decoded.

`w = global * scale * element`: elements of E2M1 or E4M3 along the first axis, one scale per block of it, E4M3 with one
float32 `global` scale for NVFP4, a power of two (E8M0) for the MX formats (Open Compute Project, Microscaling 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.maths.formats import block_reduced, spread

__all__ = ["BLOCK_FLOATS", "BlockFloat", "BlockFloats"]


@dataclass(frozen=True)
class BlockFloat:
    """A format: types of elements and scales, elements per scale, the largest element."""

    name: str
    element: np.dtype[Any]
    scale: np.dtype[Any]
    block: int
    largest: float

    @property
    def bits(self) -> float:
        """Bits of a weight with its share of a scale."""
        return float(ml_dtypes.finfo(self.element).bits + 8 / self.block)

    def encode(self, w: Array) -> BlockFloats:
        """`[K, ...]` in blocks of the first axis; raises `DataError` for an empty, NaN or infinite constant."""
        if w.size == 0 or not np.isfinite(w).all():
            raise DataError("a constant to quantize is empty, NaN or infinite")
        w = w.astype(np.float32)
        limit = block_reduced(np.maximum, np.abs(w), 0, self.block)
        if self.scale == np.dtype(ml_dtypes.float8_e8m0fnu):  # the block's exponent less that of the largest element
            exponent = np.floor(np.log2(np.where(limit > 0, limit, 1.0))) - np.floor(np.log2(self.largest))
            raw, whole = np.exp2(np.clip(exponent, -127, 127)), 1.0
        else:
            top = float(limit.max()) / self.largest / float(ml_dtypes.finfo(self.scale).max)
            whole = float(np.float32(top)) if top > 0 else 1.0
            raw = limit / self.largest / whole
        scales = raw.astype(self.scale)
        wide = spread(scales.astype(np.float32), w.shape, 0, self.block) * np.float32(whole)
        ratio = np.divide(w, wide, out=np.zeros_like(w), where=wide > 0)
        return BlockFloats(np.clip(ratio, -self.largest, self.largest).astype(self.element), scales, whole, self)


@dataclass(frozen=True)
class BlockFloats:
    """A constant in such a format: elements, scales and the scale of all."""

    codes: Array
    scale: Array
    whole: float
    fmt: BlockFloat

    def array(self) -> Array:
        """The numbers that the codes stand for, float32."""
        numbers = self.codes.astype(np.float32)
        return (
            numbers * spread(self.scale.astype(np.float32), numbers.shape, 0, self.fmt.block) * np.float32(self.whole)
        )


_E2M1, _E4M3 = np.dtype(ml_dtypes.float4_e2m1fn), np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BLOCK_FLOATS = {
    f.name: f
    for f in (
        BlockFloat("nvfp4", _E2M1, _E4M3, 16, 6.0),
        BlockFloat("mxfp4", _E2M1, _E8M0, 32, 6.0),
        BlockFloat("mxfp8", _E4M3, _E8M0, 32, 448.0),
    )
}
