"""Rounding of weights to few bits by Gram matrices: weighted clipping, GPTQ, coordinate descent, refitted scales.

Layout of ONNX's MatMul: `y = x W`, `W [K, N]`, `G = X^T X` over the calibration rows. The squared error of weights `V`
in place of `W` is `tr((V - W)^T G (V - W))`: out-channels (columns) are independent, and are done `COLUMNS` at a time,
on all cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import LAZY, Array, Float64, saturation
from onnxcomp.maths.formats import Format, Quantized, fit, format_of, quantize, spread
from onnxcomp.maths.solve import error, inverse_factor, symmetrized

__all__ = ["GPTQ_DAMP", "Rounded", "Visit", "round_weights"]

GPTQ_DAMP = 0.01  # of the GPTQ paper: spreads errors less over in-channels that the calibration data hardly shows
COLUMNS = 256  # out-channels at a time, on any machine: bounds the float64 copies of a weight
DESCENTS = 2  # sweeps of coordinate descent before scales are refitted: more change few codes under the same scales
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
    upper: Float64
    damp: float

    @classmethod
    def of(cls, gram: Float64, damp: float, act_order: bool = True) -> Visit:
        """By falling diagonal of the Gram matrix (`act_order`), or as they stand."""
        order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
        dead = np.diag(gram) <= 0
        upper, used = inverse_factor(
            np.where(np.eye(len(gram), dtype=bool) & dead, 1.0, gram)[np.ix_(order, order)], damp
        )
        return cls(order, upper, used)


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
    channels one by one, each error spread over the later ones (GPTQ, arXiv 2210.17323); then `refits` times coordinate
    descent on the codes and least-squares scales (two-stage grid optimization, arXiv 2602.02126). All of it with the
    damped Gram matrix, since with few rows the plain one says little of other data. `limited` codes of out-channels
    obey `saturation.PAIR_LIMIT`; `full_range` as in `formats.fit`. Law: no out-channel's error on the calibration data
    is larger than by rounding to nearest.
    """
    f, w = format_of(fmt), np.asarray(weights)
    g = symmetrized(gram)
    if w.ndim != 2 or w.shape[0] != len(g):
        raise DataError(f"weights of shape {list(w.shape)} do not fit a Gram matrix of {len(g)} in-channels")
    visit = Visit.of(g, damp, act_order)
    stiff = g + visit.damp * float(np.diag(g).mean()) * np.eye(len(g))
    importance = np.diag(g)[:, None] if clip and np.diag(g).any() else 1.0

    def part(columns: slice) -> _Columns:
        w_part = w[:, columns].astype(np.float64)
        nearest = saturation.nearest(w_part, f, scale_type=scale_type) if limited else fit(
            w_part, f, axis=0 if block else 1, block=block, symmetric=symmetric, mse=clip,
            scale_type=scale_type, importance=importance, full_range=full_range,
        )  # fmt: skip
        legal = saturation.mended if limited else np.asarray
        best = _Columns(stiff, w_part, nearest)
        best.take(legal(sweep(visit, w_part, nearest, f)), nearest.scale)
        for _ in range(refits):
            for _ in range(DESCENTS):
                best.take(legal(descend(stiff, w_part, best.quantized, f)), best.quantized.scale)
            best.take(best.quantized.codes, refit_scales(stiff, w_part, best.quantized))
        final = _Columns(g, w_part, nearest)
        final.take(best.quantized.codes, best.quantized.scale)
        return final

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts = list(pool.map(part, _chunks(w.shape[1])))
    loss = float(sum(p.losses.sum() for p in parts))
    nearest_loss = float(sum(p.nearest_losses.sum() for p in parts))
    return Rounded(_joined([p.quantized for p in parts]), loss, nearest_loss, visit.damp)


def _chunks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + COLUMNS, n)) for i in range(0, n, COLUMNS))


def _joined(parts: list[Quantized]) -> Quantized:
    """Columns together again: scales and zero points are `[N]`, or `[blocks, N]`."""
    first = parts[0]
    codes = np.concatenate([p.codes for p in parts], axis=1)
    scale, zero = (np.concatenate([getattr(p, k) for p in parts], axis=-1) for k in ("scale", "zero"))
    return Quantized(codes, scale, zero, first.axis, first.block)


