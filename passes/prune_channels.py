"""Prune convolutions: remove output channels, with everything that produces or consumes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir

from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array
from onnxcomp.methods.repair import convolutions
from onnxcomp.methods.repair.convolutions import Patches
from onnxcomp.methods.width.base import Ranking, Width
from onnxcomp.methods.width.places import Cut, Place
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.methods.repair.readers import Reader

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Width):
    """Remove output channels of every convolution, with the norms, depthwise convolutions and consumers behind them.

    A residual couples every convolution that adds to it; a grouped convolution loses whole groups. A convolution is
    linear in its patches, so it is repaired as a linear is, from their moments; norms behind it are not refitted.
    """

    unit: ClassVar[str] = "channels"
    axis: ClassVar[int] = 1

    ranking: Ranking | None = None
    """What decides between layers: their error curves, one trial cut of each, the scores alone, the same share of each.

    By default curves for energy, and else layer: other scores do not measure what the last channels of a layer
    cost.
    """
    repair: Literal["least-squares", "bias", "none"] = "least-squares"
    """How it is compensated: remaining kernels refitted to the uncut output, its mean in the bias, none: no repair."""
    latency: None = None
    """No budget here: only linears and attentions are timed; say macs instead."""

    @property
    def _ranked(self) -> Ranking:
        if self.ranking is None and self.score != "energy":
            return "layer"
        return super()._ranked

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """The output of every convolution, in graph order."""
        for node in g.nodes("Conv", "ConvTranspose"):
            yield Site(str(node.name), (str(node.name),), "convolution"), node.outputs[0]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """None before the run: patches exist only in a probed copy of the graph."""
        return ()

    def run(self, g: Graph, env: Env) -> None:
        """Collect the statistics for score and repair, of patches too; then run as every width pass."""
        needs = list(super().needs(g, env.target))
        if needs:
            stats = convolutions.collect(g, env, needs, self.name if self.score == "energy" else "")
            env = dataclasses.replace(env, stats=stats)
        super().run(g, env)

    def _readers(self, g: Graph, group: Group, linears: Sequence[Linear]) -> tuple[Reader, ...]:
        consumers = super()._readers(g, group, linears)
        return (*convolutions.patches_of(g, group), *consumers) if self._measures else consumers

    def _take(self, g: Graph, cut: Cut, env: Env) -> None:
        linears = tuple(r for r in cut.place.readers if not isinstance(r, Patches))
        super()._take(g, dataclasses.replace(cut, place=dataclasses.replace(cut.place, readers=linears)), env)

    def _repair(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Repair the convolutions after every cut: a bias added before would keep its full length."""
        groups = [(p.group, keep, p.readers) for p, keep in cut]
        if self._in_order:
            convolutions.refit_in_order(g, uncut, env, groups)
        elif self.repair != "none":
            convolutions.refit_each(g, uncut, env, groups, self.repair)
