"""Kinds of axes that several passes cut: the heads of attentions and the hidden channels of feed-forward parts."""

from __future__ import annotations

from collections.abc import Container, Iterator

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.coupling import Coupling
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group

__all__ = ["channel_starts", "head_group", "head_starts"]


def head_starts(g: Graph) -> Iterator[tuple[Site, ir.Value]]:
    """Every attention in the canonical form, with its output."""
    for node in g.nodes("Attention"):
        if node.domain == "":
            producers = (n for v in node.inputs[:3] if v is not None and (n := v.producer()) is not None)
            consumers = (u for u, _ in node.outputs[0].uses())
            names = dict.fromkeys(str(n.name) for n in (node, *producers, *consumers))
            yield Site(str(node.name), tuple(names), "attention"), node.outputs[0]


def channel_starts(g: Graph) -> Iterator[tuple[Site, ir.Value]]:
    """Every feed-forward part, with the input `[.., K]` of its down projection, `K` hidden channels."""
    return ((mlp.site, mlp.down.input) for mlp in blocks.mlps(g))


def head_group(c: Coupling, attention: ir.Node, *, whole: bool) -> Group:
    """The query heads of one attention, or with `whole` its key-value heads; a cache shrinks with them."""
    group = c.heads(attention, whole=whole, io=True)
    if whole or not _is_normalized(attention, {n.node for n in group.norms}):
        return group
    return c.heads(attention, whole=True, io=True)


def _is_normalized(attention: ir.Node, norms: Container[str]) -> bool:
    """Whether a norm takes its mean over all heads of an output.

    Then heads go with the values they attend to: a query head alone would leave these in the mean of the others.
    """
    pending, visited = list(attention.outputs[:1]), set[ir.Node]()
    while pending:
        for user, _ in pending.pop().uses():
            if str(user.name) in norms:
                return True
            if user not in visited and user.op_type not in ("MatMul", "Gemm", "Add"):
                visited.add(user)
                pending += user.outputs
    return False
