"""Quantized linears, integer products and weights that can saturate, counted in a graph without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.graph.values import untransposed
from onnxcomp.maths import Array
from onnxcomp.maths.saturation import breaks

__all__ = ["counted", "dequantized_weights", "integer_products", "quantized_linears", "saturating"]

INTEGER_PRODUCTS = {
    "MatMulInteger": "",
    "QLinearMatMul": "",
    "MatMulIntegerToFloat": CONTRIB,
    "DynamicQuantizeMatMul": CONTRIB,
    "MatMulNBits": CONTRIB,
    "QGemm": CONTRIB,
    "QAttention": CONTRIB,
}
# The index of the weight `[K, N]` among the inputs of an integer product.
WEIGHT_AT = {
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QGemm": 3,
    "QAttention": 1,
}
BLOCKS_OF = {8: (16, 32, 64, 128, 256, 512), 4: (16, 32, 64, 128, 256, 512), 2: (32, 64, 128)}
INT8_INPUTS = 4  # the accuracy level of MatMulNBits at which inputs are rounded to 8 bits
LAYOUT_OPS = ("Transpose", "Reshape", "Cast", "Identity")


def quantized_linears(model: ir.Model) -> int:
    """Number of linears with a quantized constant weight: MatMul or Gemm of a DequantizeLinear, or integer products."""
    return sum(_is_quantized_linear(n) or _is_integer_product(n) for n in _nodes(model))


def integer_products(model: ir.Model) -> int:
    """Number of nodes that multiply integers with a constant weight; products of two activations do not count."""
    return sum(_is_integer_product(n) for n in _nodes(model))


def dequantized_weights(model: ir.Model) -> list[str]:
    """Names of constant matrices that are dequantized on every run, also inside a product that lacks a kernel."""
    apart = [n.inputs[0] for n in _nodes(model) if n.op_type == "DequantizeLinear" and _is_integer_matrix(n.inputs[0])]
    inside = [n.inputs[1] for n in _nodes(model) if n.op_type == "MatMulNBits" and not _has_kernel(n)]
    return [str(v.name) for v in (*apart, *inside) if v is not None]


def _has_kernel(node: ir.Node) -> bool:
    """Whether a CPU multiplies by the codes of a MatMulNBits (ONNX Runtime 1.32, seen by timing every combination).

    The others dequantize the whole weight at every run, 100 times slower.
    """
    bits, block, level = (
        node.attributes.get_int(k, d) for k, d in (("bits", 4), ("block_size", 0), ("accuracy_level", 0))
    )
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    if zero is not None and zero.dtype is not ir.DataType.UINT8:
        return False
    return block in BLOCKS_OF.get(bits, ()) and (bits == 4 or level == INT8_INPUTS)


def saturating(model: ir.Model, source: ir.Model | None = None) -> list[str]:
    """Names of constant s8 weights of products with u8 inputs whose 16-bit sums along K can saturate.

    See `maths.saturation`. A weight that `source` has too, by name or with the same columns, does not count.
    """
    known_names, known_columns = _known_weights(source)
    saturated = []
    for v, codes in _weights(model):
        columns = _saturating_columns(codes)
        if columns and v.name not in known_names and not columns <= known_columns:
            saturated.append(str(v.name))
    return list(dict.fromkeys(saturated))


def _known_weights(model: ir.Model | None) -> tuple[set[str], set[bytes]]:
    """Names of all constant s8 matrices of a model, and the bytes of their columns that can saturate."""
    if model is None:
        return set(), set()
    names = {str(v.name) for n in _nodes(model) for v in n.inputs if _is_s8_matrix(v) and v is not None}
    return names, {c for _, codes in _weights(model) for c in _saturating_columns(codes)}


def _saturating_columns(codes: Array) -> set[bytes]:
    """The bytes of the columns of `[K, N]` codes that can saturate."""
    return {c.tobytes() for c in codes[:, breaks(codes)].T}


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, Array]]:
    """Constant s8 weights of products with u8 inputs, with their codes as `[K, N]`."""
    for node in _nodes(model):
        at = WEIGHT_AT.get(node.op_type) if INTEGER_PRODUCTS.get(node.op_type) == node.domain else None
        if at is not None and at < len(node.inputs):
            x, w = node.inputs[0], node.inputs[at]
            transposed = node.op_type == "QGemm" and node.attributes.get_int("transB", 0) == 1
        elif _is_quantized_linear(node):
            (x, _), (w, transposed) = (_codes(v) for v in node.inputs[:2])
            transposed ^= node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        else:
            continue
        if w is None or not _is_s8_matrix(w) or x is None or _is_signed(x):
            continue
        stored = untransposed(w)
        codes = np.asarray(Graph.tensor(stored).numpy())  # type: ignore[union-attr]
        transposed ^= stored is not w
        for matrix in codes.reshape(-1, *codes.shape[-2:]):
            yield w, matrix.T if transposed else matrix


def _codes(v: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The codes behind a dequantized matrix (None if it is none), and whether they are transposed on the way."""
    transposed = False
    node = v.producer() if v is not None else None
    while node is not None and node.op_type in LAYOUT_OPS:
        transposed ^= node.op_type == "Transpose"
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return (node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None), transposed


def _is_signed(codes: ir.Value) -> bool:
    """Whether the codes of an input are s8, by the type of their zero point first (values in files may lack types)."""
    quantize = codes.producer()
    zero_point = (
        quantize.inputs[2]
        if quantize is not None and quantize.op_type == "QuantizeLinear" and len(quantize.inputs) > 2
        else codes
    )
    return zero_point is not None and (zero_point.dtype or codes.dtype) is ir.DataType.INT8


def _is_s8_matrix(v: ir.Value | None) -> bool:
    w = untransposed(v)
    return _is_integer_matrix(v) and w is not None and w.dtype is ir.DataType.INT8


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from graph


def _is_integer_matrix(v: ir.Value | None) -> bool:
    """Whether a value is a constant matrix of integers of at most 8 bits."""
    t = Graph.tensor(untransposed(v))
    return t is not None and t.dtype.is_integer() and t.dtype.bitwidth <= 8 and len(t.shape) >= 2


def _is_integer_product(node: ir.Node) -> bool:
    return INTEGER_PRODUCTS.get(node.op_type) == node.domain and any(_is_integer_matrix(v) for v in node.inputs)


def _is_quantized_linear(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or len(node.inputs) < 2:
        return False
    v = node.inputs[1]
    source = v.producer() if v is not None else None
    while source is not None and source.op_type in LAYOUT_OPS:
        v = source.inputs[0]
        source = v.producer() if v is not None else None
    return source is not None and source.op_type == "DequantizeLinear" and _is_integer_matrix(source.inputs[0])


def counted(weights: Sequence[str]) -> str:
    """Weights as the subject of a sentence: how many there are, and one by name."""
    return f"weight '{weights[0]}' is" if len(weights) == 1 else f"{len(weights)} weights, such as '{weights[0]}', are"
