"""Prune feed-forward parts: remove the hidden channels of lowest score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from onnxcomp.graph import Graph, Site
from onnxcomp.methods.width import kinds
from onnxcomp.methods.width.base import Width

__all__ = ["PruneFfn"]


@dataclass(frozen=True)
class PruneFfn(Width):
    """Remove hidden channels of every feed-forward part, gated or not: columns of up and gate, rows of down.

    Channels are scored, chosen, removed and repaired as by every pass that prunes widths.
    """

    unit: ClassVar[str] = "channels"
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.05, "multiple_of": 1}

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """The input `[.., K]` of every down projection, `K` hidden channels."""
        return kinds.channel_starts(g)
