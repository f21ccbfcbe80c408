"""Rounding of weights to few bits by Gram matrices: weighted clipping, GPTQ, coordinate descent, refitted scales.

Layout of ONNX's MatMul: `y = x W`, `W [K, N]`, `G = X^T X` over the calibration rows. The squared error of weights `V`
in place of `W` is `tr((V - W)^T G (V - W))`: out-channels (columns) are independent, and are done `COLUMNS` at a time,
on all cores. Codes and scales are searched in float32, whose noise is far below a step of the codes; factors of the
Gram matrix and errors are float64.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import LAZY, Array, Float32, Float64, saturation
from onnxcomp.maths.block_search import search_blocks
from onnxcomp.maths.formats import Format, Quantized, fit, format_of
from onnxcomp.maths.grid import Grid
from onnxcomp.maths.solve import error, inverse_factor, symmetrized

__all__ = ["GPTQ_DAMP", "Rounded", "Visit", "joined", "round_weights"]

GPTQ_DAMP = 0.01  # of the GPTQ paper: spreads errors less over in-channels that the calibration data hardly shows
COLUMNS = 512  # out-channels at a time at most, on any machine: bounds the copies of a weight that are made
SPAN = 64  # in-channels of coordinate descent between two products with the whole Gram matrix
DESCENTS = 2  # sweeps of coordinate descent before scales are refitted: more change few codes under the same scales
SEARCHED_BITS = 4  # at 8 bits another scale changes next to nothing
LEAST_SCALE = 0.2  # a refitted scale below this share of the old one would leave most codes at their limits


@dataclass(frozen=True)
class Rounded:
    """Quantized weights, their squared error on the calibration data, that of rounding to nearest, and the damping."""

    quantized: Quantized
    loss: float
    rounding_loss: float
    damp: float


@dataclass(frozen=True)
class Visit:
    """The order in which in-channels are rounded, and `U` with `U^T U = G^-1` in that order (GPTQ, step 2)."""

    order: Array
    upper: Float32
    damp: float

    @classmethod
    def of(cls, gram: Float64, damp: float, act_order: bool = True) -> Visit:
        """By falling diagonal of the Gram matrix (`act_order`), or as they stand."""
        order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
        sorted_ = gram[np.ix_(order, order)]
        diagonal = np.einsum("ii->i", sorted_)
        diagonal[diagonal <= 0] = 1.0
        upper, used = inverse_factor(sorted_, damp, overwrite=True)
        return cls(order, upper.astype(np.float32), used)


def round_weights(
    gram: Array,
    weights: Array,
    fmt: Format | str = "int4",
    *,
    block: int = 0,
    symmetric: bool = True,
    clip: bool = True,
    damp: float = GPTQ_DAMP,
    act_order: bool = True,
    refits: int = 0,
    scale_type: Any = np.float32,
    limited: bool = False,
    full_range: bool = False,
) -> Rounded:
    """Weights `[K, N]` as codes with one scale per out-channel, or per `block` in-channels of one, at least error.

    Scales first ("static groups", with `clip` shrunk where that errs less, weighted by the inputs' squares), then in-
    channels one by one, each error spread over the later ones (GPTQ, arXiv 2210.17323); then `refits` times a search
    of each block (`block_search`), coordinate descent on the codes and least-squares scales (two-stage grid
    optimization, arXiv 2602.02126). All of it with the
    damped Gram matrix, since with few rows the plain one says little of other data. `limited` codes of out-channels
    obey `saturation.PAIR_LIMIT`; `full_range` as in `formats.fit`. Law: no out-channel's error on the calibration data
    is larger than by rounding to nearest.
    """
    f, w = format_of(fmt), np.asarray(weights)
    g = symmetrized(gram)
    if w.ndim != 2 or w.shape[0] != len(g):
        raise DataError(f"weights of shape {list(w.shape)} do not fit a Gram matrix of {len(g)} in-channels")
    visit = Visit.of(g, damp, act_order)
    more = visit.damp * float(np.diag(g).mean())
    stiff = g.astype(np.float32)
    stiff.reshape(-1)[:: len(g) + 1] += np.float32(more)
    importance = np.diag(g)[:, None] if clip and np.diag(g).any() else 1.0
    searched = 0 < block <= LAZY and f.integer and f.bits <= SEARCHED_BITS

    def part(columns: slice) -> tuple[Quantized, float, float]:
        wide, w_part = w[:, columns].astype(np.float64), w[:, columns].astype(np.float32)
        nearest = saturation.nearest(w_part, f, scale_type=scale_type) if limited else fit(
            w_part, f, axis=0 if block else 1, block=block, symmetric=symmetric, mse=clip,
            scale_type=scale_type, importance=importance, full_range=full_range,
        )  # fmt: skip
        codes = sweep(visit, w_part, nearest, f)
        found = dataclasses.replace(nearest, codes=saturation.mended(codes) if limited else codes)
        (least, squares), (loss, found_squares) = _errors(g, wide, nearest), _errors(g, wide, found)
        better = loss + more * found_squares < least + more * squares
        found, loss = _either(better, found, nearest), np.where(better, loss, least)
        for _ in range(refits):
            found = search_blocks(stiff, w_part, found, f, symmetric=symmetric) if searched else found
            for _ in range(DESCENTS):
                found = dataclasses.replace(found, codes=descend(stiff, w_part, found, f, limited=limited))
            found = dataclasses.replace(found, scale=refit_scales(stiff, w_part, found, f))
        loss = _errors(g, wide, found)[0] if refits else loss
        better = loss < least
        return _either(better, found, nearest), float(np.where(better, loss, least).sum()), float(least.sum())

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts, losses, least = zip(*pool.map(part, _chunks(w.shape[1])), strict=True)
    return Rounded(joined(parts), sum(losses), sum(least), visit.damp)


def _chunks(n: int) -> Iterator[slice]:
    """Columns in an even number of equal parts, for an even number of cores, of whole cache lines."""
    parts = -(-n // (2 * COLUMNS)) * 2
    size = -(-n // (16 * parts)) * 16
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Columns together again: scales and zero points are `[N]`, or `[blocks, N]`."""
    first = parts[0]
    codes = np.concatenate([p.codes for p in parts], axis=1)
    scale, zero = (np.concatenate([getattr(p, k) for p in parts], axis=-1) for k in ("scale", "zero"))
    return Quantized(codes, scale, zero, first.axis, first.block)


def _either(first: Array, a: Quantized, b: Quantized) -> Quantized:
    """Columns of `a` where `first` says so, `[N]`, else of `b`."""
    codes, scale, zero = (np.where(first, x, y) for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)))
    return dataclasses.replace(a, codes=codes, scale=scale, zero=zero)