class _Columns:
    """The best codes and scales so far of some out-channels, by their error; each out-channel keeps its own best."""

    def __init__(self, g: Float64, w: Float64, nearest: Quantized) -> None:
        self.g, self.w, self.quantized = g, w, nearest
        self.nearest_losses = self.losses = error(g, _numbers(nearest) - w)

    def take(self, codes: Array, scale: Array) -> None:
        """Take codes and scales where they err less."""
        old = self.quantized
        new = Quantized(codes, scale, old.zero, old.axis, old.block)
        losses = error(self.g, _numbers(new) - self.w)
        better = losses < self.losses
        self.losses = np.where(better, losses, self.losses)
        self.quantized = Quantized(
            np.where(better, codes, old.codes), np.where(better, scale, old.scale), old.zero, old.axis, old.block
        )


def _numbers(q: Quantized) -> Float64:
    """What the codes stand for, float64."""
    scale, zero = _spread(q)
    return (q.codes.astype(np.float64) - zero) * scale


def _spread(q: Quantized) -> tuple[Float64, Float64]:
    """Scales and zero points of every weight, `[K, N]`."""
    shape = q.codes.shape
    s, z = (np.broadcast_to(spread(p, shape, q.axis, q.block), shape).astype(np.float64) for p in (q.scale, q.zero))
    return s, z


def sweep(visit: Visit, w: Float64, scales: Quantized, f: Format) -> Array:
    """GPTQ's codes of all in-channels in the order of the visit, `[K, N]`, under given scales."""
    order, upper = visit.order, visit.upper
    k, n = w.shape
    scale, zero = (a[order] for a in _spread(scales))
    rest = w[order]
    codes = np.zeros((k, n), f.dtype)
    for start in range(0, k, LAZY):
        end = min(start + LAZY, k)
        errors = np.zeros((end - start, n))
        for i in range(start, end):
            q = quantize(rest[i], scale[i], zero[i], f)
            e = (rest[i] - (q.astype(np.float64) - zero[i]) * scale[i]) / upper[i, i]
            rest[i + 1 : end] -= np.outer(upper[i, i + 1 : end], e)
            codes[i], errors[i - start] = q, e
        rest[end:] -= upper[start:end, end:].T @ errors
    unordered = np.empty_like(codes)
    unordered[order] = codes
    return unordered


def descend(g: Float64, w: Float64, start: Quantized, f: Format) -> Array:
    """One sweep of coordinate descent: each code in turn becomes the best for all others as they are, `[K, N]`.

    `E = G (W - Q)`; code i moves to the grid point nearest to `q_i + E_i / G_ii`, which is never worse.
    """
    scale, zero = _spread(start)
    q = _numbers(start)
    rest = g @ (w - q)
    codes = start.codes.copy()
    for a in range(0, len(g), LAZY):
        b = min(a + LAZY, len(g))
        here, moved = rest[a:b].copy(), np.zeros((b - a, w.shape[1]))
        for i in range(a, b):
            if g[i, i] <= 0:
                continue
            codes[i] = quantize(q[i] + here[i - a] / g[i, i], scale[i], zero[i], f)
            moved[i - a] = q[i] - (codes[i].astype(np.float64) - zero[i]) * scale[i]
            here[i - a + 1 :] += np.outer(g[i + 1 : b, i], moved[i - a])
        rest += g[:, a:b] @ moved
    return codes


def refit_scales(g: Float64, w: Float64, q: Quantized) -> Array:
    """Scales of least squared error for fixed codes, one block of in-channels after the other, in the shape they have.

    For a block's codes less their zero points `c`: `s += c^T [G (W - Q)] / (c^T G c)`.
    """
    block = q.block or len(g)
    scale = np.array(q.scale.reshape(-1, w.shape[1]), np.float64)
    whole = q.codes.astype(np.float64) - _spread(q)[1]
    rest = g @ (w - _numbers(q))
    for i, a in enumerate(range(0, len(g), block)):
        rows = slice(a, a + block)
        c = whole[rows]
        curvature = np.einsum("kn,kn->n", c, g[rows, rows] @ c)
        gain = np.einsum("kn,kn->n", c, rest[rows])
        step = np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
        step = np.where((scale[i] + step) / scale[i] < LEAST_SCALE, 0.0, step)  # scales may be negative
        scale[i] += step
        rest -= g[:, rows] @ (c * step)
    return np.asarray(scale.reshape(q.scale.shape).astype(q.scale.dtype))
