"""Codes fitted to the weights alone, for no data: half-quadratic quantization (HQQ) with whole zero points.

`min |W - s (q - z)|_p^p` with `p < 1`, which lets a few weights err much: the error is split off as `E`, shrunk, and
the zero point is the mean of `q - (W - E) / s`, in turns (Badri and Shaji 2023, mobiusml/hqq). Products take whole zero
points only, and under the scale of the whole range rounding them undoes the fit; so smaller ranges are tried as well,
and each block keeps what errs least.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.formats import SHRINK, Format, Quantized, affine, block_reduced, dequantize, quantize, spread

__all__ = ["hqq"]

POWER = 0.7  # p of the paper; its penalty and the penalty's growth follow
PENALTY = 10.0
GROWTH = 1.01
TURNS = 4  # with whole zero points later ones change nothing


def hqq(w: Array, f: Format, block: int, scale_type: Any = np.float32) -> Quantized:
    """Weights `[K, N]` as codes with scales and zero points `[blocks, N]`."""
    w = w.astype(np.float32)
    low, high = (block_reduced(u, w, 0, block) for u in (np.minimum, np.maximum))
    scale, zero = affine(low, high, f, scale_type=scale_type)
    best = _error(w, f, block, scale, zero)
    for factor in SHRINK:
        s, start = affine(low * factor, high * factor, f, scale_type=scale_type)
        z = _zeros(w, f, block, s, start)
        error = _error(w, f, block, s, z)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, s, scale)
        zero = np.where(better, z, zero)
    return Quantized(quantize(w, scale, zero, f, axis=0, block=block), scale, zero, 0, block)


def _error(w: Array, f: Format, block: int, scale: Array, zero: Array) -> Array:
    """Sums of `|error|^p`, `[blocks, N]`."""
    codes = quantize(w, scale, zero, f, axis=0, block=block)
    powers = np.abs(dequantize(codes, scale, zero, axis=0, block=block) - w) ** POWER
    return block_reduced(np.add, powers, 0, block)


def _zeros(w: Array, f: Format, block: int, scale: Array, start: Array) -> Array:
    """Zero points fitted in turns under given scales, rounded at the end."""
    s, count = spread(scale, w.shape, 0, block), block_reduced(np.add, np.ones_like(w), 0, block)
    zero, beta = np.asarray(start.astype(np.float32)), PENALTY
    for _ in range(TURNS):
        z = spread(zero, w.shape, 0, block)
        codes = np.clip(np.rint(w / s + z), f.low, f.high)
        rest = w - s * (codes - z)
        size = np.maximum(np.abs(rest), 1e-8)
        shrunk = np.sign(rest) * np.maximum(size - size ** (POWER - 1) / beta, 0)
        zero = np.asarray(block_reduced(np.add, codes - (w - shrunk) / s, 0, block) / count)
        beta *= GROWTH
    whole = np.clip(np.rint(zero), f.low, f.high)
    return whole.astype(np.uint8 if f.low >= 0 else np.int8).astype(f.dtype)
