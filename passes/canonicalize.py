"""Raise any exporter's graph to the canonical form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from onnxcomp import canonical
from onnxcomp.graph import Graph, Site
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Recognise attention, norms, activations, rotary embeddings and linears; write them as standard operators."""

    stage: ClassVar[Stage] = Stage.CANONICALIZE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    exact_rows: bool = False
    """Keep the exporter's result for queries whose mask hides every key (by default it is undefined)."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every subgraph that could be raised to a standard operator."""
        return canonical.sites(g)

    def run(self, g: Graph, env: Env) -> None:
        """Raise the whole graph; what is not recognised is declined with the reason."""
        canonical.canonicalize(g, exact_rows=self.exact_rows)
