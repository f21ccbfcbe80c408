"""Checks of a graph's validity: topological order, names, operator schemas."""

from __future__ import annotations

import itertools

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils

from onnxcomp.errors import ModelError
from onnxcomp.graph.operators import RUNTIME_OPS, has_body

__all__ = ["names", "order", "schemas"]

UNCHECKED = "runtime"  # a domain for nodes that ONNX's checker has no schema for


def order(graph: ir.Graph) -> None:
    """Sort the nodes topologically where they are not; raises `ModelError` for a cycle.

    Looking takes a fifth of the time of sorting, which leaves a sorted graph as it is.
    """
    if _in_order(graph):
        return
    try:
        graph.sort()
    except ValueError as e:
        raise ModelError(f"the graph has a cycle: {e}") from e


def _in_order(graph: ir.Graph) -> bool:
    """Whether every node stands behind those it reads; no answer, so False, for graphs with subgraphs."""
    seen: set[ir.Node] = set()
    for node in graph:
        if has_body(node):
            return False
        for x in node.inputs:
            if x is not None and (made := x.producer()) is not None and made not in seen:
                return False
        seen.add(node)
    return True


def names(graph: ir.Graph) -> None:
    """Raise `ModelError` for a value without producer or a name that two values share."""
    uses_of_name: dict[str | None, int] = {}
    defined = {id(v) for v in itertools.chain(graph.inputs, graph.initializers.values())}
    inputs = set(graph.inputs)
    for v in itertools.chain(graph.inputs, (v for v in graph.initializers.values() if v not in inputs)):
        uses_of_name[v.name] = uses_of_name.get(v.name, 0) + 1
    for node in graph:
        for x in node.inputs:
            if x is not None and id(x) not in defined:
                raise ModelError(f"node '{node.name}' ({node.op_type}) reads '{x.name}', which has no producer")
        for v in node.outputs:
            defined.add(id(v))
            if v.name:
                uses_of_name[v.name] = uses_of_name.get(v.name, 0) + 1
    if duplicates := [n for n, count in uses_of_name.items() if count > 1]:
        raise ModelError(f"two values have the same name: {', '.join(map(str, duplicates[:3]))}")
    if undefined := [str(v.name) for v in graph.outputs if id(v) not in defined]:
        raise ModelError(f"graph output '{undefined[0]}' has no producer")


def schemas(model: ir.Model) -> None:
    """Run ONNX's checker without reading the weights; raises `ModelError`."""
    try:
        _c_api_utils.call_onnx_api(_check, model)
    except onnx.checker.ValidationError as e:
        raise ModelError(f"the graph is not valid ONNX: {e}") from e


def _check(proto: onnx.ModelProto) -> None:
    proto.graph.name = proto.graph.name or "graph"  # which loading fills in, and nobody who builds a graph misses
    # The checker would look for external tensors in the current folder; all initializers are listed as inputs here.
    inline = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    for v in (*proto.graph.input, *proto.graph.output):  # runtimes infer the ranks and types that ONNX asks for
        if not v.HasField("type"):
            v.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if v.type.HasField("tensor_type"):
            v.type.tensor_type.shape.SetInParent()
    version = next((x.version for x in proto.opset_import if x.domain == ""), 1)
    for node in proto.graph.node:
        if node.domain == "" and node.op_type in RUNTIME_OPS and not onnx.defs.has(node.op_type, version):
            node.domain = UNCHECKED
    proto.opset_import.add(domain=UNCHECKED, version=1)
    onnx.checker.check_model(proto)
