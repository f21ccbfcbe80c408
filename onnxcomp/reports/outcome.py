"""What came of a pipeline: steps, verdicts, measurements, and the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.files.storage import save
from onnxcomp.graph import Declined, Graph, Noted
from onnxcomp.lowering.choices import Choice
from onnxcomp.validation.gates import Verdict

if TYPE_CHECKING:
    from onnxcomp.benchmarking.benchmark import BenchReport
    from onnxcomp.runtime.placement import Placement
    from onnxcomp.runtime.sessions import IntegerCheck
    from onnxcomp.validation.compare import Validation

__all__ = ["Report", "Result", "Step"]


@dataclass
class Step:
    """What one pass did: sites eligible and changed, what it declined and why, sizes, drift from the original.

    `choosing` is the part of `seconds` that went into choosing among forms, by the clock or from what is remembered.
    """

    name: str
    spec: str
    fidelity: str
    eligible: int = 0
    changed: int = 0
    edits: int = 0
    declined: list[Declined] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)
    nbytes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    choosing: float = 0.0
    peak_mib: float = 0.0
    drift: dict[str, Any] | None = None
    rolled_back: str = ""
    cached: bool = False
    choices: list[Choice] = field(default_factory=list)
    noted: list[Noted] = field(default_factory=list)


@dataclass
class Report:
    """All that was done, declined and measured; `report.py` writes it as tables and versioned JSON."""

    steps: list[Step] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    validation: Validation | None = None
    integer: IntegerCheck | None = None
    warnings: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    benchmark: BenchReport | None = None
    placement: Placement | None = None

    def step(self, name: str) -> Step:
        """The last step of that pass; raises `KeyError`."""
        for s in reversed(self.steps):
            if s.name == name:
                return s
        raise KeyError(name)


@dataclass
class Result:
    """The compressed model with its report, and what it was before lowering, where that changed it.

    `exact` is the original as the exact passes before any lossy one left it. `config` are the entries of a
    configuration beside the model that the result has otherwise, such as head counts.
    """

    model: Graph
    report: Report
    unlowered: Graph | None = None
    exact: Graph | None = None
    config: dict[str, int] = field(default_factory=dict)

    def save(self, out: str | Path) -> Path:
        """Write the model atomically; returns its path."""
        return save(self.model, Path(out), metadata=self.report.info.get("metadata", {}))
