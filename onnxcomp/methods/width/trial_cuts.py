"""Scores comparable between layers: each layer's scaled to the loss of the model when half of the layer is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array
from onnxcomp.maths.allocation import Candidate, choose
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.readers import Reader, Repair
from onnxcomp.pipeline import Edit, Env

__all__ = ["SAMPLES", "scaled"]

TRIAL_SHARE = 0.5  # share of a layer's units in its trial cut: far from none and all, near ratios that are asked for
SAMPLES = 64  # calibration samples of a trial cut: losses of layers differ by far more than those of samples
LEAST_LOSS = 1e-12  # in place of a loss of zero, which would make all units of a layer equal and lose their order

Part = tuple[Group, tuple[Reader, ...]]


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
            readers.repair(g, reader, kept, env.stats, how)
        readers.silence(g, group, removed)

    return edit
