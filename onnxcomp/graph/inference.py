"""Shapes and types of values, as far as ONNX's own inference can tell them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils

from onnxcomp.errors import ModelError

__all__ = ["check_recorded", "infer_shapes"]

LONGEST = 1 << 24  # elements of an axis: more than any sequence or table has
ENDLESS = (1 << 63) - (1 << 16)  # from here on a number stands for "to the end", as in slices
ENDS = {(1 << 31) - 1, 1 << 31, (1 << 32) - 1}  # which stand for it as well
MAX_ELEMENTS = 64  # of a constant that may hold sizes


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
    """Sizes are followed through arithmetic, but not where a Range of them would be written out by the billion."""
    follow = not (_has_range(proto.graph) and _has_huge_size(proto.graph))
    return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=follow)


def _has_range(graph: onnx.GraphProto) -> bool:
    return any(n.op_type == "Range" or any(_has_range(a.g) for a in n.attribute if a.HasField("g")) for n in graph.node)


def _has_huge_size(graph: onnx.GraphProto) -> bool:
    """Whether a size that is known, or a small constant that may be one, is larger than that of any real axis."""
    declared = (*graph.input, *graph.output, *graph.value_info)
    if any(d.dim_value > LONGEST for v in declared for d in v.type.tensor_type.shape.dim):
        return True
    sizes: list[int] = []
    constants = [a.t for n in graph.node if n.op_type in ("Constant", "ConstantOfShape") for a in n.attribute]
    for t in (*graph.initializer, *constants):
        sizes += t.dims
        if t.data_type == onnx.TensorProto.INT64 and len(t.raw_data) <= 8 * MAX_ELEMENTS:
            sizes += t.int64_data[:MAX_ELEMENTS]
            sizes += np.frombuffer(t.raw_data[: len(t.raw_data) // 8 * 8], np.int64).tolist()
    sizes += [a.i for n in graph.node if n.op_type == "Constant" for a in n.attribute]
    return any(LONGEST < size < ENDLESS and size not in ENDS for size in sizes)


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
