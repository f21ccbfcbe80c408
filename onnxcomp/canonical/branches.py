"""Branches whose condition is known take the place of their If."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.graph import Graph

__all__ = ["inline_known_branches"]


def inline_known_branches(g: Graph) -> None:
    """Replace every If with a constant condition by the nodes of the branch that is taken."""
    for node in g.nodes("If"):
        condition = g.tensor(node.inputs[0])
        if node.domain or condition is None or condition.size != 1:
            continue
        name = "then_branch" if bool(condition.numpy().item()) else "else_branch"
        branch = node.attributes[name].as_graph()
        if not branch.initializers and not branch.inputs:
            _inline(g, node, branch)


def _inline(g: Graph, node: ir.Node, branch: ir.Graph) -> None:
    results, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    for inner in nodes:
        inner.name = g.fresh(str(inner.name))
        for v in inner.outputs:
            v.name = g.fresh(str(v.name))
    g.model.graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        g.replace(old, new)
