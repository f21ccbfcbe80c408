"""Scales of int8 weights whose products with 8-bit inputs cannot saturate where pairs of them are added in 16 bits.

Without VNNI, x86 multiplies unsigned by signed bytes and adds the products of input channels (0, 1), (2, 3), ... in a
saturating int16 (`vpmaddubsw`), whatever the number of rows and with the raw input codes, before their zero point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxcomp.maths import Array
from onnxcomp.maths.formats import Format, Quantized, affine, quantize

__all__ = ["PAIR_LIMIT", "breaks", "mended", "nearest", "pair_sums", "room", "scales"]

# Largest sum of a pair's weight codes of one sign: 255 * 128 = 32640 < 2**15, 255 * 129 = 32895 is not.
PAIR_LIMIT = 128
# Two codes are rounded up by 0.5 each at most, so a pair of 127.9 steps stays below 129, and a whole number is <= 128.
PAIR_STEPS = 127.9
# Scales stored in half types may be rounded down, which moves codes up: they grow by this until no pair saturates.
GROWTH = 1.004
CHUNK = 1 << 20  # elements of a weight that are examined at a time, to bound the memory of wide layers


def pair_sums(w: Array) -> Array:
    """Per column of `[K, N]` the largest sum of one sign over rows (0, 1), (2, 3), ...; an odd last row is alone."""
    wide = w.astype(np.int16 if w.dtype.kind in "iu" else np.float64)
    pairs = len(wide) // 2 * 2
    largest = np.zeros(wide.shape[1], wide.dtype)
    for sign in (1, -1):
        part = np.maximum(sign * wide, 0)
        for sums in (part[:pairs:2] + part[1:pairs:2], part[pairs:]):
            largest = np.maximum(largest, sums.max(axis=0, initial=0))
    return largest


def breaks(codes: Array) -> Array:
    """Which columns of int8 codes `[K, N]` have a pair whose products with bytes could saturate: bools `[N]`."""
    return np.concatenate([pair_sums(codes[:, c]) > PAIR_LIMIT for c in _chunks(codes, np.arange(codes.shape[1]))])


def mended(codes: Array) -> Array:
    """Int8 codes `[K, N]` that obey `PAIR_LIMIT`: both of a pair of one sign that breaks it move towards zero."""
    q = codes.astype(np.int16)
    pairs = len(q) // 2 * 2
    first, second = q[:pairs:2], q[1:pairs:2]
    for sign in (1, -1):
        both = (sign * first > 0) & (sign * second > 0)
        over = np.where(both, np.maximum(sign * (first + second) - PAIR_LIMIT, 0), 0)
        larger = np.where(np.abs(first) >= np.abs(second), (over + 1) // 2, over // 2)  # an odd unit from the larger
        first -= (sign * larger).astype(np.int16)
        second -= (sign * (over - larger)).astype(np.int16)
    return q.astype(codes.dtype)


def room(partner: Array) -> tuple[Array, Array]:
    """The least and largest code beside another one of the pair."""
    return -PAIR_LIMIT - np.minimum(partner, 0), PAIR_LIMIT - np.maximum(partner, 0)


def nearest(w: Array, fmt: Format, *, scale_type: Any = np.float32) -> Quantized:
    """`[K, N]` rounded to nearest with one scale per column, all obeying `PAIR_LIMIT`."""
    scale, zero = scales(w, fmt, axis=1, scale_type=scale_type)
    return Quantized(quantize(w, scale, zero, fmt, axis=1), scale, zero, 1)


def scales(w: Array, fmt: Format, *, axis: int | None, scale_type: Any = np.float32) -> tuple[Array, Array]:
    """Symmetric scale and zero point of `[K, N]`, per column (`axis=1`, `[N]`) or one, whose codes obey `PAIR_LIMIT`.

    Raises `DataError` for weights that are not finite.
    """
    limit = np.concatenate([_limits(w[:, c], fmt) for c in _chunks(w, np.arange(w.shape[1]))])
    if axis is None:
        limit = np.full_like(limit, limit.max())
    pending = np.arange(w.shape[1])
    while pending.size:  # ends: codes only shrink as scales grow
        scale, zero = affine(-limit, limit, fmt, symmetric=True, scale_type=scale_type)
        pending = np.concatenate(
            [c[breaks(quantize(w[:, c], scale[c], zero[c], fmt, axis=1))] for c in _chunks(w, pending)]
        )
        if pending.size:
            limit[slice(None) if axis is None else pending] *= GROWTH
    return (scale[0], zero[0]) if axis is None else (scale, zero)


def _limits(w: Array, fmt: Format) -> Array:
    """Per column the number that gets the largest code: its largest weight, or more where a pair needs it."""
    return np.asarray(np.maximum(np.abs(w).max(axis=0).astype(np.float64), pair_sums(w) / PAIR_STEPS * fmt.high))


def _chunks(w: Array, columns: Array) -> Iterator[Array]:
    size = max(1, CHUNK // len(w))
    return (columns[i : i + size] for i in range(0, len(columns), size))
