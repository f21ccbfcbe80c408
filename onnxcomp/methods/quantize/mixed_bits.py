"""The form of each weight under a budget of bytes, time or drift: by what its options lose, judged on the whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcomp import blocks
from onnxcomp.errors import GateFailed, ModelError, RecipeError
from onnxcomp.graph import Graph, Noted
from onnxcomp.maths.frontier import Frontier, Option
from onnxcomp.methods.quantize import mixed_context, site_options, site_times
from onnxcomp.methods.quantize.mixed_budget import Budget
from onnxcomp.methods.quantize.site_options import Choice, Moments, Static, Unit, Way, loss_of, named, nbytes
from onnxcomp.methods.quantize.static_sites import as_integers, ranges
from onnxcomp.methods.quantize.weight_rounding import Method, round_sites
from onnxcomp.pipeline import Env
from onnxcomp.validation.gates import Condition
from onnxcomp.validation.results import HIGHER_IS_BETTER

__all__ = ["Chosen", "apply", "choose", "rule_of_thumb"]

BLOCKWISE = 21  # the operator set from which DequantizeLinear has blocks and codes of 4 bits
TRIES = 6  # roundings of the whole model for a budget of drift: each costs as much as the result's own
CLOSE = 1.02  # bytes of the cheapest choice that passes over those of the costliest that fails, from which it is enough
SHOWN = 9  # points of the frontier in the report
ROUNDING = 1 + 1e-9  # of sums of costs


@dataclass(frozen=True)
class Chosen:
    """The option of each weight, and what was tried on the whole model, with the frontier, as notes."""

    ways: Choice
    notes: tuple[Noted, ...]


def choose(
    g: Graph, env: Env, found: Sequence[Unit], ways: Sequence[Way], base: Method, budget: Budget, metric: str | None
) -> Chosen:
    """The options that lose least within a budget of bytes or time, or the smallest ones that meet one of drift.

    Bytes are relative to those of all weights in the option `base`. Whatever the sums of losses say, the whole model
    decides, on calibration data that was left out. Raises `RecipeError` or `GateFailed` with the best that is reached.
    """
    whole = sum(nbytes(u.weight, base) for u in found)
    if budget.seconds is not None:
        costs = site_times.seconds(budget.text, env, found, ways)
    else:
        costs = {u.name: [float(nbytes(u.weight, m)) for m in ways] for u in found}
    if (
        len(ways) == 1
        and budget.condition is None
        and sum(x[0] for x in costs.values()) <= budget.limit(whole) * ROUNDING
    ):
        return Chosen({u.name: ways[0] for u in found}, ())  # nothing to choose, so nothing is measured
    split, metric = env.split(), site_options.metric_of(g, metric)
    moments = site_options.moments_of(g, split, found, ways)
    losses = site_options.measure(g, split, found, ways, base, metric, moments)
    table = {
        name: [Option(c, x) for c, x in zip(costs[name], losses[name], strict=True)] for name in losses
    }  # fmt: skip
    unit = _Unit(1e3, "ms") if budget.seconds is not None else _Unit(1 / whole, "bytes")
    case = _Case.of(g, split, found, ways, table, metric, unit, moments)
    if budget.condition is not None:
        return case.meeting(budget.condition)
    return case.within(budget.limit(whole), budget.text)


@dataclass(frozen=True)
class _Unit:
    """How costs are said: bytes relative to a base, or milliseconds; `scale` is by what they are multiplied."""

    scale: float
    name: str

    def said(self, cost: float) -> str:
        """In words."""
        return f"{cost * self.scale:.3f} ms" if self.name == "ms" else f"{cost * self.scale:.3f}x the bytes"

    def value(self, cost: float) -> dict[str, float]:
        """As a number by its name."""
        return {self.name: cost * self.scale if self.name == "ms" else cost}


@dataclass(frozen=True)
class _Case:
    """The weights of a model with their options, measured."""

    g: Graph
    env: Env
    found: Sequence[Unit]
    ways: Sequence[Way]
    table: Mapping[str, Sequence[Option]]
    front: Frontier
    metric: str
    unit: _Unit
    moments: Moments

    @classmethod
    def of(
        cls, g: Graph, env: Env, found: Sequence[Unit], ways: Sequence[Way], table: Mapping[str, Sequence[Option]],
        metric: str, unit: _Unit, moments: Moments,
    ) -> _Case:  # fmt: skip
        """With the frontier of the sums."""
        return cls(g, env, found, ways, table, Frontier.of([table[u.name] for u in found]), metric, unit, moments)

    def within(self, limit: float, text: str) -> Chosen:
        """Of the best sums of any options, one for all and the rule of thumb what loses least on the whole model."""
        at = self.front.within(limit)
        if at is None:
            least = float(self.front.costs[0])
            size = f"{self.unit.said(least)}" + (f", {least:,.0f} bytes" if self.unit.name == "bytes" else "")
            raise RecipeError(
                f"budget {text}: the smallest that these options reach is {size}; allow fewer bits or larger blocks"
            )
        uniform = {f"all {named(m)}": self._all(m) for m in self.ways}
        fitting = {"mixed": self._at(at)} | self._best(uniform, limit) | self._best(self._rule(), limit)
        losses = self._losses(fitting)
        if (again := self._in_context(fitting["mixed"], losses["mixed"])) is not None:
            context = {"mixed, in context": again._at(again.front.within(limit) or 0)}
            fitting, losses = fitting | context, losses | self._losses(context)
        ranked = sorted(losses, key=lambda name: losses[name])
        notes = [
            self._noted(name, fitting[name], f"loses {losses[name]:.3g} unfitted", {"loss": losses[name]})
            for name in ranked
        ]
        return Chosen(fitting[ranked[0]], (*notes, *self._points()))

    def meeting(self, condition: Condition) -> Chosen:
        """The smallest choice on the frontier that meets a condition, each tried with weights rounded as they will be.

        The predicted loss to aim at follows from the last measured one where that is on the same scale, else by halving
        its logarithm.
        """
        low, high = max(float(self.front.losses[-1]), site_options.LEAST), float(self.front.losses[0])
        bound = loss_of(-condition.bound if _higher(condition.name) else condition.bound, condition.name)
        aim = min(max(bound, low), high) if condition.name in site_options.LOSSES else math.sqrt(low * high)
        notes, passed, failed = list[Noted](), None, None
        for _ in range(TRIES):
            at = self.front.losing(aim * ROUNDING)
            at = len(self.front.losses) - 1 if at is None else at
            value = self._measured(at, condition.name)
            notes.append(self._noted("tried", self._at(at), f"{condition.name} {value:.4g}", {condition.name: value}))
            if condition.holds(value):
                passed, low = at, aim
            else:
                failed, high = at, aim
            costs = self.front.costs
            if passed == 0 or failed == len(costs) - 1:
                break
            if passed is not None and failed is not None and costs[passed] <= CLOSE * costs[failed]:
                break
            aim = math.sqrt(low * high)
        if passed is None:
            best = notes[-1].values[condition.name]
            raise GateFailed(
                f"budget {condition.text}: the best that these options reach is {condition.name} {best:.4g}"
            )
        return Chosen(self._at(passed), (*notes, *self._points()))

    def _losses(self, choices: Mapping[str, Choice]) -> dict[str, float]:
        """What the whole model loses by each choice, weights rounded to nearest."""
        edits = [site_options.plainly(self.found, c, self.moments, self.env.target) for c in choices.values()]
        scores = self.env.evaluate(edits, self.metric, site_options.SAMPLES)
        return {name: loss_of(s.value, self.metric) for name, s in zip(choices, scores, strict=True)}

    def _in_context(self, choice: Choice, loss: float) -> _Case | None:
        """The weights measured again with all others as chosen, where their losses do not add up to that of all."""
        if self.metric not in site_options.LOSSES or mixed_context.adds(self._sum(choice), loss):
            return None
        factors = mixed_context.factors(
            self.g, self.env, self.found, choice, loss, self.moments, self.metric,
            {name: self.table[name][self.ways.index(m)].loss for name, m in choice.items()},
        )  # fmt: skip
        table = {
            name: [dataclasses.replace(o, loss=o.loss * factors[name]) for o in options]
            for name, options in self.table.items()
        }
        return _Case.of(self.g, self.env, self.found, self.ways, table, self.metric, self.unit, self.moments)

    def _measured(self, at: int, name: str) -> float:
        def edit(g: Graph) -> None:
            apply(g, self.env.split(), self.found, self._at(at))

        score = self.env.evaluate([edit], name, None)[0].value
        return -score if _higher(name) else score

    def _at(self, at: int) -> Choice:
        picked = self.front.choice(at)
        return {u.name: self.ways[i] for u, i in zip(self.found, picked, strict=True)}

    def _best(self, choices: Mapping[str, Choice], limit: float) -> dict[str, Choice]:
        """That of the least sum of losses among those that fit, if any does."""
        fitting = [name for name, c in choices.items() if self._cost(c) <= limit * ROUNDING]
        best = min(fitting, key=lambda name: self._sum(choices[name]), default=None)
        return {} if best is None else {best: choices[best]}

    def _sum(self, choice: Choice) -> float:
        return sum(self.table[name][self.ways.index(m)].loss for name, m in choice.items())

    def _cost(self, choice: Choice) -> float:
        return sum(self.table[name][self.ways.index(m)].cost for name, m in choice.items())

    def _all(self, m: Way) -> Choice:
        return {u.name: m for u in self.found}

    def _rule(self) -> dict[str, Choice]:
        """8 bits where the rule of thumb wants them, each other option for all others."""
        eight = next((m for m in self.ways if isinstance(m, Method) and m.bits == 8), None)
        wanted = rule_of_thumb(self.g)
        if eight is None or not wanted:
            return {}
        others = [m for m in self.ways if m is not eight]
        return {
            f"rule of thumb, 8 bits and {named(m)}": {
                u.name: eight if any(x.name in wanted for x in u.readers) else m for u in self.found
            }
            for m in others
        }

    def _noted(self, name: str, choice: Choice, what: str, values: Mapping[str, float]) -> Noted:
        """A choice that was tried on the whole model, with its cost."""
        cost = self._cost(choice)
        return Noted(name, f"{self.unit.said(cost)}, {what}", {**self.unit.value(cost), **values})

    def _points(self) -> list[Noted]:
        """The frontier of predicted losses at even steps of the cost's logarithm."""
        costs = [float(c) for c in self.front.costs]
        steps = [costs[0] * (costs[-1] / costs[0]) ** (i / (SHOWN - 1)) for i in range(SHOWN)]
        places = sorted({self.front.within(c * ROUNDING) or 0 for c in steps})
        return [
            Noted(
                "frontier",
                f"{self.unit.said(costs[i])}, sum of losses {self.front.losses[i]:.3g}",
                {**self.unit.value(costs[i]), "loss": float(self.front.losses[i])},
            )
            for i in places
        ]


