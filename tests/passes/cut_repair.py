"""Cuts feed-forward channels and repairs by least squares: proves Gram statistics of the uncut layer and `take`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp import blocks, coupling
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import solve
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, gram
from onnxcomp.target import Target


@dataclass(frozen=True)
class CutRepair(Pass):
    """Drop the feed-forward channels of least energy `G_jj |W_j|^2`, then refit the down projection."""

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of channels to drop."""
    repair: bool = True
    """Least squares on the kept support."""

    @property
    def is_identity(self) -> bool:
        return self.ratio == 0

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        return [Site(m.down.name, (m.down.name,), "mlp") for m in blocks.mlps(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        return [gram(m.down.source) for m in blocks.mlps(g)]

    def run(self, g: Graph, env: Env) -> None:
        for mlp in blocks.mlps(g):
            moments, weight = env.stats[gram(mlp.down.source)], g.array(mlp.down.weight)
            energy = np.diag(moments) * (weight.astype(np.float64) ** 2).sum(1)
            kept = np.sort(np.argsort(-energy, kind="stable")[: max(1, round(weight.shape[0] * (1 - self.ratio)))])
            if self.repair and kept.size < weight.shape[0]:
                better = weight.copy()
                better[kept] = solve.repair(moments, weight, kept).weights
                g.put(mlp.down.weight, better)
            g.take(coupling.Coupling(g).channels(mlp.down.node), kept)
