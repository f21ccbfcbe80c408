"""What rounding would cost a few linears that read one value: the judge of rewrites that change only how they round.

The error is that of the outputs on rows from which no change was proposed. The range of the inputs is that of all rows,
since one row beyond the range of the others would decide everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.formats import FORMATS, affine, dequantize, fit, quantize

__all__ = ["Trial", "TrialRounding", "most_columns"]

LEFT_OUT = 4  # every fourth row judges: most are left to propose changes from, enough to tell these apart
COLUMNS = 512  # out-channels of a linear that are judged at most: candidates differ in how they treat in-channels


@dataclass(frozen=True)
class TrialRounding:
    """Bits and block of weights (block 0: one scale per out-channel), and bits of inputs, one range; 0 leaves them."""

    weights: int
    block: int
    inputs: int


@dataclass(frozen=True)
class Trial:
    """Linears `weights [K, N]` with rows `[T, K]` of the value that they read, and how both are rounded."""

    rows: Float64
    weights: Sequence[Float64]
    how: TrialRounding

    @property
    def _held(self) -> Array:
        return np.asarray(np.arange(len(self.rows)) % LEFT_OUT == 0)

    @property
    def seen(self) -> Float64:
        """The rows from which changes may be proposed."""
        return self.rows[~self._held]

    def error(self, gain: Float64 | None = None, shift: Float64 | None = None, basis: Float64 | None = None) -> float:
        """Mean relative squared error of the outputs where the linears read `(x - shift) / gain`, or `x basis`."""
        x, weights, held = self.rows, self.weights, self._held
        if shift is not None:
            x = x - shift
        if gain is not None:
            x, weights = x / gain, [gain[:, None] * w for w in weights]
        if basis is not None:
            x, weights = x @ basis, [basis.T @ w for w in weights]
        coded = self._inputs(x)[held]
        losses = [_relative(coded @ self._weight(w), x[held] @ w) for w in weights]
        return float(np.mean(losses))

    def _inputs(self, x: Float64) -> Float64:
        """Rows as codes of one range."""
        if not self.how.inputs:
            return x
        fmt = FORMATS["uint8"].narrowed(self.how.inputs)
        scale, zero = affine(x.min(), x.max(), fmt)
        return np.asarray(dequantize(quantize(x, scale, zero, fmt), scale, zero), np.float64)

    def _weight(self, w: Float64) -> Float64:
        if not self.how.weights:
            return w
        bits, block = self.how.weights, self.how.block
        fmt = FORMATS[f"{'u' if block else ''}int8"].narrowed(bits)
        coded = fit(w, fmt, axis=0 if block else 1, block=block, symmetric=not block)
        return np.asarray(coded.array(), np.float64)


def most_columns(w: Array, most: int = COLUMNS) -> Float64:
    """At most so many out-channels of a weight `[K, N]`, evenly spread."""
    n = w.shape[1]
    chosen = slice(None) if n <= most else np.linspace(0, n - 1, most).astype(int)
    return np.asarray(w[:, chosen], np.float64)


def _relative(got: Float64, want: Float64) -> float:
    energy = float((want**2).sum())
    return float(((got - want) ** 2).sum()) / energy if energy else 0.0
