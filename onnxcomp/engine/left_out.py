"""Error on calibration samples that no fit has read, beside that on the evaluation data: are they of one kind?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.compared import compared
from onnxcomp.engine.walk import Walk
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step
from onnxcomp.reports.tables import level_text
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["beside_left_out", "differs", "few_samples", "other_kinds"]

SAMPLES = 64  # left-out samples that are run at most: errors of kinds of data differ by more than those of samples
HALVINGS = 2  # of the left-out samples: the errors of four parts say how large the noise is
FEWEST = 16  # samples; fewer say nothing of the worst ones, and repairs fit all that they see
LEAST = (
    2.0  # decibel that errors differ by before anything is said; halves of one set differ by up to 1.5 at 64 samples
)
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
    sizes = [r.samples for r in walk.left_out]
    powers = [_power(metric, e[metric]) for e in errors]
    here, there = float(np.average(powers, weights=sizes)), _power(metric, validation.values()[metric])
    if not all(map(math.isfinite, (here, there))):
        return
    other = differs(powers, here, there, sum(sizes), sum(sizes) / len(sizes) / validation.samples)
    shown = {"left_out": _unit(metric, here), "evaluation": _unit(metric, there)}
    step.drift["left_out"] = {"metric": metric, **shown, "samples": sum(sizes), "other_kind": other}


def other_kinds(steps: Iterable[Step]) -> list[str]:
    """What a user should know of fits whose calibration data is of another kind than the evaluation data."""
    found = [(s.name, said) for s in steps if s.drift and (said := s.drift.get("left_out")) and said["other_kind"]]
    return [
        f"pass '{name}': the error on the evaluation data ({level_text(said['metric'], said['evaluation'])}) is "
        f"larger than on calibration samples that no fit has read ({level_text(said['metric'], said['left_out'])}), by "
        "more than noise: the calibration data may be of another kind. Calibrate on samples like those the model will "
        "see (not the evaluation samples themselves), or on both kinds"
        for name, said in found
    ]


def few_samples(passes: Iterable[Pass], steps: Iterable[Step], calibration: Dataset | None) -> list[str]:
    """What a user should know of passes that chose or fitted by very few samples."""
    changed = {s.name for s in steps if s.changed and s.fidelity == "lossy"}
    names = [p.name for p in passes if p.wants_data and p.name in changed]
    if calibration is None or not names or (count := len(calibration)) >= FEWEST:
        return []
    samples = "1 calibration sample" if count == 1 else f"{count} calibration samples"
    return [
        f"{samples}: what {', '.join(dict.fromkeys(names))} chose and "
        f"fitted may hold for {'it' if count == 1 else 'them'} alone; give {FEWEST} or more, better 100"
    ]


def differs(parts: Sequence[float], here: float, there: float, samples: int, share: float) -> bool:
    """Whether the error `there` is larger than `here`, the mean of `parts` of the samples, by more than noise.

    Errors are powers: a few samples can have most of the error, so it must be larger than that of the worst part too.
    `samples` are those of all parts, and `share` is the size of a part relative to the samples there.
    """
    if samples < FEWEST or len(parts) < 2 or min(*parts, here, there) <= 0:
        return False
    level, levels = 10 * math.log10(there), 10 * np.log10(parts)
    noise = float(np.std(levels, ddof=1)) * math.sqrt(1 / len(parts) + share)
    above = level - 10 * math.log10(here)
    return above > max(LEAST, ERRORS * noise) and level - float(levels.max()) > LEAST


def _parts(data: Dataset) -> list[Dataset]:
    """The samples in four parts, in two or one where they are few."""
    parts = [data]
    for _ in range(HALVINGS):
        try:
            parts = [half for part in parts for half in part.split(2)]
        except DataError:
            break
    return parts


def _power(metric: str, value: float) -> float:
    """An error as a power, which can be averaged: a divergence as it is, decibels as noise relative to the signal."""
    return value if metric == "kl" else 10 ** (-value / 10)


def _unit(metric: str, power: float) -> float:
    """A power in the unit of its metric."""
    return power if metric == "kl" or power <= 0 else -10 * math.log10(power)
