"""Narrower convolutions: channels whose weights are smallest go, with all that makes and reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxcomp.graph import Graph, Site
from onnxcomp.pruning import Width

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Width):
    """Cut output channels of every convolution, and with them norms, depthwise convolutions, and all that reads them.

    A residual couples every convolution that adds to it; a grouped convolution gives whole groups.
    """

    unit: ClassVar[str] = "channels"
    axis: ClassVar[int] = 1

    score: Literal["magnitude", "ablation"] = "magnitude"
    """How much a channel matters: all weights that write or read it (no data), or the loss without it."""
    latency: None = None
    """No budget here: only linears and attentions are timed; say macs instead."""
    repair: Literal["none"] = "none"
    """What makes up for the cut: nothing; closed-form repair is for linears."""
    sequential: Literal[False] = False
    """No repair, so no order of it."""

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """What every convolution makes, in graph order."""
        for node in g.nodes("Conv", "ConvTranspose"):
            yield Site(str(node.name), (str(node.name),), "convolution"), node.outputs[0]
