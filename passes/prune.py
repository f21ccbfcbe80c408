"""Prune by one budget: decide between heads, feed-forward channels and whole parts of layers in one currency."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.branches import Branch, branches, residual_sum
from onnxcomp.blocks.caches import remove_ports
from onnxcomp.coupling import Coupling
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.graph.operators import NORMS
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.dropped_layers import Gap, leave_out, targets_before_gaps
from onnxcomp.methods.width import kinds
from onnxcomp.methods.width.base import Width
from onnxcomp.methods.width.places import Cut, Place
from onnxcomp.pipeline import Env
from onnxcomp.target import Target

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune(Width):
    """Remove the heads, channels and whole attentions or feed-forward parts that lose the model least for a budget.

    Each attention and each feed-forward part has an error curve: what the model's outputs lose when it alone is cut to
    a few widths, or left out, and repaired. Of all choices under the budget the one of the least sum is made; a layer
    of which both parts are left out is dropped.
    """

    unit: ClassVar[str] = "heads, channels and parts"
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.05, "multiple_of": 1}
    example_error: ClassVar[float] = 0.9

    layers: bool = True
    """Whole attentions and feed-forward parts may be left out, with their caches, where a residual stream allows it."""

    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """The output of every attention and the hidden channels of every feed-forward part, in graph order."""
        order = {v: i for i, node in enumerate(g.nodes()) for v in node.outputs}
        nodes = {b.name: b.nodes for b in branches(g)}  # with the sum, which is what leaving out changes
        found = sorted((*kinds.head_starts(g), *kinds.channel_starts(g)), key=lambda x: order.get(x[1], 0))
        return [(Site(s.name, tuple(dict.fromkeys((*s.nodes, *nodes.get(s.name, ())))), s.kind), v) for s, v in found]

    def group(self, c: Coupling, start: ir.Value) -> Group:
        """The heads of an attention, or the channels of a feed-forward part."""
        node = start.producer()
        if node is not None and node.op_type == "Attention" and node.domain == "":
            return kinds.head_group(c, node, whole=False)
        return super().group(c, start)

    def _unit(self, place: Place) -> str:
        return "heads" if place.sites[0].kind == "attention" else "channels"

    def _multiple(self, place: Place, target: Target) -> int:
        return 1 if place.sites[0].kind == "attention" else super()._multiple(place, target)

    def _droppable(self, g: Graph, places: Sequence[Place]) -> Collection[int]:
        removable = {b.name: b for b in branches(g) if not b.why} if self.layers else {}
        alone = [(i, p, removable.get(p.sites[0].name)) for i, p in enumerate(places) if len(p.sites) == 1]
        return [i for i, p, b in alone if b is not None and (not _is_post_norm(b) or _is_direct(p))]

    def _apply(self, g: Graph, env: Env, coupling: Coupling, cuts: Sequence[Cut]) -> None:
        """Take out units, then whole parts, and repair what is left in one sweep."""
        uncut, gaps = g.clone(), list[Gap]()
        done = self._cut(g, env, coupling, [c for c in cuts if c.keep.size])
        for cut in (c for c in cuts if not c.keep.size):
            branch = next(b for b in branches(g) if b.name == cut.place.sites[0].name)
            if branch.why:  # an earlier one can make it the last one with a cache
                whole = np.arange(cut.place.group.units)
                done += self._cut(g, env, coupling, [dataclasses.replace(cut, keep=whole)])
                continue
            if _is_post_norm(branch):
                self._leave_mean(g, env, cut.place, branch)
            else:
                gaps = leave_out(g, branch, gaps)
        if gaps and self._in_order:
            self._refit(g, uncut, env, done, targets_before_gaps(g, uncut, gaps))
        else:
            self._repair(g, uncut, env, done)

    def _leave_mean(self, g: Graph, env: Env, place: Place, branch: Branch) -> None:
        """Leave out a part before a norm, which stays: without it the stream would be another. A repair adds its mean.

        What the part adds is then a constant row `[N]`.
        """
        for reader in readers.inside(g, place.readers):
            for x in reader.linears:
                row = np.zeros(x.sizes[1]) if x.bias is None else g.array(x.bias).reshape(-1).astype(np.float64)
                if self.repair != "none":
                    row = row + reader.mean(env.stats) @ reader.weight(g)
                g.replace(x.output, g.constant(row.astype(g.array(x.weight).dtype)))
        for port in branch.cache_ports:
            remove_ports(g, port)
        g.note(branch.site, "dropped" if self.repair == "none" else "dropped, but for its mean")
        g.sweep()


def _is_post_norm(b: Branch) -> bool:
    """Whether a branch ends behind a norm of the sum."""
    last = b.exit.producer() if b.exit is not None else None
    return last is not None and last.op_type in NORMS


def _is_direct(place: Place) -> bool:
    """Whether all that reads the axis is added to the stream as it is."""
    sums = [residual_sum(x) for r in place.readers for x in r.linears]
    return all(s is not None and s.scale is None for s in sums)
