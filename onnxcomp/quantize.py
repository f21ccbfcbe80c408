"""Quantized linears as graph edits: what is eligible, integer weights, and products over them; shared by every quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, formats
from onnxcomp.target import Granularity

__all__ = ["chosen", "integer_weight", "product", "quantizable"]

LAZY_BYTES = 16 << 20  # weights from this size on, when they lie in a file, become codes only when they are written or run
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def quantizable(g: Graph) -> list[Linear]:
    """Linears whose weight is stored in a float type."""
    return [x for x in blocks.linears(g) if not x.quantized and x.weight.dtype in FLOATS]


def chosen(g: Graph, skip: Iterable[str], min_size: int) -> list[Linear]:
    """Quantizable linears less those whose node or weight matches a skip pattern or is small; these are declined by name."""
    patterns, kept = tuple(skip), []
    for linear in quantizable(g):
        hit = next((p for p in patterns if any(fnmatchcase(n, p) for n in (linear.name, str(linear.weight.name)))), None)
        k, n = linear.sizes
        if hit is not None:
            g.decline(linear.site, f"skipped by the pattern '{hit}'")
        elif k * n < min_size:
            g.decline(linear.site, f"its {k}x{n} weight is smaller than min_size={min_size}: nothing to gain")
        else:
            kept.append(linear)
    return kept


class WeightCodes:
    """Integer forms of weights, one per stored tensor, so that layers sharing a weight share its codes too."""

    def __init__(self, g: Graph, granularity: Granularity, bits: int) -> None:
        self.g, self.granularity, self.bits = g, granularity, bits
        self._made: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def __call__(self, linear: Linear) -> tuple[ir.Value, ir.Value]:
        """Symmetric int8 codes `[K, N]` and their scale, `[N]` per channel or `[]`."""
        key = (linear.weight, linear.transposed)
        if key not in self._made:
            self._made[key] = self._make(linear)
        return self._made[key]

    def _make(self, linear: Linear) -> tuple[ir.Value, ir.Value]:
        tensor, transposed = self.g.tensor(linear.weight), linear.transposed
        assert tensor is not None
        weight = _oriented(tensor.numpy(), transposed)
        axes = 0 if self.granularity == "channel" else None
        scale = formats.symmetric_scale(np.abs(weight).max(axis=axes), self.bits)
        stem = str(linear.weight.name)
        codes: Array | ir.LazyTensor
        if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) and tensor.nbytes >= LAZY_BYTES:
            codes = ir.LazyTensor(
                lambda: ir.tensor(_codes(_oriented(tensor.numpy(), transposed), scale, self.bits)),
                dtype=ir.DataType.INT8,
                shape=ir.Shape(weight.shape),
            )
        else:
            codes = _codes(weight, scale, self.bits)
        put = self.g.constant
        return put(codes, f"{stem}_int8"), put(scale.astype(weight.dtype), f"{stem}_scale")


def integer_weight(codes: WeightCodes, linear: Linear) -> ir.Value:
    """The dequantized weight `[K, N]` as a value: int8 codes behind DequantizeLinear."""
    q, scale = codes(linear)
    axis = 1 if codes.granularity == "channel" else None
    return codes.g.op("DequantizeLinear", q, scale, axis=axis, name=f"{linear.name}_weight", like=linear.weight if not linear.transposed else None)


def product(g: Graph, linear: Linear, x: ir.Value, w: ir.Value) -> None:
    """Make a linear read `x @ w`, `w` being `[K, N]`; a Gemm becomes MatMul and Add, which keep integer products."""
    if linear.node.op_type == "MatMul":
        g.set_input(linear.node, 0, x)
        g.set_input(linear.node, 1, w)
        return
    y = g.op("MatMul", x, w, name=f"{linear.name}_product", like=linear.output)
    if linear.bias is not None:
        y = g.op("Add", y, linear.bias, name=f"{linear.name}_bias", like=linear.output)
    g.replace(linear.output, y)


def _oriented(weight: Array, transposed: bool) -> Array:
    return weight.T if transposed else weight


def _codes(weight: Array, scale: Array, bits: int) -> Array:
    limit = 2 ** (bits - 1) - 1
    codes: Array = np.clip(np.rint(weight.astype(np.float32) / scale.astype(np.float32)), -limit, limit).astype(np.int8)
    return codes
