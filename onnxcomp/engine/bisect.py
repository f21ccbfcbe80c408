"""Which pass broke a gate, and which site of it: the pass by what was compared after each, the site value by value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcomp.engine.by_layer import Compared, by_layer
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.machine import size_text
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Culprit, Step, Suspect
from onnxcomp.target import Target
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.gates import Condition, Verdict

__all__ = ["Bisection", "not_bisected"]

SHOWN = 8  # sites that are named


@dataclass(frozen=True)
class _Break:
    """A pass behind which gates fail, what it was given and made, and what the gates say."""

    what: Pass
    before: Graph
    after: Graph
    failed: tuple[str, ...]


class Bisection:
    """Remembers, where it is `active`, the last pass behind which gates began to fail."""

    def __init__(self, *, active: bool = False) -> None:
        self.active = active
        self.at: _Break | None = None

    def judged(self, p: Pass, before: Graph, after: Graph, verdicts: Sequence[Verdict]) -> None:
        """Take down what the gates say of the graph that a pass made."""
        failed = tuple(str(v) for v in verdicts if not v.passed)
        if not failed or not self.active:
            self.at = None
        elif self.at is None:
            self.at = _Break(p, before, after, failed)

    def culprit(self, original: Graph, reference: Reference | None, target: Target) -> Culprit | None:
        """The pass, and the sites whose own error is largest; None where gates began to fail behind no pass."""
        if self.at is None or reference is None:
            return None
        p, before = self.at.what, self.at.before
        try:
            found = by_layer(before, self.at.after, reference.data, target, source=original)
        except OnnxcompError as e:
            return Culprit(p.name, str(p), self.at.failed, (), f"its sites could not be told apart: {e}")
        sites = {node: s.name for s in p.sites(before.clone(), target) for node in s.nodes}
        ranked = [*found.culprits, *(x for x in found.worst if x not in found.culprits)]
        suspects = dict[str, Suspect]()
        for x in ranked:
            name = _site(x, sites)
            suspects.setdefault(name, Suspect(name, x.reference.title, x.own, x.outstanding, x.reference.outputs))
        why = "" if found.culprits else "no site stands out: the error is spread over all that it changed"
        why = "most of what it changed has nothing in common with what was there before" if found.unrelated else why
        return Culprit(p.name, str(p), self.at.failed, tuple(suspects.values())[:SHOWN], why)


def not_bisected(verdicts: Sequence[Verdict], steps: Sequence[Step]) -> str:
    """Why no pass is named for gates that the written file failed; for a size what each pass left of the constants."""
    failed = [v.gate for v in verdicts if not v.passed]
    gates = ", ".join(failed)
    left = ", ".join(f"{s.name} {size_text(s.nbytes[1])}" for s in steps if s.nbytes[0] != s.nbytes[1])
    why = f"--bisect names no pass for {gates}, judged on the written file behind all passes"
    sized = left and any(Condition.parse(gate).name == "size" for gate in failed)
    return f"{why}; constants were {size_text(steps[0].nbytes[0])}, behind {left}" if sized else why


def _site(x: Compared, sites: dict[str, str]) -> str:
    """The site that a value belongs to, else the node that makes it."""
    return sites.get(x.reference.node) or sites.get(x.candidate.node) or x.candidate.node