def rule_of_thumb(g: Graph) -> set[str]:
    """Linears that llama.cpp and onnxruntime-genai's `mixed_layers` give 8 bits: the head, values and outputs of MLPs.

    The latter in the first and last eighth of the layers and every third one between them.
    """
    layers, head = blocks.layers(g), blocks.head(g)
    n = len(layers)
    chosen = [x for i, x in enumerate(layers) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2]
    values = [a.v for x in chosen for a in x.attentions]
    found = {linear.name for linear in (*values, *(m.down for x in chosen for m in x.mlps))}
    return found if not found or head is None or head.linear is None else {*found, head.linear.name}


def apply(
    g: Graph, env: Env, found: Sequence[Unit], choice: Choice, *, tables: Sequence[blocks.Embedding] = ()
) -> None:
    """Write the weights as chosen: codes rounded towards what the original gives there, then those with int8 inputs."""
    if g.opset < BLOCKWISE:
        raise ModelError(f"operator set {g.opset} has no codes in blocks; put canonicalize first")
    by_name = {x.name: choice[u.name] for u in found for x in u.readers}
    for u in found:
        for x in u.readers if choice[u.name] is None else ():
            g.decline(x.site, "stays float: fewer bits would cost more elsewhere")
    round_sites(g, env, {name: m for name, m in by_name.items() if isinstance(m, Method)}, tables=tables)
    integers = [x for u in found for x in u.readers if isinstance(choice[u.name], Static)]
    if integers:
        known = ranges(g, env, integers)
        as_integers({x.name for x in integers}, known, env.target)(g)
        for x in integers:
            if str(x.source.name) not in known:
                g.decline(x.site, "no sample of the data reaches it, so its inputs have no range")


def _higher(name: str) -> bool:
    return name.replace("-", "_") in HIGHER_IS_BETTER
