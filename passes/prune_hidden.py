"""A narrower residual stream: channels that no reader needs go from every weight that writes or reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks, repairs
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array
from onnxcomp.pipeline import Env
from onnxcomp.pruning import Place, Width
from onnxcomp.repairs import Part

__all__ = ["PruneHidden"]


@dataclass(frozen=True)
class PruneHidden(Width):
    """Cut channels of the residual stream; RMSNorm keeps its statistics exactly, LayerNorm cannot and is declined.

    The mean of squares is taken over fewer channels, so gains grow by `sqrt(d / d')` and epsilons by `d / d'`. Repair
    fits what reads the stream, and what is added to it to the uncut stream's remaining channels.
    """

    unit: ClassVar[str] = "channels"

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """What every attention and feed-forward part adds to the stream, in graph order."""
        parts = [a.o for a in blocks.attentions(g)] + [m.down for m in blocks.mlps(g)]
        order = {node: i for i, node in enumerate(g.nodes())}
        for x in sorted(parts, key=lambda x: order[x.node]):
            yield x.site, x.output

    def _after(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Repair readers and writers of the stream, one after another where that is asked for."""
        if self._in_order:
            slots = [(slot, keep) for place, keep in cut for slot in place.group.computed]
            streams = {s.value: Part(s.value, np.flatnonzero(s.kept(keep))) for s, keep in slots}
            repairs.in_order(
                g, uncut, env, [r for p, _ in cut for r in p.readers], streams, self.repair == "gauss-newton"
            )
