"""A narrower residual stream: channels that no reader needs go from every weight that writes or reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.sequential import Part
from onnxcomp.methods.repair.stream_projection import dual, heard
from onnxcomp.methods.width.base import Place, Width
from onnxcomp.pipeline import Env

__all__ = ["PruneHidden"]


@dataclass(frozen=True)
class PruneHidden(Width):
    """Cut channels of the residual stream; RMSNorm keeps its statistics exactly, LayerNorm cannot and is declined.

    The mean of squares is taken over fewer channels, so gains grow by `sqrt(d / d')` and epsilons by `d / d'`. Repair
    fits what reads the stream, and what is added to it: the channels kept are to say to all readers' weights what the
    uncut stream said.
    """

    unit: ClassVar[str] = "channels"
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.04, "multiple_of": 1}
    example_error: ClassVar[float] = 0.3

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """What every attention and feed-forward part adds to the stream, in graph order."""
        parts = [a.o for a in blocks.attentions(g)] + [m.down for m in blocks.mlps(g)]
        order = {node: i for i, node in enumerate(g.nodes())}
        for x in sorted(parts, key=lambda x: order[x.node]):
            yield x.site, x.output

    def _after(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Repair readers and writers of the stream, one after another where that is asked for."""
        if not self._in_order:
            return
        streams: dict[str, Part] = {}
        for place, keep in cut:
            target, whole = _target(uncut, place, keep), tuple(range(place.group.units))
            for s in place.group.computed:
                streams[s.value] = Part(s.value, target if s.units == whole else np.flatnonzero(s.kept(keep)))
        readers = [r for p, _ in cut for r in p.readers]
        sequential.in_order(g, uncut, env, readers, streams, self.repair == "gauss-newton")


def _target(uncut: Graph, place: Place, keep: Array) -> Array:
    """What of the stream the channels kept are to carry: `[d, d']`."""
    linears, whole = {x.name: x for x in blocks.linears(uncut, tied=True)}, tuple(range(place.group.units))
    read = [linears[x.name] for r in place.readers if r.slot.units == whole for x in r.linears]
    return dual(heard(uncut, read, len(whole)), np.eye(len(whole))[:, keep])
