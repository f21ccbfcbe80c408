"""Prune attention heads: remove the heads of lowest score, with their part of every projection."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcomp.coupling import Coupling
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.methods.width.base import Width

__all__ = ["PruneHeads"]


@dataclass(frozen=True)
class PruneHeads(Width):
    """Remove heads of every attention: columns of q, k and v, rows of the output projection, head counts, caches."""

    unit: ClassVar[str] = "heads"
    aligned: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"floor": 3}
    example_error: ClassVar[float] = 0.9

    heads: Literal["query", "groups"] = "query"
    """Grouped queries: remove query heads, equally many of each group, or key-value heads with all their queries."""

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """Every attention in the canonical form."""
        for node in g.nodes("Attention"):
            if node.domain == "":
                producers = (n for v in node.inputs[:3] if v is not None and (n := v.producer()) is not None)
                consumers = (u for u, _ in node.outputs[0].uses())
                names = dict.fromkeys(str(n.name) for n in (node, *producers, *consumers))
                yield Site(str(node.name), tuple(names), "attention"), node.outputs[0]

    def group(self, c: Coupling, start: ir.Value) -> Group:
        """The heads of one attention; a cache of keys and values shrinks with them."""
        node = start.producer()
        assert node is not None
        group = c.heads(node, whole=self.heads == "groups", io=True)
        if self.heads == "groups" or not _is_normalized(node, {n.node for n in group.norms}):
            return group
        return c.heads(node, whole=True, io=True)


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
