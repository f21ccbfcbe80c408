"""Fewer attention heads: those that the others can replace go, with their part of every projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Cut heads of every attention: columns of q, k and v, rows of the output projection, head counts, caches."""

    unit: ClassVar[str] = "heads"
    aligned: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"floor": 3}
    example_error: ClassVar[float] = 0.9

    heads: Literal["query", "groups"] = "query"
    """Where key-value heads are shared: query heads, as many of each, or key-value heads with all their query heads."""

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """Every attention in the canonical form."""
        for node in g.nodes("Attention"):
            if node.domain == "":
                around = (u for v in node.inputs[:3] if v is not None for u in _made(v))
                after = (u for u, _ in node.outputs[0].uses())
                names = dict.fromkeys(str(n.name) for n in (node, *around, *after))
                yield Site(str(node.name), tuple(names), "attention"), node.outputs[0]

    def group(self, c: Coupling, start: ir.Value) -> Group:
        """The heads of one attention; a cache of keys and values shrinks with them."""
        node = start.producer()
        assert node is not None
        return c.heads(node, whole=self.heads == "groups", io=True)


def _made(v: ir.Value) -> list[ir.Node]:
    node = v.producer()
    return [node] if node is not None else []
