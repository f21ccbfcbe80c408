"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils

from onnxcomp.errors import ModelError

__all__ = ["check_recorded", "infer_shapes"]


def infer_shapes(model: ir.Model) -> None:
    """Record what ONNX's shape inference can tell; best effort, never fatal, weights are not read."""
    declared = [(v, v.type, v.shape) for v in model.graph.outputs]
    try:
        inferred = _c_api_utils.call_onnx_api(_infer, model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return
    _record(model.graph, inferred.graph)
    for v, kind, shape in declared:
        v.type = kind or v.type
        v.shape = shape if shape is not None else v.shape


def check_recorded(model: ir.Model) -> None:
    """Drop recorded shapes of computed values that inference contradicts, as runtimes do.

    Raises `ModelError` for a recorded type that is not what the operator gives: no runtime takes such a model.
    """
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    computed = [v for node in nodes for v in node.outputs if not v.is_graph_output()]
    recorded = [(v, v.type, v.shape) for v in computed if v.type is not None or v.shape is not None]
    if not recorded:
        return
    for v, _, _ in recorded:
        v.type = v.shape = None
    infer_shapes(model)
    for v, kind, shape in recorded:
        if kind is not None and v.type is not None and (type(kind), kind.dtype) != (type(v.type), v.type.dtype):
            raise ModelError(f"value '{v.name}' is recorded as {kind.dtype}, what computes it gives {v.type.dtype}")
        v.type = kind or v.type
        if shape is not None and (v.shape is None or _agree(shape, v.shape)):
            v.shape = shape


def _agree(a: ir.Shape, b: ir.Shape) -> bool:
    """Whether two shapes may be of one value: of one rank, no two numbers that differ."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int))


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)


def _record(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    """Types and shapes of what the nodes of a graph compute; unlike onnx-ir's pass, sequences stay sequences."""
    told = {v.name: v.type for v in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for v in node.outputs:
            kind = told.get(str(v.name))
            if kind is not None:
                v.type = ir.serde.deserialize_type_proto_for_type(kind) or v.type
                shape = ir.serde.deserialize_type_proto_for_shape(kind)
                v.shape = shape if shape is not None else v.shape
        for a in node_proto.attribute:
            if a.HasField("g"):
                _record(node.attributes[a.name].as_graph(), a.g)
