"""Trial cuts: what the model loses when one layer alone is cut and repaired in closed form.

At a few amounts they make the error curve of a layer (`ranking: curves`); at one half they scale its scores, so that
those of different layers compare (`ranking: sensitivity`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array
from onnxcomp.maths.allocation import Candidate, best, choose, ladder
from onnxcomp.maths.error_curves import Curve
from onnxcomp.methods.quantize.site_options import loss_of, metric_of
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.readers import Reader, Repair
from onnxcomp.pipeline import Edit, Env

__all__ = ["CURVE_SAMPLES", "SAMPLES", "curves", "scaled"]

TRIAL_SHARE = 0.5  # share of a layer's units in its trial cut: far from none and all, near ratios that are asked for
SAMPLES = 64  # calibration samples of a trial cut: losses of layers differ by far more than those of samples
# Shares of a layer's units that its curve is measured at. Scores give the form in between; what they do not know is how
# fast the loss grows where a layer runs out of units that others replace.
CURVE_SHARES = (0.15, 0.3, 0.5, 0.75)
CURVE_SAMPLES = 128  # calibration samples of a curve: amounts of a layer differ by less than layers do
LEAST_LOSS = 1e-12  # in place of a loss of zero, which would make all units of a layer equal and lose their order

Part = tuple[Group, tuple[Reader, ...]]


def curves(
    g: Graph,
    parts: Sequence[Part],
    candidates: Sequence[Candidate],
    env: Env,
    metric: str | None,
    how: Repair,
    droppable: Collection[int] = (),
) -> list[Curve]:
    """The error curve of every layer: the model's loss at a few amounts of each, on samples left out of the repair.

    Of `droppable` ones (by number) nothing need stay: their curves go down to no unit. Losses are on a scale on which
    small ones of several layers add: divergences, and squares of errors.
    """
    name = metric_of(g, metric)
    kept = [[n for n in ladder(c, [1 - s for s in CURVE_SHARES]) if n < c.units] for c in candidates]
    kept = [[0, *n] if i in droppable else n for i, n in enumerate(kept)]
    edits = [
        _without(parts[i], np.setdiff1d(np.arange(c.units), best(c, n)), env, how)
        for i, c in enumerate(candidates)
        for n in kept[i]
    ]
    judge = env.unseen() or env  # a repair hides what a cut costs on the samples that it was fitted to
    found = iter(judge.evaluate(edits, metric, CURVE_SAMPLES))
    losses = [[loss_of(next(found).value, name) for _ in numbers] for numbers in kept]
    return [Curve(c, tuple(n), tuple(x)) for c, n, x in zip(candidates, kept, losses, strict=True)]


def scaled(
    g: Graph, parts: Sequence[Part], candidates: Sequence[Candidate], env: Env, metric: str | None, how: Repair
) -> list[Candidate]:
    """The candidates with scores in units of the model's loss, by one trial cut of each layer on few samples.

    The lower half of a layer's units is zeroed and its readers repaired, one layer at a time; its scores are scaled so
    that those of the zeroed units sum to the loss.
    """
    if len(candidates) < 2:
        return list(candidates)
    removed = [
        np.setdiff1d(np.arange(c.units), k) for c, k in zip(candidates, choose(candidates, TRIAL_SHARE), strict=True)
    ]
    tried = [i for i, units in enumerate(removed) if units.size]
    edits = [_without(parts[i], removed[i], env, how) for i in tried]
    losses = {i: s.value for i, s in zip(tried, env.evaluate(edits, metric, SAMPLES), strict=True)}
    scales = {
        i: max(loss, LEAST_LOSS) / max(float(candidates[i].scores[removed[i]].sum()), LEAST_LOSS)
        for i, loss in losses.items()
    }
    return [dataclasses.replace(c, scores=c.scores * scales.get(i, 1.0)) for i, c in enumerate(candidates)]


def _without(part: Part, removed: Array, env: Env, how: Repair) -> Edit:
    """An edit that zeroes some units of a group, with each of its readers repaired on its own."""
    group, consumers = part

    def edit(g: Graph) -> None:
        kept = np.setdiff1d(np.arange(group.units), removed)
        for reader in readers.inside(g, consumers):
            if kept.size:
                readers.repair(g, reader, kept, env.stats, how)
            elif reader.bias(g) is not None:  # what comes before can take over the mean of what is left out
                readers.repair(g, reader, kept, env.stats, "none" if how == "none" else "bias")
        readers.silence(g, group, removed)

    return edit
