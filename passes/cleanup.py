"""Remove unused nodes, duplicates and identities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.graph import Graph
from onnxcomp.graph.sharing import share_equal
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage

__all__ = ["Cleanup"]


@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead nodes, identities, common subexpressions, constants stored twice and unused operator sets."""

    stage: ClassVar[Stage] = Stage.CANONICALIZE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, g: Graph, env: Env) -> None:
        """Tidy the whole graph."""
        share_equal(g)
        g.tidy()
