"""A copy of a graph that computes in the next wider type, to tell rounding noise of a model from a change of it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph

__all__ = ["in_wider"]

WIDER = {
    ir.DataType.FLOAT16: ir.DataType.FLOAT,
    ir.DataType.BFLOAT16: ir.DataType.FLOAT,
    ir.DataType.FLOAT: ir.DataType.DOUBLE,
}
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")  # of Cast, RandomNormal, QuantizeLinear


def in_wider(g: Graph) -> Graph | None:
    """A copy with the same interface whose half types are float32, or whose float32 is float64 where it has no half.

    None for graphs with subgraphs; whether a runtime has kernels for it shows when it is run.
    """
    if any(a.type is ir.AttributeType.GRAPH for n in g.nodes() for a in n.attributes.values()):
        return None
    twin = g.clone()
    try:
        twin.infer_shapes()
    except OnnxcompError:
        return None
    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} & {v.dtype for v in _values(twin)}
    narrow = half or {ir.DataType.FLOAT}
    outputs = [v for v in twin.outputs if v.dtype in narrow]
    types = [v.dtype for v in outputs]
    for node in list(twin.nodes()):
        _widen_attributes(twin, node, narrow)
    for v in list(_values(twin)):
        if v.dtype in narrow and v not in twin.inputs:
            _widen(v)
    for v in twin.inputs:
        if v.dtype in narrow and list(v.uses()):
            twin.replace(v, _cast(twin, v, WIDER[v.dtype]), users=[u for u, _ in v.uses()])
    for v, was in zip(outputs, types, strict=True):
        if v.dtype is not was and was is not None:
            twin.replace(v, _cast(twin, v, was))
    twin.sort()
    return twin


def _values(g: Graph) -> Iterator[ir.Value]:
    yield from g.inputs
    yield from g.model.graph.initializers.values()
    yield from (v for n in g.nodes() for v in n.outputs)


def _widen_attributes(g: Graph, node: ir.Node, narrow: set[ir.DataType]) -> None:
    for name, attribute in list(node.attributes.items()):
        if name in TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT:
            if (was := ir.DataType(attribute.as_int())) in narrow:
                g.set_attr(node, **{name: WIDER[was].value})
        elif attribute.type is ir.AttributeType.TENSOR and (t := attribute.as_tensor()).dtype in narrow:
            g.set_attr(node, **{name: _wide(t)})


def _widen(v: ir.Value) -> None:
    assert v.dtype is not None
    if v.const_value is not None:
        v.const_value = _wide(v.const_value)
    v.type = ir.TensorType(WIDER[v.dtype])


def _wide(t: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(t.numpy().astype(WIDER[t.dtype].numpy()), name=t.name)


def _cast(g: Graph, x: ir.Value, to: ir.DataType) -> ir.Value:
    out = g.op("Cast", x, to=to.value)
    out.type, out.shape = ir.TensorType(to), x.shape
    return out
