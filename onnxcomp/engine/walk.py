"""The state of one run of the pass manager."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.bisect import Bisection
from onnxcomp.engine.exactness import Exactness
from onnxcomp.engine.resume import StepCache
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.lowering.planner import Planner
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Report
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation
from onnxcomp.validation.variants import Variants

__all__ = ["Shared", "Walk"]


LEFT_OUT = 8
MOST_LEFT_OUT = 128
LEAST_SAMPLES = 16  # of fewer all are needed for the fit


@dataclass
class Shared:
    """What several runs on one model, data and gates have in common: the original's answers, where they are `kept`.

    Without `advise` nothing is looked for that would let a refused result pass.
    """

    kept: bool = False
    advise: bool = True
    reference: Reference | None = None


@dataclass
class Walk:
    """The models, data and answers of one run, and what its passes have made so far."""

    original: Graph
    exact: Graph  # the original as the exact passes before any lossy one left it: passes know its values by name
    graph: Graph
    calibration: Dataset | None
    reference: Reference | None
    scratch: Path
    report: Report
    steps: StepCache
    planner: Planner | None = None
    costing: float = 0.0
    unlowered: Graph | None = None
    cut: Graph | None = None  # as the last pass that changes sizes left it: quantized products hide their sizes
    plain: Validation | None = None  # how far the unlowered model is from the original
    exactness: Exactness | None = None
    left_out: Reference | None = None  # of samples that no fit reads, by the original
    lossy: tuple[Pass, Graph] | None = None  # the last lossy pass that changed something, and the graph before it
    bisection: Bisection = field(default_factory=Bisection)
    variants: dict[tuple[str | None, int | None, int], Variants] = field(default_factory=dict)

    def fitted(self, p: Pass) -> tuple[Walk, Walk | None]:
        """This walk on the samples that a pass may fit to, and on those left out; None where it fits none, or few.

        One sample in `LEFT_OUT` is left out, of many at most `MOST_LEFT_OUT`.
        """
        count = len(self.calibration) if p.fits and self.calibration is not None else 0
        if count < LEAST_SAMPLES:
            return self, None
        fitted, left_out = self.parts(max(LEFT_OUT, -(-count // MOST_LEFT_OUT)))
        return (self, None) if fitted is self else (fitted, left_out)

    def parts(self, holdout: int) -> tuple[Walk, Walk]:
        """This walk on the calibration data without one sample in `holdout`, and on those; on all where it is short."""
        if self.calibration is None:
            return self, self
        try:
            fitted, left_out = self.calibration.split(holdout)
        except DataError:
            return self, self
        return (
            dataclasses.replace(self, calibration=fitted, scratch=self.scratch / "fitted"),
            dataclasses.replace(self, calibration=left_out, scratch=self.scratch / "left-out"),
        )
