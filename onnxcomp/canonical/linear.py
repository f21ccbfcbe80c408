"""Linears: Gemm and transposed weights become MatMul with a constant `[K, N]` weight and an Add."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph

__all__ = ["raise_linears"]


def raise_linears(g: Graph) -> None:
    """Rewrite Gemm and products with a transposed constant."""
    for node in g.nodes("Gemm"):
        if node.domain == "":
            _gemm(g, node)
    for node in g.nodes("MatMul"):
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is not None and transpose.op_type == "Transpose" and node.domain == "":
            _untranspose(g, node, transpose)


def _gemm(g: Graph, node: ir.Node) -> None:
    x, w = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if x is None or w is None or not g.is_constant(w):
        return
    get = node.attributes.get_float
    if get("alpha", 1.0) != 1.0 or (bias is not None and get("beta", 1.0) != 1.0):
        return g.decline(node, "linear: Gemm with alpha or beta other than 1")
    if node.attributes.get_int("transA", 0):
        return g.decline(node, "linear: Gemm that transposes its input")
    if node.attributes.get_int("transB", 0):
        w = transpose_weight(g, w)
    y = g.op("MatMul", x, w, like=node.outputs[0])
    g.replace(node.outputs[0], y if bias is None else g.op("Add", y, bias, like=node.outputs[0]))
    return None


def transpose_weight(g: Graph, w: ir.Value) -> ir.Value:
    """A constant matrix transposed: lazily if it has no other use, else by a Transpose (tied weights stay one)."""
    tensor = g.tensor(w)
    if tensor is None or len(list(w.uses())) > 1 or tensor.dtype.bitwidth < 8:
        return g.op("Transpose", w, perm=[1, 0])
    rows, columns = tensor.shape.numpy()
    transposed = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape([columns, rows]),
    )
    return g.constant(transposed, str(w.name))


def _untranspose(g: Graph, node: ir.Node, transpose: ir.Node) -> None:
    w = transpose.inputs[0]
    tensor = g.tensor(w)
    if w is None or tensor is None or len(tensor.shape) != 2 or len(list(w.uses())) > 1:
        return
    g.set_input(node, 1, transpose_weight(g, w))
