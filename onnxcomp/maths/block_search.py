"""Another scale, zero point and codes for one block of in-channels at a time, the rest of the weights as they are.

Layout as in `rounding`: `W [K, N]`, `G = X^T X`. With `E = G (W - Q)` the error as a function of one block's weights
`v` is `(v - t)^T G_bb (v - t)` and a constant, with `t = q_b + G_bb^-1 E_b`: what GPTQ rounds, on a small Gram matrix.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from onnxcomp.maths import Array, Float32
from onnxcomp.maths.formats import Format, Quantized, cast
from onnxcomp.maths.grid import Grid
from onnxcomp.maths.solve import inverse_factor

__all__ = ["search_blocks"]

FACTORS = (0.8, 0.9, 1.0, 1.1, 1.25)  # of the scale; eleven in finer steps gain a tenth more at 2 bits
SHIFTED_BITS = 3  # other zero points are tried below 4 bits: there they gain a third of all, at 4 a tenth
GAIN = 1e-4  # of a block's error, below which it stays: more than the noise of float32


def search_blocks(g: Array, w: Array, q: Quantized, f: Format, *, symmetric: bool) -> Quantized:
    """Each block in turn under the scale, of several, that errs least with the rest as it is, or as it was.

    Law: no out-channel's error grows.
    """
    grid, shifts = Grid(q, f), (-1, 0, 1) if f.bits <= SHIFTED_BITS and not symmetric else (0,)
    codes, tries = grid.codes(q), list(itertools.product(FACTORS, shifts))
    factor, shift = (np.array(x, np.float32)[:, None] for x in zip(*tries, strict=True))
    delta = w.astype(np.float32) - codes * grid.spread(grid.scale, len(w))
    for i, a in enumerate(range(0, len(g), grid.block)):
        rows = slice(a, a + grid.block)
        if (np.diag(g)[rows] <= 0).any():
            continue
        inner = g[rows, rows]
        upper = inverse_factor(inner.astype(np.float64), 0.0)[0].astype(np.float32)
        off = upper.T @ (upper @ (g[rows] @ delta))
        target = w[rows] - delta[rows] + off
        scale = (factor * grid.scale[i]).astype(q.scale.dtype).astype(np.float32)
        zero = np.clip(grid.zero[i] + shift, f.low, f.high)
        found, losses = _in_order(upper, target, scale, f.low - zero, f.high - zero)
        best, columns = losses.argmin(axis=0), np.arange(w.shape[1])
        better = losses[best, columns] < (1 - GAIN) * np.einsum("kn,kn->n", off, inner @ off)
        codes[rows] = np.where(better, found[:, best, columns], codes[rows])
        grid.scale[i] = np.where(better, scale[best, columns], grid.scale[i])
        grid.zero[i] = np.where(better, zero[best, columns], grid.zero[i])
        delta[rows] = w[rows] - codes[rows] * grid.scale[i]
    scale, zero = grid.scale.reshape(q.scale.shape).astype(q.scale.dtype), cast(grid.zero.reshape(q.zero.shape), f)
    return dataclasses.replace(q, codes=grid.stored(codes), scale=scale, zero=zero)


def _in_order(upper: Float32, target: Float32, scale: Float32, low: Float32, high: Float32) -> tuple[Float32, Float32]:
    """Codes `[K, T, N]` of a block under each of `T` scales `[T, N]`, and their errors `[T, N]`.

    Each error is spread over the later codes; with `U^T U = G^-1` the squares of what is spread add up to the whole.
    """
    rest = np.repeat(target[:, None], len(scale), axis=1)
    codes, losses = np.empty_like(rest), np.zeros_like(scale)
    for k in range(len(rest)):
        codes[k] = np.rint(np.minimum(np.maximum(rest[k] / scale, low), high))
        error = (rest[k] - codes[k] * scale) / upper[k, k]
        losses += error * error
        rest[k + 1 :] -= upper[k, k + 1 :, None, None] * error
    return codes, losses
