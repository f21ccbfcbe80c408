"""Inputs of integer products as 8-bit codes with a static range, shared by every quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, formats, int8_error
from onnxcomp.maths.clipping import Clip, clip_range
from onnxcomp.maths.int8_error import Range
from onnxcomp.methods.quantize import linears
from onnxcomp.methods.quantize.covered import values_covered
from onnxcomp.methods.repair.readers import numbers
from onnxcomp.stats import Need, Stats, histogram, sample

__all__ = ["InputCodes"]

ROWS = 512  # of an input, by which a range is judged at the outputs: of 256 the best ones were narrower than of all


@dataclass(frozen=True)
class InputCodes:
    """How values become codes: their type (u8 or s8), the zero point, the rule of their range.

    Of `silent` channels, by value, nothing depends on what they hold, so that no range covers them.
    """

    signed: bool
    symmetric: bool
    clip: Clip | Literal["output"]
    percentile: float
    silent: dict[ir.Value, tuple[int, ...]]

    @property
    def _type(self) -> str:
        return "int8" if self.signed else "uint8"

    def need(self, x: ir.Value) -> Need:
        """The histogram that the range of a value follows from."""
        return histogram(x, without=self.silent.get(x, ()))

    def needs(self, x: ir.Value) -> list[Need]:
        """All that the range of a linear's input follows from."""
        return [self.need(x), *([sample(x, ROWS)] if self.clip == "output" else [])]

    def _range(self, g: Graph, x: ir.Value, stats: Stats, readers: Sequence[Linear], fmt: str) -> Range:
        """The range of a value, by the outputs of its readers where there are any and that is asked for."""
        rule, counts = "mse" if self.clip == "output" else self.clip, stats[self.need(x)]
        found = clip_range(counts, method=rule, bits=8, symmetric=self.symmetric, percentile=self.percentile)
        if self.clip == "output" and readers:
            most = clip_range(counts, method="minmax", symmetric=self.symmetric)
            rows = np.array(stats[sample(x, ROWS)], np.float32)
            rows[:, list(self.silent.get(x, ()))] = 0
            weights = [_weight(g, linear) for linear in readers]
            return int8_error.best_range(rows, weights, found, most, fmt, symmetric=self.symmetric)
        return found

    def pair(
        self, g: Graph, x: ir.Value, stats: Stats, readers: Sequence[Linear] = (), *, wide: bool = False
    ) -> ir.Value:
        """Codes of a value and back; `wide` gives float32 for a half-precision value."""
        scale, zero = self.constants(g, x, stats, readers, wide=wide)
        site = readers[0].name if readers else str(x.name)
        values_covered(g, site, str(x.name), stats[self.need(x)], scale, zero, formats.FORMATS[self._type])
        return self.coded(g, linears.in_float32(g, x) if wide else x, scale, zero)

    def constants(
        self, g: Graph, x: ir.Value, stats: Stats, readers: Sequence[Linear] = (), *, wide: bool = False
    ) -> tuple[Array, Array]:
        """Scale and zero point of a value; `wide` gives a float32 scale for a half-precision value."""
        fmt = self._type
        low, high = self._range(g, x, stats, readers, fmt)
        dtype = x.dtype.numpy() if x.dtype and not (wide and x.dtype in linears.HALVES) else np.dtype(np.float32)
        return formats.affine(low, high, fmt, symmetric=self.symmetric, scale_type=dtype)

    @staticmethod
    def coded(g: Graph, x: ir.Value, scale: Array, zero: Array) -> ir.Value:
        """Codes of a value and back, by scale and zero point."""
        s, z = g.constant(scale, f"{x.name}_scale"), g.constant(zero, f"{x.name}_zero")
        q = g.op("QuantizeLinear", x, s, z, name=f"{x.name}_quantize")
        return g.op("DequantizeLinear", q, s, z, name=f"{x.name}_dequantize", like=x)

    def codes(self, g: Graph, x: ir.Value, stats: Stats) -> Sequence[ir.Value]:
        """Codes of a value, their scale and zero point, in float32."""
        pair = self.pair(g, x, stats, wide=x.dtype in linears.HALVES).producer()
        return [v for v in pair.inputs if v is not None] if pair is not None else []


def _weight(g: Graph, x: Linear) -> Array:
    """The weight of a linear `[K, N]` as float32, thinned."""
    w = numbers(g, x.weight)
    assert w is not None
    return np.asarray(int8_error.thinned(w.T if x.transposed else w), np.float32)
