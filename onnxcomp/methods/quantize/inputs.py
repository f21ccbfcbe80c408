"""Inputs of integer products as 8-bit codes with a static range, shared by every quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.maths import formats
from onnxcomp.maths.clipping import Clip, clip_range
from onnxcomp.methods.quantize import linears
from onnxcomp.stats import Need, Stats, histogram

__all__ = ["InputCodes"]


@dataclass(frozen=True)
class InputCodes:
    """How values become codes: their type (u8 or s8), the zero point, the rule of their range.

    Of `silent` channels, by value, nothing depends on what they hold, so that no range covers them.
    """

    signed: bool
    symmetric: bool
    clip: Clip
    percentile: float
    silent: dict[ir.Value, tuple[int, ...]]

    def need(self, x: ir.Value) -> Need:
        """The histogram that the range of a value follows from."""
        return histogram(x, without=self.silent.get(x, ()))

    def pair(self, g: Graph, x: ir.Value, stats: Stats, *, wide: bool = False) -> ir.Value:
        """Codes of a value and back; `wide` gives float32 for a half-precision value."""
        fmt, symmetric, counts = "int8" if self.signed else "uint8", self.symmetric, stats[self.need(x)]
        low, high = clip_range(counts, method=self.clip, bits=8, symmetric=symmetric, percentile=self.percentile)
        x = linears.in_float32(g, x) if wide else x
        dtype = x.dtype.numpy() if x.dtype else np.dtype(np.float32)
        constants = formats.affine(low, high, fmt, symmetric=symmetric, scale_type=dtype)
        s, z = (g.constant(a, f"{x.name}_{what}") for a, what in zip(constants, ("scale", "zero"), strict=True))
        q = g.op("QuantizeLinear", x, s, z, name=f"{x.name}_quantize")
        return g.op("DequantizeLinear", q, s, z, name=f"{x.name}_dequantize", like=x)

    def codes(self, g: Graph, x: ir.Value, stats: Stats) -> Sequence[ir.Value]:
        """Codes of a value, their scale and zero point, in float32."""
        pair = self.pair(g, x, stats, wide=x.dtype in linears.HALVES).producer()
        return [v for v in pair.inputs if v is not None] if pair is not None else []
