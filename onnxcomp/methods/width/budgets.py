"""How much a width pass cuts for a budget: parameters and multiplications are counted, latency is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.graph import Graph, Site, extract
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.allocation import LARGEST_RATIO, Candidate, isotonic, ladder, least_ratio
from onnxcomp.methods.quantize import payoff

if TYPE_CHECKING:
    from onnxcomp.pipeline import Env

__all__ = ["Budget", "Clock", "Currency", "Keeps", "currencies", "no_clock", "out_of_reach", "ratio", "timed"]

Keeps = Sequence[Array]
LEAST_SECONDS = 1e-7  # of a form: dispatch of a node takes as much, and less is noise of the subtraction below


@dataclass(frozen=True)
class Budget:
    """The share that may remain, under the name of its option; `remaining` is the share that given kept units leave."""

    name: str
    share: float
    remaining: Callable[[Keeps], float]


@dataclass(frozen=True)
class Currency:
    """A budget with what group `i` costs at `n` units in its currency, as a share of all that counts."""

    budget: Budget
    cost: Callable[[int, int], float]


def counted(name: str, share: float, g: Graph, groups: Sequence[Group], count: Callable[..., int]) -> Currency:
    """A budget of what `count(g, cuts)` counts (`coupling.sizes`)."""
    total = count(g)
    units = [max(1, total - count(g, [(x, np.arange(x.units - 1))])) / total for x in groups]
    budget = Budget(name, share, lambda keeps: count(g, zip(groups, keeps, strict=True)) / total)
    return Currency(budget, lambda i, n: units[i] * n)


def ratio(owner: str, unit: str, budgets: Sequence[Budget], choose: Callable[[float], Keeps]) -> float:
    """The smallest ratio that meets every budget; raises `RecipeError` where none does."""
    return max((_ratio(owner, unit, b, choose) for b in budgets), default=0.0)


def _ratio(owner: str, unit: str, budget: Budget, choose: Callable[[float], Keeps]) -> float:
    least = least_ratio(lambda r: budget.remaining(choose(r)) <= budget.share)
    if least is None:
        raise out_of_reach(owner, unit, budget, choose(LARGEST_RATIO))
    return least


def out_of_reach(owner: str, unit: str, budget: Budget, least: Keeps) -> RecipeError:
    """The refusal of a budget that even the `least` that may be kept exceeds."""
    return RecipeError(
        f"{owner}: {budget.name}={budget.share:g} cannot be reached: with all {unit} cut that may go, "
        f"{budget.remaining(least):.0%} stay; ask for more, or let another pass cut as well"
    )


def currencies(
    g: Graph,
    groups: Sequence[Group],
    shares: Mapping[str, float | None],
    latency: float | None,
    clock: Clock | None,
) -> list[Currency]:
    """The budgets that are asked for: `shares` of parameters and multiplications, and of measured time."""
    counts = {"parameters": parameters, "macs": macs}
    given = [counted(name, share, g, groups, counts[name]) for name, share in shares.items() if share is not None]
    return given if latency is None or clock is None else [*given, by_clock(latency, clock)]


def by_clock(share: float, clock: Clock) -> Currency:
    """A budget of measured seconds; every asked shape counts the same."""
    total = sum(row[:, -1] for row in clock.seconds)
    return Currency(Budget("latency", share, clock.share), lambda i, n: float(np.mean(clock.at(i, n) / total)))


# ---- by the clock ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Seconds of every group `[shapes, widths]` at the measured numbers of units; between them it is linear."""

    widths: tuple[tuple[int, ...], ...]
    seconds: tuple[Float64, ...]

    def at(self, i: int, units: int) -> Float64:
        """Predicted seconds of one group, at every asked shape."""
        return np.array([np.interp(units, self.widths[i], row) for row in self.seconds[i]])

    def share(self, keeps: Keeps, of: int | None = None) -> float:
        """Share of the time that remains, of all groups or of one; every asked shape counts the same."""
        every = range(len(keeps)) if of is None else [of]
        after = sum(self.at(i, len(keeps[i])) for i in every)
        return float(np.mean(after / sum(row[:, -1] for row in (self.seconds[i] for i in every))))

    def describe(self, keeps: Keeps, i: int) -> str:
        """The prediction for one group, for its note."""
        return f"predicted {self.share(keeps, i):.0%} of its time ({self.share(keeps):.0%} of all sites)"


def no_clock(owner: str, share: float, why: str) -> RecipeError:
    """The refusal of a latency budget that cannot be measured."""
    return RecipeError(f"{owner}: latency={share:g} needs the clock, but {why}; say macs={share:g} instead")


