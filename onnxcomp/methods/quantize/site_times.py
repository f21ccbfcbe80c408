"""How long each linear takes by each way to store its weight: small models of one linear, measured on the target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxcomp.blocks import Linear
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.methods.quantize import payoff
from onnxcomp.methods.quantize.site_options import Static, Unit, Way, named
from onnxcomp.methods.quantize.weight_rounding import Method
from onnxcomp.pipeline import Env

__all__ = ["seconds"]


def seconds(budget: str, env: Env, found: Sequence[Unit], ways: Sequence[Way]) -> dict[str, list[float]]:
    """Seconds of every option of every weight, by the name of the unit: the mean over the asked shapes.

    Linears of equal sizes are timed once. Raises `RecipeError` where a time is not known.
    """
    table = {}
    for u in found:
        times = [_of(budget, env, x, ways) for x in u.readers]
        table[u.name] = [sum(column) for column in zip(*times, strict=True)]
    return table


def _of(budget: str, env: Env, x: Linear, ways: Sequence[Way]) -> list[float]:
    """Seconds of one linear by each option."""
    if not env.measures:
        raise _unknown(budget, "this run measures nothing (--no-measure, or the target is not on this machine)")
    shapes = env.dims(x.source)
    if not shapes:
        raise _unknown(budget, "a size of an input is open: give every open axis with --shape")
    forms = {named(m): _model(x, m, env) for m in ways}
    total = [0.0] * len(ways)
    for shape in shapes:
        costs = env.cost(x.site, forms, {"x": (1, math.prod(shape[:-1]), shape[-1])})
        for i, cost in enumerate(costs):
            if cost.seconds is None or cost.source == "table":
                raise _unknown(budget, "the time for measuring is used up: give more with --budget")
            total[i] += cost.seconds / len(shapes)
    return total


def _model(x: Linear, m: Way, env: Env) -> Graph:
    (k, n), biased = x.sizes, x.bias is not None
    if isinstance(m, Method):
        return payoff.coded(k, n, biased, m.bits, m.block, env.target, zeros=not m.symmetric)
    return payoff.models([x], env.target)["int8" if isinstance(m, Static) else "float"]


def _unknown(budget: str, why: str) -> RecipeError:
    return RecipeError(f"budget {budget} needs the time of each linear, but {why}; say a size (1.05x, 12MB) instead")
