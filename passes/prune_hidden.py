"""Prune the residual stream: remove its channels of lowest score from every weight that writes or reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array
from onnxcomp.methods.repair.sequential import Part
from onnxcomp.methods.repair.stream_projection import dual, readers_moment
from onnxcomp.methods.width.base import Width
from onnxcomp.methods.width.places import Place
from onnxcomp.pipeline import Env

__all__ = ["PruneHidden"]


@dataclass(frozen=True)
class PruneHidden(Width):
    """Remove channels of the residual stream; RMSNorm keeps its statistics exactly, LayerNorm cannot and is declined.

    The mean of squares is taken over `d'` instead of `d` channels, so gains grow by `sqrt(d / d')` and epsilons by
    `d / d'`. Repair refits the consumers of the stream, and the linears that add to it towards an oblique projection
    of the uncut stream: the one for which the consumers' weights lose least (`repair.stream_projection`).
    """

    unit: ClassVar[str] = "channels"
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.04, "multiple_of": 1}
    example_error: ClassVar[float] = 0.3

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """The output that every attention and feed-forward part adds to the stream, in graph order."""
        parts = [a.o for a in blocks.attentions(g)] + [m.down for m in blocks.mlps(g)]
        order = {node: i for i, node in enumerate(g.nodes())}
        for x in sorted(parts, key=lambda x: order[x.node]):
            yield x.site, x.output

    def _repair(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Sequential repair of the consumers of the stream and of the linears that add to it, where asked for."""
        if not self._in_order:
            return
        targets: dict[str, Part] = {}
        for place, keep in cut:
            projection, stream = _projection(uncut, place, keep), tuple(range(place.group.units))
            for s in place.group.computed:  # a value that is no full stream, such as a gate, keeps its own channels
                targets[s.value] = Part(s.value, projection if s.units == stream else np.flatnonzero(s.kept(keep)))
        self._refit(g, uncut, env, cut, targets)


def _projection(uncut: Graph, place: Place, keep: Array) -> Array:
    """The oblique projection `[d, d']` of the uncut stream onto the kept channels."""
    linears, stream = {x.name: x for x in blocks.linears(uncut, tied=True)}, tuple(range(place.group.units))
    consumers = [linears[x.name] for r in place.readers if r.slot.units == stream for x in r.linears]
    return dual(readers_moment(uncut, consumers, len(stream)), np.eye(len(stream))[:, keep])
