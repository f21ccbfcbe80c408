"""Products of a value with itself or with another, over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.blas import cross_product
from onnxcomp.stats.statistic import Need, Of, OtherOf, Per, Stat, Statistic, finite, name_of, no_rows

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BUFFER", "cross_gram", "gram"]

BUFFER = 1024  # rows gathered before a product pays (engine.md: few rows cost the d x d output, not the product)
LARGEST = 4096  # rows in one float32 product


def gram(v: ir.Value | str, of: Of = "current") -> Need:
    """`X^T X` over rows: shape `[C, C]`, float64."""
    return Need(name_of(v), Stat("gram", "channel"), of)


def cross_gram(v: ir.Value | str, other: ir.Value | str, of: Of = "current", other_of: OtherOf = "") -> Need:
    """`X^T Y` over rows, `Y` being the value `other`, by default of the same graph: shape `[C, D]`, float64."""
    return Need(name_of(v), Stat("cross_gram", "channel", other=name_of(other), other_of=other_of), of)


class Product:
    """`X^T X`, or `X^T Y` when updated with pairs: `[C, D]`, float64, from float32 products over many rows."""

    def __init__(self) -> None:
        self.sum: Float64 | None = None
        self.buffers: list[Array] = []
        self.filled = 0

    def update(self, x: Array, extra: Array | None = None) -> None:
        xs = [x] if extra is None else [x, extra]
        for a in xs:
            finite(a)  # at once, not when the buffer is full, so that the batch can be named
        if self.filled == 0 and x.shape[0] >= BUFFER:
            return self._product(xs)
        if not self.buffers:
            self.buffers = [np.empty((BUFFER, a.shape[1]), a.dtype) for a in xs]
        start = 0
        while start < x.shape[0]:
            n = min(BUFFER - self.filled, x.shape[0] - start)
            for buffer, a in zip(self.buffers, xs, strict=True):
                buffer[self.filled : self.filled + n] = a[start : start + n]
            self.filled, start = self.filled + n, start + n
            if self.filled == BUFFER:
                self.flush()
        return None

    def flush(self) -> None:
        """Multiply what is buffered."""
        if self.filled:
            self._product([b[: self.filled] for b in self.buffers])
            self.filled = 0

    def _product(self, xs: list[Array]) -> None:
        for i in range(0, xs[0].shape[0], LARGEST):
            parts = [a[i : i + LARGEST] for a in xs]
            product = cross_product(parts[0], parts[-1])
            finite(product.diagonal() if len(xs) == 1 else product)
            if self.sum is None:
                self.sum = np.zeros(product.shape, np.float64)
            self.sum += product

    def merge(self, other: Self) -> None:
        self.flush()
        other.flush()
        if other.sum is not None:
            self.sum = other.sum.copy() if self.sum is None else self.sum + other.sum

    def result(self) -> Float64:
        self.flush()
        self.buffers = []
        if self.sum is None:
            raise no_rows()
        return self.sum


class Gram(Statistic):
    """`gram`."""

    kind: ClassVar[str] = "gram"
    per: ClassVar[tuple[Per, ...]] = ("channel",)
    degree: ClassVar[int] = 2
    noise: ClassVar[float] = 1e-6

    @classmethod
    def accumulator(cls, stat: Stat) -> Product:
        """Sums products of rows."""
        return Product()

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """The product in float64, and the rows gathered for it."""
        return int(widths[0] * widths[-1] * 8 + sum(widths) * BUFFER * 4)


class CrossGram(Gram):
    """`cross_gram`."""

    kind: ClassVar[str] = "cross_gram"
    pairs: ClassVar[bool] = True