def _errors(g: Float64, w: Float64, q: Quantized) -> tuple[Float64, Float64]:
    """Squared error of each out-channel on the calibration data, and of its weights alone, `[N]`."""
    delta = w - q.array()
    return error(g, delta), np.einsum("kn,kn->n", delta, delta)


def sweep(visit: Visit, w: Float32, scales: Quantized, f: Format) -> Array:
    """GPTQ's codes of all in-channels in the order of the visit, `[K, N]`, under given scales."""
    order, upper, grid = visit.order, visit.upper, Grid(scales, f)
    rest, codes = w.astype(np.float32)[order], np.zeros(w.shape, np.float32)
    for a in range(0, len(w), LAZY):
        b = min(a + LAZY, len(w))
        errors = np.zeros((b - a, w.shape[1]), np.float32)
        for i in range(a, b):
            k = int(order[i])
            scale = grid.scale[k // grid.block]
            codes[k] = grid.nearest(k, rest[i] / scale)
            errors[i - a] = (rest[i] - codes[k] * scale) / upper[i, i]
            rest[i + 1 : b] -= np.outer(upper[i, i + 1 : b], errors[i - a])
        rest[b:] -= upper[a:b, b:].T @ errors
    return grid.stored(codes)


def descend(g: Array, w: Array, start: Quantized, f: Format, *, limited: bool = False) -> Array:
    """One sweep of coordinate descent: each code in turn becomes the best for all others as they are, `[K, N]`.

    `E = G (W - Q)`; code i moves to the grid point nearest to `q_i + E_i / G_ii`, which is never worse. `E` is computed
    for `SPAN` in-channels when they come, from all that was moved before.
    """
    g, grid = g.astype(np.float32, copy=False), Grid(start, f)
    codes = grid.codes(start)
    delta = w.astype(np.float32) - codes * grid.spread(grid.scale, len(w))
    for a in range(0, len(g), SPAN):
        b = min(a + SPAN, len(g))
        rest = g[a:b] @ delta
        for i in range(a, b):
            if g[i, i] <= 0:
                continue
            scale = grid.scale[i // grid.block]
            new = grid.nearest(i, codes[i] + rest[i - a] / (g[i, i] * scale))
            if limited and (i ^ 1) < len(g):
                new = np.clip(new, *saturation.room(codes[i ^ 1]))
            moved = (new - codes[i]) * scale
            codes[i] = new
            delta[i] -= moved
            rest[i - a + 1 :] -= np.outer(g[i + 1 : b, i], moved)
    return grid.stored(codes)


def refit_scales(g: Array, w: Array, q: Quantized, f: Format) -> Array:
    """Scales of least squared error for fixed codes, one block of in-channels after the other, in the shape they have.

    For a block's codes less their zero points `c`: `s += c^T [G (W - Q)] / (c^T G c)`.
    """
    g, grid = g.astype(np.float32, copy=False), Grid(q, f)
    codes, scale = grid.codes(q), grid.scale
    delta = w.astype(np.float32) - codes * grid.spread(scale, len(w))
    for i, a in enumerate(range(0, len(g), grid.block)):
        rows = slice(a, a + grid.block)
        c = codes[rows]
        curvature = np.einsum("kn,kn->n", c, g[rows, rows] @ c)
        gain = np.einsum("kn,kn->n", c, g[rows] @ delta)
        step = np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
        step = np.where((scale[i] + step) / scale[i] < LEAST_SCALE, 0.0, step)  # scales may be negative
        new = (scale[i] + step).astype(q.scale.dtype).astype(np.float32)
        delta[rows] -= c * (new - scale[i])
        scale[i] = new
    return np.asarray(scale.reshape(q.scale.shape).astype(q.scale.dtype))
