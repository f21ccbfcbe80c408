"""Error on calibration samples that no fit has read, beside that on the evaluation data: are they of one kind?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.compared import compared
from onnxcomp.engine.walk import Walk
from onnxcomp.graph import Graph
from onnxcomp.maths import Float64
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step
from onnxcomp.reports.tables import level_text
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["beside_left_out", "differs", "few_samples", "other_kinds"]

SAMPLES = 64  # left-out samples that are run at most: errors of kinds of data differ by more than those of samples
FEWEST = 16  # samples; fewer say nothing of the worst ones, and repairs fit all that they see
LEAST = 1.5  # times that errors differ by before anything is said: 1.8 dB, which nobody calibrates anew for
MOST = 512  # samples of the evaluation data that are divided anew: more add time, not certainty
DRAWS = 999  # permutations: the smallest share they can show is 0.001
# Share of random divisions of all samples whose errors differ as much, below which the difference is no chance. A job
# with three passes that fit then says it of one set in a hundred or fewer, since their errors go together.
CHANCE = 0.01
AUGMENTED = "augment: true"
OTHERWISE = f"; where there are none, '{AUGMENTED}' of a pass that cuts widths of a model of texts loses less on them"
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
    walk.left_out = walk.left_out or refer(
        walk.original, left_out.calibration.spread(SAMPLES), [], walk.scratch / "left-out-samples"
    )
    unseen = compared(walk.left_out, work, p.name)
    here, there = unseen.values(), validation.values()
    metric = next((m for m in METRICS if m in here and m in there), None)
    if metric is None or not all(map(math.isfinite, (here[metric], there[metric]))):
        return
    output = max(validation.by_sample, key=lambda k: _mean(validation.by_sample[k].get(metric)))
    errors = [v.by_sample.get(output, {}).get(metric, np.zeros(0)) for v in (unseen, validation)]
    power = _power(metric, there[metric]) / max(_power(metric, here[metric]), np.finfo(float).tiny)
    shown = {"left_out": here[metric], "evaluation": there[metric]}
    other = power >= LEAST and differs(*errors)
    step.drift["left_out"] = {"metric": metric, **shown, "samples": unseen.samples, "other_kind": other}


def other_kinds(steps: Iterable[Step]) -> list[str]:
    """What a user should know of fits whose calibration data is of another kind than the evaluation data."""
    found = [(s, said) for s in steps if s.drift and (said := s.drift.get("left_out")) and said["other_kind"]]
    return [
        f"pass '{s.name}': the error on the evaluation data ({level_text(said['metric'], said['evaluation'])}) is "
        f"larger than on calibration samples that no fit has read ({level_text(said['metric'], said['left_out'])}), by "
        "more than noise: the calibration data may be of another kind. Calibrate on samples like those the model will "
        "see (not the evaluation samples themselves), or on both kinds" + ("" if AUGMENTED in s.spec else OTHERWISE)
        for s, said in found
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


def differs(here: Float64, there: Float64) -> bool:
    """Whether the errors of samples there are larger than those here by more than the division of samples explains.

    A permutation test of the ratio of the means, which asks nothing of how errors are distributed: where a few samples
    have most of the error, most divisions differ.
    """
    if min(len(here), len(there)) < FEWEST or not here.mean() > 0 or there.mean() < LEAST * here.mean():
        return False
    there = there[:: -(-len(there) // MOST)]
    pooled = np.concatenate([here, there])
    drawn = np.random.default_rng(0).permuted(np.tile(pooled, (DRAWS, 1)), axis=1)
    # Of one set the larger the mean of a part the smaller that of the rest: means of the first part order the ratios.
    as_far = int((drawn[:, : len(here)].mean(axis=1) <= here.mean()).sum())
    return (as_far + 1) / (DRAWS + 1) < CHANCE


def _mean(errors: Float64 | None) -> float:
    return float(np.nan_to_num(errors.mean())) if errors is not None and errors.size else 0.0


def _power(metric: str, value: float) -> float:
    """An error as a power: a divergence as it is, decibels as noise relative to the signal."""
    return value if metric == "kl" else float(10 ** (-value / 10))
