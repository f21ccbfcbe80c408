"""Scores that compare layers: each layer's scaled to what cutting half of it costs the whole model."""

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

TRIAL = 0.5  # share of a layer that is silenced to see what it costs
SAMPLES = 64  # of the calibration data: layers differ by far more than samples do
LEAST = 1e-12  # a loss that counts as none, so that the order within a layer is kept

Part = tuple[Group, tuple[Reader, ...]]


def scaled(
    g: Graph, parts: Sequence[Part], found: Sequence[Candidate], env: Env, metric: str | None, how: Repair
) -> list[Candidate]:
    """The candidates with scores in units of the model's loss, one run of what follows each layer on few samples.

    The lower half of each layer's units is silenced, the rest repaired as it will be, each layer alone, and its scores
    are scaled so that those of the silenced units sum to that loss.
    """
    if len(found) < 2:
        return list(found)
    gone = [np.setdiff1d(np.arange(c.units), k) for c, k in zip(found, choose(found, TRIAL), strict=True)]
    tried = [i for i, units in enumerate(gone) if units.size]
    edits = [_without(parts[i], gone[i], env, how) for i in tried]
    losses = {i: s.value for i, s in zip(tried, env.evaluate(edits, metric, SAMPLES), strict=True)}
    scales = {i: max(loss, LEAST) / max(float(found[i].scores[gone[i]].sum()), LEAST) for i, loss in losses.items()}
    return [dataclasses.replace(c, scores=c.scores * scales.get(i, 1.0)) for i, c in enumerate(found)]


def _without(part: Part, gone: Array, env: Env, how: Repair) -> Edit:
    """An edit that silences some units of a group, with its readers repaired each for itself."""
    group, read = part

    def edit(g: Graph) -> None:
        kept = np.setdiff1d(np.arange(group.units), gone)
        for reader in readers.inside(g, read):
            readers.repair(g, reader, kept, env.stats, how)
        readers.silence(g, group, gone)

    return edit