def timed(
    owner: str, share: float, g: Graph, groups: Sequence[Group], candidates: Sequence[Candidate], env: Env
) -> Clock:
    """Measure the time of each group at a few widths, as micro-models of its linears and attention.

    Groups of equal sizes are timed once. Raises `RecipeError` where nothing is measured, or a size is not known.
    """
    if not env.measures:
        raise no_clock(owner, share, "this run measures nothing (--no-measure, or the target is not on this machine)")
    if not env.shapes:
        raise no_clock(owner, share, "a size of an input is open: give every open axis with --shape")
    linears, widths = blocks.linears(g, tied=True), [ladder(c) for c in candidates]
    try:
        seconds = [_curves(g, x, w, linears, env) for x, w in zip(groups, widths, strict=True)]
    except ModelError as e:
        raise no_clock(owner, share, str(e)) from e
    return Clock(tuple(map(tuple, widths)), tuple(seconds))


def _curves(g: Graph, group: Group, widths: Sequence[int], linears: Sequence[Linear], env: Env) -> Float64:
    """Seconds of one group `[shapes, widths]`, never less for more units; raises `ModelError` without a time."""
    total = np.zeros((len(env.shapes), len(widths)))
    for same in blocks.siblings(x for x in linears if any(s.value == x.weight.name for s in group.slots)):
        total += _products(same, group, widths, env)
    for slot in group.attrs:
        if slot.name == "q_num_heads":
            node = next(n for n in g.nodes() if n.name == slot.node)
            total += _attention(g, node, env)[:, None] * np.array(widths) / group.units
    if not total.any():
        raise ModelError("nothing that the clock can time, such as a linear, reads or makes what is cut")
    return np.stack([isotonic(row) for row in total])


def _products(same: Sequence[Linear], group: Group, widths: Sequence[int], env: Env) -> Float64:
    """Seconds of linears of one input `[shapes, widths]`."""
    for x in same:
        if x.quantized or x.source.dtype is not ir.DataType.FLOAT:
            raise ModelError(f"linear '{x.name}' is not in float32, and only such are timed (prune before that)")
    sizes = {f"x{n}": _sizes(same, group, n) for n in widths}
    forms = {name: payoff.products(*size, name) for name, size in sizes.items()}
    rows = []
    for dims in _known(same[0].source, env):
        shapes = {name: (1, math.prod(dims[:-1]), fan_in) for name, (fan_in, _) in sizes.items()}
        rows.append(_seconds(same[0].site, forms, shapes, env))
    return np.array(rows)


def _sizes(same: Sequence[Linear], group: Group, units: int) -> tuple[int, list[tuple[int, bool]]]:
    """Fan-in of linears of one input when so many units stay, and each one's fan-out and whether it has a bias."""
    keep = np.arange(units)
    cut = {(s.value, s.axis): int(s.kept(keep).sum()) for s in group.slots}

    def size(x: Linear, out: int) -> int:
        return cut.get((str(x.weight.name), out ^ x.transposed), x.sizes[out])

    return size(same[0], 0), [(size(x, 1), x.bias is not None) for x in same]


def _attention(g: Graph, node: ir.Node, env: Env) -> Float64:
    """Seconds of one uncut attention `[shapes]`, as the standard operator."""
    model = extract.extract_subgraph(g, [node], [node.outputs[0]])
    dims = {str(v.name): _known(g.value(str(v.name)), env) for v in model.inputs}
    site = Site(str(node.name), (str(node.name),), "attention")
    shapes = [{name: d[i] for name, d in dims.items()} for i in range(len(env.shapes))]
    return np.array([_seconds(site, {"attention": model}, s, env) for s in shapes])[:, 0]


def _known(v: ir.Value, env: Env) -> list[tuple[int, ...]]:
    if not (dims := env.dims(v)):
        raise ModelError(f"the size of '{v.name}' at the asked shapes is not known before the model runs")
    return dims


def _seconds(site: Site, forms: Mapping[str, Graph], shapes: Mapping[str, Sequence[int]], env: Env) -> list[float]:
    """Measured seconds of each form less those of calling the runtime, which a model pays once for all its nodes."""
    call = payoff.products(1, [(1, False)], "x0")
    empty, *others = env.cost(site, {"call": call, **forms}, {"x0": (1, 1, 1), **shapes})
    measured = [c.seconds for c in (empty, *others) if c.source != "table" and c.seconds is not None]
    if len(measured) <= len(others):
        raise ModelError("a --choices file is used, and it holds no times for these sizes")
    return [max(seconds - measured[0], LEAST_SECONDS) for seconds in measured[1:]]
