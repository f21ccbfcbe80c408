"""Two model files on one data source, judged by gates: what `onnxcomp validate` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.engine.asked import check_asked
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import RecipeError
from onnxcomp.files import storage
from onnxcomp.reports.json_report import finite, quality
from onnxcomp.reports.outcome import Report
from onnxcomp.runtime.integer import counted, saturating
from onnxcomp.validation.compare import validate
from onnxcomp.validation.gates import Gate, Verdict
from onnxcomp.validation.results import Validation

__all__ = ["Compared", "compare"]


@dataclass(frozen=True)
class Compared:
    """A validation with the verdicts of the gates."""

    validation: Validation
    verdicts: tuple[Verdict, ...]

    def json(self) -> dict[str, Any]:
        """Plain values."""
        whole = {**self.validation.json(), "verdicts": [dataclasses.asdict(v) for v in self.verdicts]}
        plain: dict[str, Any] = finite(whole)
        return plain

    @property
    def report(self) -> Report:
        """The same as a report without steps."""
        return Report(verdicts=list(self.verdicts), validation=self.validation)

    def headline(self) -> str:
        """Metrics and drift in one line, and below it what must be known to read them."""
        return "\n".join([", ".join(quality(self.validation)), *self.validation.notes])

    @property
    def refused(self) -> str:
        """What a gate refuses, empty if nothing."""
        return "; ".join(str(v) for v in self.verdicts if not v.passed)


def compare(
    reference: Path,
    candidate: Path,
    settings: Settings,
    *,
    metrics: Sequence[str] = (),
    gates: Sequence[str] = (),
    graph: str | None = None,
) -> Compared:
    """Run both models on the settings' evaluation data and judge the candidate; metrics of gates are computed too."""
    gate = Gate(gates)
    if gate.wants_latency:
        raise RecipeError("validate times nothing, so it cannot judge a latency gate: drop it, or see onnxcomp bench")
    first, second = (storage.read(storage.one_graph(x, graph)) for x in (reference, candidate))
    check_asked(first.graph, gate, ())
    data = settings.dataset(settings.evaluation, first.graph, first.path.parent)
    assert data is not None, "there is nothing to judge on"
    wanted = list(dict.fromkeys([*metrics, *gate.metrics]))
    v = validate(first, second, data, settings.target, wanted, allow_code=settings.allow_code)
    if settings.target.quantized.saturates and (broken := saturating(second.graph.model)):
        can = "on this CPU sums of their products can saturate at 16 bits, and these figures show it"
        v = dataclasses.replace(v, notes=(*v.notes, f"{counted(broken)} int8: {can}"))
    sizes = {"size": second.nbytes / max(1, first.nbytes)}
    return Compared(v, (*gate.judge(v.values()), *gate.judge(sizes, files=True)))
