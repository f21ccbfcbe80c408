"""Quantized weights in one form, `MatMul(x, DequantizeLinear(w))` with `w` of shape `[K, N]`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.values import has_one_use

__all__ = ["raise_quantized"]


def raise_quantized(g: Graph) -> None:
    """Remove a Transpose or a Reshape between DequantizeLinear and MatMul by storing the weight in the final layout."""
    for node in g.nodes("MatMul"):
        layout_op = _sole_producer(node.inputs[1]) if node.domain == "" else None
        dequantize = _sole_producer(layout_op.inputs[0]) if layout_op is not None else None
        if (
            layout_op is None
            or dequantize is None
            or dequantize.op_type != "DequantizeLinear"
            or not g.is_constant(dequantize.inputs[0])
        ):
            continue
        if len(list(dequantize.inputs[0].uses())) > 1:  # type: ignore[union-attr]
            continue  # a shared weight stays one tensor
        new = (
            _transposed(g, dequantize, layout_op)
            if layout_op.op_type == "Transpose"
            else _merged(g, dequantize, layout_op)
        )
        if new is not None:
            g.set_input(node, 1, new)


def _sole_producer(v: ir.Value | None) -> ir.Node | None:
    """The standard operator that produces a value with a single use."""
    node = v.producer() if v is not None and has_one_use(v) else None
    return node if node is not None and node.domain == "" else None


def _parts(g: Graph, dequantize: ir.Node, rank: int) -> list[ir.TensorProtocol | None] | None:
    """Weight, scale and zero point, where all are constants and the weight has `rank` axes."""
    tensors = [g.tensor(v) for v in dequantize.inputs]
    if any(t is None and v is not None for t, v in zip(tensors, dequantize.inputs, strict=True)):
        return None
    return tensors if tensors[0] is not None and len(tensors[0].shape) == rank else None


def _transposed(g: Graph, dequantize: ir.Node, layout_op: ir.Node) -> ir.Value | None:
    """A weight `[N, K]` stored as `[K, N]`; scales with two axes are transposed as well."""
    tensors = _parts(g, dequantize, 2)
    if tensors is None or list(layout_op.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return None
    parts = [
        None if t is None else _rearranged(g, t, (1, 0)) if len(t.shape) == 2 else v
        for t, v in zip(tensors, dequantize.inputs, strict=True)
    ]
    attrs = dequantize.attributes
    axis, block = 1 - attrs.get_int("axis", 1) % 2, attrs.get_int("block_size", 0) or None
    return g.op("DequantizeLinear", *parts, axis=axis, block_size=block, like=layout_op.outputs[0])


def _merged(g: Graph, dequantize: ir.Node, layout_op: ir.Node) -> ir.Value | None:
    """A weight `[K / g, g, N]` with a scale for each group and column, stored as `[K, N]` in blocks of `g`."""
    tensors, shape = _parts(g, dequantize, 3), g.tensor(layout_op.inputs[1]) if layout_op.op_type == "Reshape" else None
    if tensors is None or tensors[0] is None or tensors[1] is None or shape is None:
        return None
    groups, size, width = tensors[0].shape.numpy()
    rows = groups * size
    blocks = dequantize.attributes.get_int("block_size", 0), dequantize.attributes.get_int("axis", 1) % 3
    fits = all(t is None or t.shape.numpy() == (groups, 1, width) for t in tensors[1:])
    if not fits or blocks != (size, 1) or shape.numpy().tolist() not in ([rows, width], [-1, width], [rows, -1]):
        return None
    sizes = [(rows, width), *[(groups, width)] * (len(tensors) - 1)]
    parts = [None if t is None else _rearranged(g, t, None, s) for t, s in zip(tensors, sizes, strict=True)]
    return g.op("DequantizeLinear", *parts, axis=0, block_size=size, like=layout_op.outputs[0])


def _rearranged(g: Graph, t: ir.TensorProtocol, order: tuple[int, ...] | None, shape: tuple[int, ...] = ()) -> ir.Value:
    """A constant transposed or reshaped lazily."""
    sizes = tuple(t.shape.numpy()[i] for i in order) if order is not None else shape

    def read() -> ir.TensorProtocol:
        a = t.numpy()
        return ir.tensor(
            np.ascontiguousarray(a.transpose(order) if order is not None else a.reshape(shape)), dtype=t.dtype
        )

    return g.constant(ir.LazyTensor(read, dtype=t.dtype, shape=ir.Shape(sizes)), str(t.name or "weight"))
