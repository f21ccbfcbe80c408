"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils

__all__ = ["infer_shapes"]


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
