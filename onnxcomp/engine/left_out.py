"""Error on calibration samples that no fit has read, beside that on the evaluation data: are they of one kind?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.compared import compared
from onnxcomp.engine.walk import Walk
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["beside_left_out", "differs", "other_kinds"]

SAMPLES = 64  # left-out samples that are run at most: errors of kinds of data differ by more than those of samples
HALVINGS = 2  # of the left-out samples: the errors of four parts say how large the noise is
LEAST = 1.0  # decibel that errors differ by before anything is said
ERRORS = 3.0  # standard errors that they differ by then
METRICS = ("kl", "pooled-sqnr", "sqnr")  # the first that the model has is compared


def beside_left_out(
    walk: Walk,
    p: Pass,
    step: Step,
    work: Graph,
    validation: Validation,
    refer: Callable[[Graph, Dataset, Sequence[str], Path], Reference],
) -> None:
    """Put the error of a fitting pass on left-out samples beside that on the evaluation data, into the step's drift."""
    _, left_out = walk.fitted(p)
    if left_out is None or left_out.calibration is None or step.drift is None:
        return
    if not walk.left_out:
        parts = _parts(left_out.calibration.spread(SAMPLES))
        walk.left_out += [refer(walk.original, d, [], walk.scratch / f"left-out-{i}") for i, d in enumerate(parts)]
    errors = [compared(r, work, p.name).values() for r in walk.left_out]
    metric = next((m for m in METRICS if all(m in e for e in (*errors, validation.values()))), None)
    if metric is None:
        return
    here, noise, there = _levels(metric, errors, validation.values())
    sizes = [r.samples for r in walk.left_out]
    if not all(map(math.isfinite, (here, there))):
        return
    other = differs(here, there, noise, len(sizes), sum(sizes) / len(sizes) / validation.samples)
    shown = {"left_out": _shown(metric, here), "evaluation": _shown(metric, there)}
    step.drift["left_out"] = {"metric": metric, **shown, "samples": sum(sizes), "other_kind": other}


def other_kinds(steps: Iterable[Step]) -> list[str]:
    """What a user should know of fits whose calibration data is of another kind than the evaluation data."""
    found = [(s.name, said) for s in steps if s.drift and (said := s.drift.get("left_out")) and said["other_kind"]]
    return [
        f"pass '{name}': the error on the evaluation data ({said['evaluation']}) is larger than on calibration samples "
        f"that no fit has read ({said['left_out']}), by more than noise: the calibration data is of another kind. "
        "Calibrate on samples like those the model will see (not the evaluation samples themselves), or on both kinds"
        for name, said in found
    ]


def differs(here: float, there: float, noise: float, parts: int, share: float) -> bool:
    """Whether the error `there` is larger than `here` by more than noise, in decibels.

    `noise` is the standard deviation of the error of `parts` parts of the samples here, and `share` the size of a part
    relative to the samples there.
    """
    if parts < 2:
        return False
    return there - here > max(LEAST, ERRORS * noise * math.sqrt(1 / parts + share))


def _parts(data: Dataset) -> list[Dataset]:
    """The samples in four parts, in two or one where they are few."""
    parts = [data]
    for _ in range(HALVINGS):
        try:
            parts = [half for part in parts for half in part.split(2)]
        except DataError:
            break
    return parts


def _levels(
    metric: str, errors: Sequence[Mapping[str, float]], there: Mapping[str, float]
) -> tuple[float, float, float]:
    """Mean error of the parts, its standard deviation, and the error on the evaluation data, in decibels."""
    levels = [_decibel(metric, e[metric]) for e in errors]
    return (
        float(np.mean(levels)),
        float(np.std(levels, ddof=1)) if len(levels) > 1 else 0.0,
        _decibel(metric, there[metric]),
    )


def _decibel(metric: str, value: float) -> float:
    """An error on one scale, larger is worse."""
    if metric != "kl":
        return -value
    return 10 * math.log10(value) if value > 0 else -math.inf


def _shown(metric: str, level: float) -> str:
    return f"{10 ** (level / 10):.4f} kl" if metric == "kl" else f"{-level:.1f} dB {metric}"
