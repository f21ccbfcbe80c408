"""Narrower convolutions: channels that the others can replace go, with all that makes and reads them."""

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
from onnxcomp.methods.width.base import Place, Width
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.methods.repair.readers import Reader

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Width):
    """Cut output channels of every convolution, and with them norms, depthwise convolutions, and all that reads them.

    A residual couples every convolution that adds to it; a grouped convolution gives whole groups. A convolution is
    linear in its patches, so that it is repaired as a linear is, on their moments; norms behind it stay as they are.
    """

    unit: ClassVar[str] = "channels"
    axis: ClassVar[int] = 1

    ranking: Literal["sensitivity", "global", "layer"] | None = None
    """What loses the model least (a trial cut each), what scores least over all layers, or the same share of each.

    By default sensitivity for energy, and else layer: other scores do not say what the last channels of a layer cost.
    """
    repair: Literal["least-squares", "bias", "none"] = "least-squares"
    """What makes up for the cut: kernels that stay, fitted to the uncut convolution; its mean output; or nothing."""
    latency: None = None
    """No budget here: only linears and attentions are timed; say macs instead."""

    @property
    def _ranked(self) -> Literal["sensitivity", "global", "layer"]:
        if self.ranking is None and self.score != "energy":
            return "layer"
        return super()._ranked

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """What every convolution makes, in graph order."""
        for node in g.nodes("Conv", "ConvTranspose"):
            yield Site(str(node.name), (str(node.name),), "convolution"), node.outputs[0]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """None of the graph as it is: patches are asked for when it runs."""
        return ()

    def run(self, g: Graph, env: Env) -> None:
        """Collect what score and repair ask, of patches as well; then as every width pass."""
        asked = list(super().needs(g, env.target))
        if asked:
            stats = convolutions.collect(g, env, asked, self.name if self.score == "energy" else "")
            env = dataclasses.replace(env, stats=stats)
        super().run(g, env)

    def _readers(self, g: Graph, group: Group, linears: Sequence[Linear]) -> tuple[Reader, ...]:
        found = super()._readers(g, group, linears)
        return (*convolutions.patches_of(g, group), *found) if self._measures else found

    def _cut(self, g: Graph, place: Place, keep: Array, env: Env, said: str) -> None:
        linears = tuple(r for r in place.readers if not isinstance(r, Patches))
        super()._cut(g, dataclasses.replace(place, readers=linears), keep, env, said)

    def _after(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Repair the convolutions when all is cut: a bias that is made before would not be cut with the rest."""
        found = [(p.group, keep, p.readers) for p, keep in cut]
        if self._in_order:
            convolutions.in_order(g, uncut, env, found)
        elif self.repair != "none":
            convolutions.each_alone(g, uncut, env, found, self.repair)
