"""Emulation of bfloat16 on providers without kernels for it: a float32 copy that rounds every result to bfloat16.

For checking numbers on a CPU, never for timing: the copy is slower than the original would be.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ELEMENT_PRESERVING
from onnxcomp.runtime.payload import Model, graph_of

__all__ = ["float32_twin", "in_float32"]

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def float32_twin(model: Model, provider: str, *, files: bool = False) -> Graph | None:
    """The float32 copy of a graph (with `files`: of a file) that computes in bfloat16; None where none is needed."""
    if provider != "CPUExecutionProvider" or isinstance(model, Graph) == files:
        return None
    return in_float32(graph_of(model))


def in_float32(g: Graph) -> Graph | None:
    """A float32 copy with the same interface; None for graphs without bfloat16 constants or with subgraphs."""
    constants = any(t is not None and t.dtype is HALF for t in (g.tensor(v) for n in g.nodes() for v in n.inputs))
    if not constants or any(a.type is ir.AttributeType.GRAPH for n in g.nodes() for a in n.attributes.values()):
        return None
    twin = g.clone()
    if any(v.dtype is None for n in twin.nodes() for v in n.outputs):
        twin.infer_shapes()
    float32_values: dict[ir.Value, ir.Value] = {}
    for node in twin.nodes():
        for i, x in enumerate(node.inputs):
            if x is not None and x.dtype is HALF and (twin.is_constant(x) or x.producer() is None):
                twin.set_input(node, i, _as_float32(twin, x, float32_values))
        for v in node.outputs:
            if v.dtype is HALF:
                _round(twin, node, v)
    twin.sweep()
    twin.sort()
    return twin


def _as_float32(g: Graph, x: ir.Value, float32_values: dict[ir.Value, ir.Value]) -> ir.Value:
    """A bfloat16 constant or input as float32, which is exact; a constant is converted when it is read."""
    if x not in float32_values:
        t = g.tensor(x)
        if t is None:
            float32_values[x] = _cast(g, x, FLOAT)
        else:
            lazy = ir.LazyTensor(
                lambda: ir.tensor(t.numpy().astype("float32")), dtype=FLOAT, shape=ir.Shape(list(t.shape.numpy()))
            )
            float32_values[x] = g.constant(lazy, f"{x.name}_wide")
    return float32_values[x]


def _round(g: Graph, node: ir.Node, v: ir.Value) -> None:
    """Compute a value in float32 and round it for its users; operators that only move elements need no rounding."""
    v.type = ir.TensorType(FLOAT)
    if node.op_type == "Cast":
        g.set_attr(node, to=FLOAT.value)
    elif "value" in node.attributes:
        g.set_attr(node, value=ir.tensor(node.attributes["value"].as_tensor().numpy().astype("float32")))
    users = [u for u, _ in v.uses()]
    if v.is_graph_output():
        public = _cast(g, v, HALF)
        g.replace(v, public)
        for u, i in tuple(public.uses()):
            g.set_input(u, i, v)
    if users and node.op_type not in ELEMENT_PRESERVING:
        g.replace(v, _cast(g, _cast(g, v, HALF), FLOAT), users=users)


def _cast(g: Graph, x: ir.Value, to: ir.DataType) -> ir.Value:
    out = g.op("Cast", x, to=to.value)
    out.type, out.shape = ir.TensorType(to), x.shape
    return out
