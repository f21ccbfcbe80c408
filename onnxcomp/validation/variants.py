"""Comparison of many edited copies of one graph with the original; the layers before the first edit run only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxcomp.files.atomic import replacing
from onnxcomp.files.seal import seal
from onnxcomp.graph import Graph
from onnxcomp.graph.hashing import content_hash
from onnxcomp.graph.scratch import release_weights
from onnxcomp.runtime.segments import Cut, Layout, Walk, signature
from onnxcomp.target import Target
from onnxcomp.validation.compare import Reference, Validation

__all__ = ["Variants"]

Edit = Callable[[Graph], None]


class Variants:
    """Compares edits, each applied to its own copy of a graph, and shares the execution before the first change.

    The walk keeps its position between calls, so that a caller who proceeds layer by layer computes no layer of the
    unedited graph twice. Results equal those of running every variant in one session, to float noise. The folder
    `known`, if given, caches numbers by the content of a variant; `notes` gets what is said of damaged entries,
    `watch` how many of the edits are done.
    """

    def __init__(
        self,
        reference: Reference,
        target: Target,
        memory: int,
        scratch: Path,
        known: Path | None = None,
        notes: list[str] | None = None,
        watch: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.reference, self.known, self.notes, self.watch = reference, known, notes, watch
        self.walk, self._walked = Walk(target, memory, scratch), reference

    def compare(self, g: Graph, edits: Sequence[Edit], value: Callable[[Validation], float]) -> list[float]:
        """`value` of each edit's comparison with the original, in the given order (that of the graph is fastest)."""
        layout, numbers = Layout(g), list[float]()
        for i, edit in enumerate(edits):
            if self.watch is not None and len(edits) > 1:
                self.watch("trial models", i, len(edits))
            numbers.append(self._number(g, layout, _edited(g, edit), value))
        return numbers

    def _number(self, g: Graph, layout: Layout, variant: Graph, value: Callable[[Validation], float]) -> float:
        if self.known is None or variant.spool is not None:  # hashing large weights takes as long as running them
            return value(self._compared(g, layout, variant))
        entry = self.known / content_hash(variant)
        if (remembered := self._remembered(entry)) is not None:
            return remembered
        number = value(self._compared(g, layout, variant))
        self.known.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as temporary:
            temporary.write_text(f"{number.hex()} {_seal(entry, number.hex())}")
        return number

    def _remembered(self, entry: Path) -> float | None:
        """The number of an entry; None where there is none, or, with a note, where it is not what was written."""
        if not entry.exists():
            return None
        try:
            number, known = entry.read_text().split()
            if known == _seal(entry, number):
                return float.fromhex(number)
        except (OSError, ValueError):
            pass
        if self.notes is not None:
            self.notes.append("cached scores of variants are not those that were written; measured again")
        return None

    def _compared(self, g: Graph, layout: Layout, variant: Graph) -> Validation:
        cut, reference = _shared(g, variant, layout.cuts), self.reference.suiting(variant)
        if cut is None:
            return reference.against(variant)
        if reference is not self._walked:  # it stands on values of other data
            self.walk.reset()
            self._walked = reference
        self.walk.go(g, layout, cut, lambda: (b.feeds for b in reference.data))
        return reference.against(variant, self.walk)


def _seal(entry: Path, number: str) -> str:
    return seal([entry.parent.parent.name, entry.parent.name, entry.name, number])


def _edited(g: Graph, edit: Edit) -> Graph:
    variant = g.clone()
    edit(variant)
    if variant.spool is not None:  # pages of weights that this edit read must not add up with those of the next
        release_weights(variant.model)
    variant.sort()
    return variant


def _shared(g: Graph, variant: Graph, cuts: Sequence[Cut]) -> Cut | None:
    """The last cut, found by bisection, whose values both graphs compute in the same way; None for the inputs."""
    low, high = 0, len(cuts)  # all before `low` are shared
    while low < high:
        middle = (low + high) // 2
        values = cuts[middle].values
        same = signature(g, values) == signature(variant, values)
        low, high = (middle + 1, high) if same else (low, middle)
    return cuts[low - 1] if low else None
