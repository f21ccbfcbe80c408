"""Drop the layers, attentions or MLPs that change the residual stream least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks.branches import Branch, branches, layer_branches
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.layer_choice import Choice, similarity, stable_name
from onnxcomp.methods.repair.dropped_layers import Gap, leave_out, refit_around_gaps
from onnxcomp.pipeline import Edit, Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, Stats
from onnxcomp.target import Target

__all__ = ["DropLayers"]


@dataclass(frozen=True)
class DropLayers(Pass):
    """Skip the least important layers, one at a time, scoring the others again after each.

    Block influence is `1 - mean cos(x_in, x_out)` over tokens (Men et al., ShortGPT, 2024, arXiv 2403.03853, eq. 1);
    `ablation` measures instead how far the model's outputs move without the layer. The remaining layers are then
    refitted to the original residual stream, from the linear before each gap on.
    """

    stage: ClassVar[Stage] = Stage.DEPTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    plans: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the layers (or of the attentions, or the MLPs) to drop, rounded down."""
    part: Literal["layer", "attention", "mlp"] = "layer"
    """What is dropped: whole layers, their attentions only, or their MLPs only."""
    score: Literal["influence", "ablation"] = "influence"
    """How importance is measured; ablation runs the model once for each candidate and round."""
    rescore: bool = True
    """Score again after each one that is dropped; otherwise once."""
    repair: Literal["gauss-newton", "block-tune", "least-squares", "none"] = "least-squares"
    """How it is compensated: later linears that write to the stream refitted to the original, none: no repair."""
    protect: Annotated[int, Field(ge=0)] = 1
    """Layers at each end that are never dropped."""

    @property
    def fits(self) -> bool:
        """Where what is left is refitted."""
        return not self.is_identity and self.repair != "none"

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every layer, attention or MLP."""
        return [b.site for b in self._all(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The cosine between the stream before and after each candidate."""
        return [] if self.is_identity or self.score == "ablation" else [similarity(b) for b in self._free(self._all(g))]

    def run(self, g: Graph, env: Env) -> None:
        """Drop the least important candidates, repair the others, and decline each that stays with the reason."""
        uncut, every = g.clone(), self._all(g)
        choice = Choice({b.name for b in self._free(every)})
        choice.scores = self._scores(g, env, choice.candidates, env.stats)
        gaps = self._drop(g, env, int(self.ratio * len(every)), choice)
        if self.repair != "none" and not env.dry:
            refit_around_gaps(g, uncut, env, gaps, self.repair)
        self._decline(g, every, choice)

    def _drop(self, g: Graph, env: Env, count: int, choice: Choice) -> list[Gap]:
        """Drop the `count` candidates of lowest score one after another; the gaps in the stream that they leave."""
        gaps = list[Gap]()
        left = min(count, len(choice.candidates)) if not self.is_identity else 0
        while left and choice.candidates:
            b = self._named(g, choice.take_lowest())
            if b.why:  # an earlier drop can make it the last one with a cache
                choice.keep([b.name], b.why)
                continue
            gaps, left = leave_out(g, b, gaps), left - 1
            remaining = {stable_name(b.name) for b in self._all(g)}
            choice.keep([n for n in choice.candidates if stable_name(n) not in remaining], "it went with what read it")
            if self.rescore and left:
                choice.scores = self._scores(g, env, choice.candidates, None)
        return gaps

    def _decline(self, g: Graph, every: list[Branch], choice: Choice) -> None:
        """Decline every branch that was not dropped, with its score or why it is no candidate."""
        for b in every:
            if int(self.ratio * len(every)) == 0:
                g.decline(b.site, f"a share of {self.ratio:g} is less than one of {len(every)}")
            elif b.name in choice.candidates:
                g.decline(b.site, f"kept: its {self.score} is {choice.scores[b.name]:.3g}")
            elif b.why or b.name in choice.kept or self._protected(b, every):
                why = b.why or choice.kept.get(b.name)
                g.decline(b.site, why or f"one of the {self.protect} layers at each end that stay")

    def _all(self, g: Graph) -> list[Branch]:
        if self.part == "layer":
            return layer_branches(g)
        return [b for b in branches(g) if b.kind == self.part]

    def _named(self, g: Graph, name: str) -> Branch:
        """The branch in a graph that has been edited since, or in a copy; names of nodes stay."""
        branch = next(b for b in self._all(g) if stable_name(b.name) == stable_name(name))
        return dataclasses.replace(branch, name=name)

    def _protected(self, b: Branch, every: list[Branch]) -> bool:
        last = max(x.layer for x in every)
        return b.layer < self.protect or b.layer > last - self.protect

    def _free(self, every: list[Branch]) -> list[Branch]:
        return [b for b in every if not b.why and not self._protected(b, every)]

    def _scores(self, g: Graph, env: Env, names: set[str], stats: Stats | None) -> dict[str, float]:
        """Importance of branches by name, from `stats` or, where that is None, from those of the graph as it is."""
        if self.is_identity or not names:
            return {}
        if env.dry:
            return dict.fromkeys(names, 0.0)
        order = sorted(names)
        if self.score == "ablation":
            return {n: s.value for n, s in zip(order, env.evaluate(self._without(n) for n in order), strict=True)}
        every = {stable_name(b.name): b for b in self._all(g)}
        needs = {n: similarity(every[stable_name(n)]) for n in order}
        cosines = env.collect(g, needs.values()) if stats is None else stats
        return {n: 1 - float(cosines[need]) for n, need in needs.items()}  # block influence

    def _without(self, name: str) -> Edit:
        def edit(variant: Graph) -> None:
            leave_out(variant, self._named(variant, name))

        return edit
