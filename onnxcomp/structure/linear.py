"""Linears as MatMul with a constant `[K, N]` weight and an Add; turned and packed weights become lazy views."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.structure.shapes import Facts

__all__ = ["raise_linears", "split_packed"]


def raise_linears(g: Graph) -> None:
    """Rewrite Gemm and products with a transposed constant."""
    for node in g.nodes("Gemm"):
        if node.domain == "":
            _gemm(g, node)
    for node in g.nodes("MatMul"):
        turned = node.inputs[1].producer() if node.inputs[1] is not None else None
        if turned is not None and turned.op_type == "Transpose" and node.domain == "":
            _untranspose(g, node, turned)


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
        w = turned(g, w)
    y = g.op("MatMul", x, w, like=node.outputs[0])
    g.replace(node.outputs[0], y if bias is None else g.op("Add", y, bias, like=node.outputs[0]))
    return None


def turned(g: Graph, w: ir.Value) -> ir.Value:
    """A constant matrix transposed: a lazy view if this is its only use, else a Transpose (tied weights stay one)."""
    tensor = g.tensor(w)
    if tensor is None or len(list(w.uses())) > 1 or tensor.dtype.bitwidth < 8:
        return g.op("Transpose", w, perm=[1, 0])
    rows, columns = tensor.shape.numpy()
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape([columns, rows]),
    )
    return g.constant(lazy, str(w.name))


def _untranspose(g: Graph, node: ir.Node, transpose: ir.Node) -> None:
    w = transpose.inputs[0]
    tensor = g.tensor(w)
    if w is None or tensor is None or len(tensor.shape) != 2 or len(list(w.uses())) > 1:
        return
    g.set_input(node, 1, turned(g, w))


def split_packed(g: Graph, f: Facts) -> None:
    """Give each part of a packed linear (q|k|v, gate|up) a linear of its own, over a slice of the one weight."""
    for split in g.nodes("Split"):
        x = split.inputs[0]
        rank = f.rank(x)
        if x is None or rank is None or split.domain or split.attributes.get_int("axis", 0) % rank != rank - 1:
            continue
        packed = _packed(g, x)
        widths = [(f.shape(v) or (None,))[-1] for v in split.outputs]
        sizes = [w for w in widths if isinstance(w, int)]
        if packed is not None and len(sizes) == len(widths):
            _unpack(g, split, packed, sizes)


def _packed(g: Graph, y: ir.Value) -> tuple[ir.Node, ir.Value | None] | None:
    """The product, and its bias, behind a value only one node reads."""
    node, bias = y.producer(), None
    if node is None or y.is_graph_output() or len(list(y.uses())) != 1:
        return None
    if node.op_type == "Add":
        index = next((i for i, x in enumerate(node.inputs) if g.is_constant(x)), None)
        if index is None:
            return None
        bias, product = node.inputs[index], node.inputs[1 - index]
        node = product.producer() if product is not None and len(list(product.uses())) == 1 else None
    weight = g.tensor(node.inputs[1]) if node is not None and node.op_type == "MatMul" else None
    row = g.tensor(bias)
    if node is None or weight is None or len(weight.shape) != 2 or weight.dtype.bitwidth < 8:
        return None
    return (node, bias) if row is None or tuple(row.shape.numpy()) == weight.shape.numpy()[1:] else None


def _unpack(g: Graph, split: ir.Node, packed: tuple[ir.Node, ir.Value | None], sizes: list[int]) -> None:
    product, bias = packed
    first = 0
    for out, size in zip(split.outputs, sizes, strict=True):
        y = g.op("MatMul", product.inputs[0], _columns(g, product.inputs[1], first, size), like=out)
        if bias is not None:
            y = g.op("Add", y, _columns(g, bias, first, size), like=out)
        g.replace(out, y)
        first += size


def _columns(g: Graph, v: ir.Value | None, first: int, size: int) -> ir.Value:
    """Some last-axis positions of a constant, as a lazy view."""
    tensor = g.tensor(v)
    assert tensor is not None  # checked by _packed
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy()[..., first : first + size]), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape([*tensor.shape.numpy()[:-1], size]),
    )
    return g.constant(lazy, str(v.name if v is not None else "part"))
