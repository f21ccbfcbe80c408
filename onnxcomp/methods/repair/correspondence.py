"""Which value of the original a value of the cut graph corresponds to."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph

__all__ = ["counterpart", "has", "reference_value"]


def has(g: Graph, name: str) -> bool:
    """Whether a model computes a value of that name."""
    try:
        return not g.is_constant(g.value(name))
    except ModelError:
        return False


def counterpart(g: Graph, original: Graph, v: ir.Value) -> str:
    """The name of the original's value that the consumers of `v` read there: behind a gap where layers were dropped.

    Looks through a norm or reshape that is the only consumer and is the same as the one behind the gap in the original.
    The value's own name where its consumers do not agree, or are new.
    """
    name = str(v.name)
    if v.is_graph_output() or not has(original, name):
        return name
    nodes = {node.name: node for node in original.nodes()}
    users = list(v.uses())
    read = (nodes[node.name].inputs[i] for node, i in users if node.name in nodes and i < len(nodes[node.name].inputs))
    names = {str(there.name) for there in read if there is not None}
    if len(names) != 1:
        return name
    if names == {name} and len(users) == 1:
        return _through(g, original, users[0][0], v)
    return names.pop()


def reference_value(original: Graph, uncut: Graph, v: ir.Value) -> tuple[Graph, str]:
    """The graph and name to compare a value with: its counterpart in the original if that is as wide, else itself."""
    name = counterpart(uncut, original, v)
    there = original.value(name) if has(original, name) else None
    if there is None or there.shape is None or v.shape is None or len(there.shape) != len(v.shape):
        return uncut, str(v.name)
    return (original, name) if v.shape and there.shape[-1] == v.shape[-1] else (uncut, str(v.name))


def _through(g: Graph, original: Graph, node: ir.Node, v: ir.Value) -> str:
    """The counterpart of the input of one norm or reshape, found from the counterpart of its output."""
    name = str(v.name)
    if not node.op_type.endswith("Normalization") and node.op_type != "Reshape":
        return name
    output = counterpart(g, original, node.outputs[0])
    there = original.value(output).producer() if has(original, output) else None
    if there is None or there.name == node.name or there.op_type != node.op_type or there.inputs[0] is None:
        return name
    same = node.op_type == "Reshape" or _equal_parameters(g, node, original, there)
    return str(there.inputs[0].name) if same else name


def _equal_parameters(g: Graph, node: ir.Node, original: Graph, there: ir.Node) -> bool:
    """Whether two norms have equal parameters."""
    pairs = list(zip(node.inputs[1:], there.inputs[1:], strict=False))
    if len(node.inputs) != len(there.inputs) or any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(a is None or (g.array(a) == original.array(b)).all() for a, b in pairs)
