"""Number formats: affine integers of 8, 4 and 2 bits and fp8, and the choice of their scales.

An array is `scale * (code - zero_point)`, rounding half to even as ONNX does. A scale has one entry (per tensor), one
per index of an axis, or one per block of `block` indices of the axis (the shapes `DequantizeLinear` takes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.maths.clipping import Clip, bin_edges, clip_range

__all__ = [
    "FORMATS",
    "Clip",
    "Format",
    "Quantized",
    "affine",
    "bin_edges",
    "block_reduced",
    "cast",
    "clip_range",
    "dequantize",
    "fit",
    "format_of",
    "quantize",
    "spread",
]


# Shares of a range that are tried for the least squared error: 1 to 0.4, as in scale searches of low-bit quantizers.
SHRINK = np.arange(1.0, 0.39, -0.02)


@dataclass(frozen=True)
class Format:
    """A code type: its numpy type and the smallest and largest code."""

    name: str
    dtype: np.dtype[Any]
    low: float
    high: float

    @property
    def integer(self) -> bool:
        """Whether codes are whole numbers, which may have a zero point."""
        return "int" in self.name

    @property
    def bits(self) -> int:
        """Bits that the codes use."""
        return int(np.log2(self.high - self.low + 1)) if self.integer else 8

    def narrowed(self, bits: int) -> Format:
        """The same type with fewer bits in use."""
        if not self.integer or bits > self.bits or bits < 2:
            raise DataError(f"{self.name} cannot be used with {bits} bits")
        lost = 2 ** (self.bits - bits)
        return Format(self.name, self.dtype, self.low // lost, self.high // lost)


_ALL = (
    Format("int8", np.dtype(np.int8), -128, 127),
    Format("uint8", np.dtype(np.uint8), 0, 255),
    Format("int4", np.dtype(ml_dtypes.int4), -8, 7),
    Format("uint4", np.dtype(ml_dtypes.uint4), 0, 15),
    Format("int2", np.dtype(ml_dtypes.int2), -2, 1),
    Format("uint2", np.dtype(ml_dtypes.uint2), 0, 3),
    Format("float8e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), -448.0, 448.0),
    Format("float8e5m2", np.dtype(ml_dtypes.float8_e5m2), -57344.0, 57344.0),
)
FORMATS = {f.name: f for f in _ALL}


def format_of(fmt: Format | str) -> Format:
    """A format by name; raises `DataError`."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise DataError(f"unknown number format '{fmt}'; there are {', '.join(FORMATS)}")
    return FORMATS[fmt]


def affine(
    low: Array | float, high: Array | float, fmt: Format | str, *, symmetric: bool = False, scale_type: Any = np.float32
) -> tuple[Array, Array]:
    """Scale and zero point, each of the shape of `low`, under which `[low, high]` and zero are representable.

    Scales are normal numbers of `scale_type`: never zero, subnormal, infinite or NaN; an empty range has scale one.
    Symmetric codes, and fp8, have the zero point in the middle of the codes. Raises `DataError` for NaN or infinity.
    """
    f = format_of(fmt)
    lo, hi = np.minimum(np.asarray(low, np.float64), 0.0), np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
        raise DataError("a range to quantize is not finite")
    middle = np.ceil((f.low + f.high) / 2) if f.integer else 0.0
    if symmetric or not f.integer:
        raw = np.maximum(-lo, hi) / (f.high - middle)
    else:
        raw = (hi - lo) / (f.high - f.low)
    limits = ml_dtypes.finfo(scale_type)
    safe = np.clip(raw, float(limits.smallest_normal), float(limits.max)).astype(scale_type)
    scale = np.where(raw > 0, safe, np.ones((), scale_type)).astype(scale_type)
    if symmetric or not f.integer:
        zero = np.full(lo.shape, middle)
    else:
        zero = np.clip(np.rint(f.low - lo / scale.astype(np.float64)), f.low, f.high)
    return np.asarray(scale), cast(np.asarray(zero), f)


def cast(codes: Array, f: Format) -> Array:
    """Codes in the format's type; sub-byte types are reached through bytes."""
    if f.integer and f.dtype.itemsize == 1 and f.dtype.kind not in "iu":
        codes = codes.astype(np.uint8 if f.low >= 0 else np.int8)
    return codes.astype(f.dtype)


