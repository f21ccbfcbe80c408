"""How much each unit of a group matters: one function a score, `[units]`, the lowest are removed first.

`W [K, N]` is a weight whose in-channels are the group's axis, `X [R, K]` its inputs on the calibration data; a unit is
one or more in-channels. `SCORES` are those computed from one consumer and its statistics, which `NEEDS` lists.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import STAYS, Group
from onnxcomp.maths import Array, Float64, scores
from onnxcomp.maths.elimination import elimination
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.readers import Reader
from onnxcomp.pipeline import Edit, Env
from onnxcomp.stats import Need, Stats, gram, mean, norm2, var

__all__ = ["NEEDS", "SCORES", "ablation", "energy", "flap", "magnitude", "wanda"]

MOST_VARIANTS = 2048  # units of one group at most for ablation, which runs the model once for each


def magnitude(g: Graph, group: Group) -> Float64:
    """L2 norm of all weights that read or write a unit (group norm, Fang et al., DepGraph, 2023, arXiv 2301.12900)."""
    squares = np.zeros(group.units)
    for slot in group.slots:
        a = readers.numbers(g, g.value(slot.value)) if slot.reads or slot.writes else None
        if a is None:
            continue
        of_channel = np.square(a.astype(np.float64)).sum(axis=tuple(i for i in range(a.ndim) if i != slot.axis))
        units = np.asarray(slot.units)
        squares += np.bincount(units[units != STAYS], of_channel[units != STAYS], group.units)
    return np.asarray(np.sqrt(squares))


def wanda(weight: Array, consumer: Reader, stats: Stats, count: int) -> Float64:
    """Sum over a unit's weights of `|W_kn| ||X_k||_2` (Sun et al., Wanda, 2023, arXiv 2306.11695, eq. 1)."""
    of_weights = scores.wanda(weight, consumer.norm2(stats))
    return scores.per_unit(of_weights.sum(axis=1), consumer.units, count)


def flap(weight: Array, consumer: Reader, stats: Stats, count: int) -> Float64:
    """Mean over a unit's in-channels of `Var(X_k) ||W_k||^2` (An et al., FLAP, 2023, arXiv 2312.11983, eq. 4)."""
    of_channels = scores.flap(consumer.var(stats), weight)
    return scores.per_unit(of_channels, consumer.units, count, mean=True)


def energy(weight: Array, consumer: Reader, stats: Stats, count: int) -> Float64:
    """Squared error of `X W` that removing a unit adds when the units that stay are refitted (`maths.elimination`)."""
    return elimination(consumer.gram(stats), weight, consumer.units, count)


def ablation(group: Group, env: Env, metric: str | None, owner: str) -> Float64:
    """How far the model's outputs move when one unit is set to zero, one run of the model for each.

    Raises `RecipeError`, in the name of the pass `owner`, for groups of more than `MOST_VARIANTS` units.
    """
    if group.units > MOST_VARIANTS:
        raise RecipeError(f"{owner}: score ablation would run the model {group.units} times for one layer; use energy")
    return np.array([s.value for s in env.evaluate([_without(group, u) for u in range(group.units)], metric)])


def _without(group: Group, unit: int) -> Edit:
    """An edit that zeroes the weights which read one unit."""
    return lambda g: readers.silence(g, group, np.array([unit]))


SCORES: dict[str, Callable[[Array, Reader, Stats, int], Float64]] = {
    "wanda": wanda,
    "fluctuation": flap,
    "energy": energy,
}
NEEDS: dict[str, list[Callable[[str], Need]]] = {
    "wanda": [norm2],
    "fluctuation": [var, mean],
    "energy": [gram],
    "magnitude": [],
    "ablation": [],
}
"""By score, the statistics of each consumer's inputs."""
