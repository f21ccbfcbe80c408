"""A narrower residual stream: channels that no reader needs go from every weight that writes or reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.pruning import Width

__all__ = ["PruneHidden"]


@dataclass(frozen=True)
class PruneHidden(Width):
    """Cut channels of the residual stream; RMSNorm keeps its statistics exactly, LayerNorm cannot and is declined.

    The mean of squares is taken over fewer channels, so gains grow by `sqrt(d / d')` and epsilons by `d / d'`.
    """

    unit: ClassVar[str] = "channels"

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """What every attention and feed-forward part adds to the stream, in graph order."""
        parts = [a.o for a in blocks.attentions(g)] + [m.down for m in blocks.mlps(g)]
        order = {node: i for i, node in enumerate(g.nodes())}
        for x in sorted(parts, key=lambda x: order[x.node]):
            yield x.site, x.output