def spread(p: Array, shape: tuple[int, ...], axis: int | None, block: int) -> Array:
    """Scales or zero points, as numbers that broadcast against an array of `shape`."""
    p = p.astype(np.float32) if p.dtype.kind not in "f" or p.dtype.itemsize < 4 else p
    if axis is None or p.ndim == 0:
        return p
    axis %= len(shape)
    if block:
        return np.repeat(p, block, axis=axis).take(range(shape[axis]), axis=axis)
    return p.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def quantize(
    x: Array, scale: Array, zero: Array, fmt: Format | str, *, axis: int | None = None, block: int = 0
) -> Array:
    """Codes of `x`, saturating at the ends of the format; float32 in, the same codes as ONNX's QuantizeLinear."""
    f = format_of(fmt)
    x = x if x.dtype == np.float64 else x.astype(np.float32)
    scaled = x / spread(scale, x.shape, axis, block)
    if f.integer:
        scaled = np.rint(scaled) + spread(zero, x.shape, axis, block)
    return cast(np.clip(scaled, f.low, f.high), f)


def dequantize(codes: Array, scale: Array, zero: Array, *, axis: int | None = None, block: int = 0) -> Array:
    """`scale * (code - zero)`, float32 (float64 for float64 scales)."""
    numbers = codes.astype(np.float32)
    if zero.any():
        numbers = numbers - spread(zero, codes.shape, axis, block)
    return np.asarray(numbers * spread(scale, codes.shape, axis, block))


@dataclass(frozen=True)
class Quantized:
    """A constant as codes with scales and zero points."""

    codes: Array
    scale: Array
    zero: Array
    axis: int | None = None
    block: int = 0

    def array(self) -> Array:
        """The numbers that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero, axis=self.axis, block=self.block)


def block_reduced(ufunc: np.ufunc, a: Array, axis: int | None, block: int) -> Array:
    """Reduce to one number per tensor, per index of the axis, or per block of it."""
    if axis is None:
        return np.asarray(ufunc.reduce(a, axis=None))
    axis %= a.ndim
    if block:
        return np.asarray(ufunc.reduceat(a, np.arange(0, a.shape[axis], block), axis=axis))
    return np.asarray(ufunc.reduce(a, axis=tuple(i for i in range(a.ndim) if i != axis)))


def fit(
    w: Array,
    fmt: Format | str = "int8",
    *,
    axis: int | None = None,
    block: int = 0,
    symmetric: bool = True,
    mse: bool = False,
    scale_type: Any = np.float32,
    importance: Array | float = 1.0,
    full_range: bool = False,
) -> Quantized:
    """Quantize a constant by rounding to nearest; with `mse` the range of every scale is shrunk where that errs less.

    `importance`, which broadcasts against `w`, weighs squared errors: of a linear's `[K, N]` the mean squares of its
    inputs `[K, 1]`. With `full_range` symmetric scales have the sign of the extreme, negated, so that it takes the code
    `-2^(b-1)` that has no positive counterpart. Raises `DataError` for an empty, NaN or infinite constant.
    """
    f = format_of(fmt)
    if w.size == 0 or not np.isfinite(w).all():
        raise DataError("a constant to quantize is empty, NaN or infinite")
    w = w.astype(np.float32)
    low, high = block_reduced(np.minimum, w, axis, block), block_reduced(np.maximum, w, axis, block)
    best: Array | None = None
    shrink = np.ones(low.shape)
    signed = full_range and symmetric and f.low < 0 and f.integer

    def scaled(factor: Array | float) -> tuple[Array, Array]:
        scale, zero = affine(low * factor, high * factor, f, symmetric=symmetric, scale_type=scale_type)
        if not signed:
            return scale, zero
        extreme = np.where(-low > high, low, high) * factor
        return np.where(extreme == 0, scale, (extreme / f.low).astype(scale_type)).astype(scale_type), zero

    for factor in SHRINK if mse else (1.0,):
        scale, zero = scaled(factor)
        codes = quantize(w, scale, zero, f, axis=axis, block=block)
        if not mse:
            return Quantized(codes, scale, zero, axis, block)
        squares = (dequantize(codes, scale, zero, axis=axis, block=block) - w) ** 2 * importance
        error = block_reduced(np.add, squares, axis, block)
        better = np.full(error.shape, True) if best is None else error < best
        shrink = np.where(better, factor, shrink)
        best = error if best is None else np.minimum(best, error)
    scale, zero = scaled(shrink)
    return Quantized(quantize(w, scale, zero, f, axis=axis, block=block), scale, zero, axis, block)
