"""Which linears of a graph are quantized, and which nodes are integer products: counts without a clock."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph

__all__ = ["dequantized_weights", "integer_products", "quantized_linears"]

INTEGER_PRODUCTS = {
    "MatMulInteger": "",
    "QLinearMatMul": "",
    "MatMulIntegerToFloat": CONTRIB,
    "DynamicQuantizeMatMul": CONTRIB,
    "MatMulNBits": CONTRIB,
    "QGemm": CONTRIB,
    "QAttention": CONTRIB,
}
BETWEEN = ("Transpose", "Reshape", "Cast", "Identity")


def quantized_linears(model: ir.Model) -> int:
    """Linears whose constant weight is quantized, as a dequantized MatMul or Gemm or as an integer product already."""
    return sum(_is_quantized_linear(n) or _is_integer_product(n) for n in _nodes(model))


def integer_products(model: ir.Model) -> int:
    """Nodes that multiply integers with a constant weight; products of two activations do not count."""
    return sum(_is_integer_product(n) for n in _nodes(model))


def dequantized_weights(model: ir.Model) -> list[str]:
    """Names of constant matrices that are dequantized on every run."""
    return [
        str(n.inputs[0].name)
        for n in _nodes(model)
        if n.op_type == "DequantizeLinear" and n.inputs[0] is not None and _packed(n.inputs[0])
    ]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from graph


def _packed(v: ir.Value | None) -> bool:
    """Whether a value is a constant matrix of integers of at most 8 bits."""
    t = Graph.tensor(v)
    return t is not None and t.dtype.is_integer() and t.dtype.bitwidth <= 8 and len(t.shape) >= 2


def _is_integer_product(node: ir.Node) -> bool:
    return INTEGER_PRODUCTS.get(node.op_type) == node.domain and any(_packed(v) for v in node.inputs)


def _is_quantized_linear(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or len(node.inputs) < 2:
        return False
    v = node.inputs[1]
    source = v.producer() if v is not None else None
    while source is not None and source.op_type in BETWEEN:
        v = source.inputs[0]
        source = v.producer() if v is not None else None
    return source is not None and source.op_type == "DequantizeLinear" and _packed(source.inputs[0])
