"""Zeroes the least important heads, scored by ablation: proves `Env.evaluate`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.pipeline import Edit, Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need
from onnxcomp.target import Target


def silence(layer: int, head: int) -> Edit:
    """An edit that zeroes what one head adds to the residual stream."""

    def edit(g: Graph) -> None:
        attention = blocks.attentions(g)[layer]
        width = attention.head_dim
        weight = g.array(attention.o.weight).copy()
        weight[head * width : (head + 1) * width] = 0
        g.put(attention.o.weight, weight)

    return edit


@dataclass(frozen=True)
class HeadAblation(Pass):
    """Silence the `count` heads whose single removal moves the outputs least (Michel 2019, by evaluation)."""

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    count: Annotated[int, Field(ge=0)] = 1
    """Heads to silence."""
    metric: str = "rel-l2"
    """Gate name that scores a variant."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        return [Site(str(a.node.name), (str(a.o.node.name),), "attention") for a in blocks.attentions(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        return ()

    def run(self, g: Graph, env: Env) -> None:
        heads = [(layer, head) for layer, a in enumerate(blocks.attentions(g)) for head in range(a.heads)]
        scores = env.evaluate([silence(*h) for h in heads], self.metric)
        order = np.argsort([s.value for s in scores], kind="stable")
        chosen = [heads[i] for i in order[: self.count]]
        for layer, head in chosen:
            silence(layer, head)(g)
        for layer, a in enumerate(blocks.attentions(g)):
            if layer not in {c[0] for c in chosen}:
                g.decline(str(a.node.name), "its heads matter more")
