"""Removal of Identity nodes, in branches and loops as well; those that give an output its name or its graph stay."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["drop_identities"]


def drop_identities(model: ir.Model) -> int:
    """Let readers of an Identity read its input; returns the number of nodes removed.

    One whose output is a graph output goes only where its input is computed in the same graph and is no output itself:
    a graph returns neither the value of a graph around it nor one value under two names.
    """
    removed = 0
    for graph in [model.graph, *model.graph.subgraphs()]:
        for node in list(graph):
            if node.op_type == "Identity" and node.domain == "" and len(node.inputs) == 1:
                removed += _dropped(node)
    return removed


def _dropped(node: ir.Node) -> bool:
    x, y, graph = node.inputs[0], node.outputs[0], node.graph
    if x is None or graph is None:
        return False
    if y.is_graph_output():
        producer = x.producer()
        if producer is None or producer.graph is not graph or x.is_graph_output():
            return False
        x.name, x.type, x.shape = y.name, y.type or x.type, y.shape if y.shape is not None else x.shape
    elif x.type is None or x.shape is None:
        x.type, x.shape = x.type or y.type, x.shape if x.shape is not None else y.shape
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
