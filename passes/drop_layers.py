"""Leave out the layers, attentions or MLPs that change the residual stream least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks.branches import Branch, branches, layer_branches
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.repair.dropped_layers import Gap, close, leave_out
from onnxcomp.pipeline import Edit, Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, Stats, cosine
from onnxcomp.target import Target

__all__ = ["DropLayers"]


@dataclass(frozen=True)
class DropLayers(Pass):
    """Hand the residual stream past the least needed layers, one at a time, scoring the rest again after each.

    Block influence is `1 - mean cos(x_in, x_out)` over tokens (Men et al., ShortGPT, 2024, arXiv 2403.03853, eq. 1);
    `ablation` measures instead how far the model's outputs move without the layer. What is left is then fitted to the
    residual stream of the whole model, from the linear before each gap on (see `onnxcomp.gaps.close`).
    """

    stage: ClassVar[Stage] = Stage.DEPTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    plans: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the layers (or of the attentions, or the MLPs) to leave out, rounded down."""
    part: Literal["layer", "attention", "mlp"] = "layer"
    """What is left out: whole layers, their attentions only, or their MLPs only."""
    score: Literal["influence", "ablation"] = "influence"
    """How need is measured; ablation runs the model once for each candidate and round."""
    rescore: bool = True
    """Score again after each one that goes; otherwise once."""
    repair: Literal["gauss-newton", "least-squares", "none"] = "least-squares"
    """What makes up for them: the linears that write to the stream from there on, fitted to the uncut one; nothing."""
    protect: Annotated[int, Field(ge=0)] = 1
    """Layers at each end that always stay."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every layer, attention or MLP."""
        return [b.site for b in self._all(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The cosine between the stream before and behind each candidate."""
        return [] if self.is_identity or self.score == "ablation" else [_influence(b) for b in self._free(self._all(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Drop the least needed candidates, then repair what is left; the others are declined with their score."""
        uncut, gaps, held = g.clone(), list[Gap](), dict[str, str]()
        every = self._all(g)
        free = {b.name for b in self._free(every)}
        count, scores = int(self.ratio * len(every)), self._scores(g, env, free, env.stats)
        left = min(count, len(free)) if not self.is_identity else 0
        while left and free:
            name = min(free, key=lambda n: scores[n])
            free.remove(name)
            b = self._named(g, name)
            if b.why:  # what went before it can leave it as the last one with a cache
                held[name] = b.why
                continue
            gaps, left = leave_out(g, b, gaps), left - 1
            here = {_node(b.name) for b in self._all(g)}
            held |= {n: "it went with what read it" for n in free if _node(n) not in here}
            free -= set(held)
            if self.rescore and left:
                scores = self._scores(g, env, free, None)
        if self.repair != "none" and not env.dry:
            close(g, uncut, env, gaps, self.repair == "gauss-newton")
        for b in every:
            if count == 0:
                g.decline(b.site, f"a share of {self.ratio:g} is less than one of {len(every)}")
            elif b.name in free:
                g.decline(b.site, f"kept: its {self.score} is {scores[b.name]:.3g}")
            elif b.why or b.name in held or self._protected(b, every):
                why = b.why or held.get(b.name)
                g.decline(b.site, why or f"one of the {self.protect} layers at each end that stay")

    def _all(self, g: Graph) -> list[Branch]:
        if self.part == "layer":
            return layer_branches(g)
        return [b for b in branches(g) if b.kind == self.part]

    def _named(self, g: Graph, name: str) -> Branch:
        """The branch in a graph that has been edited since, or in a copy; names of nodes stay."""
        found = next(b for b in self._all(g) if _node(b.name) == _node(name))
        return dataclasses.replace(found, name=name)

    def _protected(self, b: Branch, every: list[Branch]) -> bool:
        last = max(x.layer for x in every)
        return b.layer < self.protect or b.layer > last - self.protect

    def _free(self, every: list[Branch]) -> list[Branch]:
        return [b for b in every if not b.why and not self._protected(b, every)]

    def _scores(self, g: Graph, env: Env, names: set[str], stats: Stats | None) -> dict[str, float]:
        if self.is_identity or not names:
            return {}
        if env.dry:
            return dict.fromkeys(names, 0.0)
        order = sorted(names)
        if self.score == "ablation":
            return {n: s.value for n, s in zip(order, env.evaluate(self._without(n) for n in order), strict=True)}
        found = {n: _influence(self._named(g, n)) for n in order}
        known = env.collect(g, found.values()) if stats is None else stats
        return {n: 1 - float(known[need]) for n, need in found.items()}

    def _without(self, name: str) -> Edit:
        def edit(variant: Graph) -> None:
            leave_out(variant, self._named(variant, name))

        return edit


def _node(name: str) -> str:
    """The name of a branch without the number of its layer, which changes as others go."""
    return name.split(" (")[0]


def _influence(b: Branch) -> Need:
    assert b.entry is not None
    assert b.exit is not None
    return cosine(b.entry, b.exit)
