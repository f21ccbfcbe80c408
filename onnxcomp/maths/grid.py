"""Codes under their scales, as the searches of rounding move them."""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array, Float32
from onnxcomp.maths.formats import Format, Quantized, cast

__all__ = ["Grid"]


class Grid:
    """Scales and limits of the codes by rows, float32: in-channel `i` has those of row `i // block`.

    Codes count from their zero points here, so that a weight is `scale * code`.
    """

    def __init__(self, q: Quantized, f: Format) -> None:
        k, n = q.codes.shape
        self.block, self.f = q.block or k, f
        self.scale, self.zero = (a.reshape(-1, n).astype(np.float32) for a in (q.scale, q.zero))
        self.low, self.high = f.low - self.zero, f.high - self.zero

    def spread(self, a: Float32, k: int) -> Float32:
        """Rows of all in-channels `[K, N]`."""
        return np.repeat(a, self.block, axis=0)[:k] if self.block > 1 else a

    def codes(self, q: Quantized) -> Float32:
        """The codes from their zero points, `[K, N]`."""
        return q.codes.astype(np.float32) - self.spread(self.zero, len(q.codes))

    def stored(self, codes: Float32) -> Array:
        """Codes in their type."""
        return cast(codes + self.spread(self.zero, len(codes)), self.f)

    def nearest(self, i: int, steps: Float32) -> Float32:
        """The codes of an in-channel, `[N]`, that are nearest to a number of steps."""
        b = i // self.block
        bounded = np.minimum(np.maximum(steps, self.low[b]), self.high[b])
        if self.f.integer:
            return np.asarray(np.rint(bounded), np.float32)
        return np.asarray(bounded.astype(self.f.dtype), np.float32)
