"""Edited copies of one graph, compared with the original in one walk: what lies before the edits runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxcomp.graph import Graph
from onnxcomp.graph.hashing import content_hash
from onnxcomp.graph.scratch import forget
from onnxcomp.runtime.stretches import Cut, Layout, Walk, signature
from onnxcomp.target import Target
from onnxcomp.validation.compare import Reference, Validation

__all__ = ["Variants"]

Edit = Callable[[Graph], None]


class Variants:
    """Compares edits, each on its own copy of a graph; variants that start at the same place share what is before it.

    The walk stays where it is between calls, so that a caller who goes forward layer by layer computes no layer of the
    unedited graph twice. Results are those of running every variant as a whole, to float noise. In the folder `known`,
    if there is one, the numbers of variants are kept by their content.
    """

    def __init__(
        self, reference: Reference, target: Target, memory: int, scratch: Path, known: Path | None = None
    ) -> None:
        self.reference, self.known = reference, known
        self.walk = Walk(target, memory, scratch)

    def compare(self, g: Graph, edits: Sequence[Edit], value: Callable[[Validation], float]) -> list[float]:
        """A number of each edit's comparison with the original, in their order, which is best that of the graph."""
        layout = Layout(g)
        return [self._number(g, layout, _edited(g, edit), value) for edit in edits]

    def _number(self, g: Graph, layout: Layout, variant: Graph, value: Callable[[Validation], float]) -> float:
        if self.known is None or variant.spool is not None:  # to read large weights takes as long as to run them
            return value(self._compared(g, layout, variant))
        entry = self.known / content_hash(variant)
        try:
            return float.fromhex(entry.read_text())
        except (OSError, ValueError):
            found = value(self._compared(g, layout, variant))
            self.known.mkdir(parents=True, exist_ok=True)
            entry.write_text(found.hex())
            return found

    def _compared(self, g: Graph, layout: Layout, variant: Graph) -> Validation:
        cut = _shared(g, variant, layout.cuts)
        if cut is None:
            return self.reference.against(variant)
        self.walk.go(g, layout, cut, lambda: (b.feeds for b in self.reference.data))
        return self.reference.against(variant, self.walk)


def _edited(g: Graph, edit: Edit) -> Graph:
    variant = g.clone()
    edit(variant)
    if variant.spool is not None:  # what one edit reads is no reason for the next to need more memory
        forget(variant.model)
    variant.model.graph.sort()
    return variant


def _shared(g: Graph, variant: Graph, cuts: Sequence[Cut]) -> Cut | None:
    """The last cut, by bisection, whose values both graphs make in the same way; None for the inputs."""
    low, high = 0, len(cuts)  # all before `low` are shared
    while low < high:
        middle = (low + high) // 2
        values = cuts[middle].values
        same = signature(g, values) == signature(variant, values)
        low, high = (middle + 1, high) if same else (low, middle)
    return cuts[low - 1] if low else None
