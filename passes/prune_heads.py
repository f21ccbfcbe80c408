"""Prune attention heads: remove the heads of lowest score, with their part of every projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcomp.coupling import Coupling
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.methods.width import kinds
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
        return kinds.head_starts(g)

    def group(self, c: Coupling, start: ir.Value) -> Group:
        """The heads of one attention; a cache of keys and values shrinks with them."""
        node = start.producer()
        assert node is not None
        return kinds.head_group(c, node, whole=self.heads == "groups")
