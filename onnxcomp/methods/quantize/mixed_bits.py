"""Bits of each weight under a budget of bytes or of drift, chosen by what its options lose and judged on the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcomp import blocks
from onnxcomp.errors import GateFailed, ModelError, RecipeError
from onnxcomp.graph import Graph, Noted
from onnxcomp.maths.frontier import Frontier, Option
from onnxcomp.methods.quantize import site_options
from onnxcomp.methods.quantize.site_options import Inputs, Unit, loss_of, named, nbytes
from onnxcomp.methods.quantize.weight_rounding import Method, round_sites
from onnxcomp.pipeline import Env
from onnxcomp.validation.gates import MEASURED_ON_FILES, NAMES, Condition
from onnxcomp.validation.results import HIGHER_IS_BETTER

__all__ = ["BUDGETS", "Budget", "Choice", "Chosen", "apply", "choose", "rule_of_thumb"]

Choice = Mapping[str, Method | None]  # of each unit by its name; None leaves it float
MEASURES = "|".join(name for name in NAMES if name not in MEASURED_ON_FILES)
NUMBER = r"\d{1,9}(\.\d{1,9})?"
BUDGETS = rf"^({NUMBER}(x|kB|MB|GB)|({MEASURES})(<=|>=|<|>){NUMBER}(e-\d\d?)?%?)$"
SIZE = re.compile(r"(\d+\.?\d*)(x|kB|MB|GB)")
SCALE = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
BLOCKWISE = 21  # the operator set from which DequantizeLinear has blocks and codes of 4 bits
TRIES = 6  # roundings of the whole model for a budget of drift: each costs as much as the result's own
CLOSE = 1.02  # bytes of the cheapest choice that passes over those of the costliest that fails, from which it is enough
SHOWN = 9  # points of the frontier in the report
ROUNDING = 1 + 1e-9  # of sums of bytes


@dataclass(frozen=True)
class Budget:
    """Bytes relative to all weights in one option, or in all, or a condition: `1.05x`, `12MB`, `kl<=0.01`."""

    text: str
    relative: float | None = None
    nbytes: float | None = None
    condition: Condition | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read one; raises `RecipeError`."""
        if size := SIZE.fullmatch(text):
            number, unit = float(size[1]), size[2]
            return cls(text, number) if unit == "x" else cls(text, nbytes=number * SCALE[unit])
        try:
            condition = Condition.parse(text)
        except RecipeError as e:
            raise RecipeError(f"budget '{text}' is neither a size, such as 1.05x or 12MB, nor a gate: {e}") from None
        if condition.name in MEASURED_ON_FILES or condition.output is not None:
            raise RecipeError(f"budget '{text}': give a size such as 1.05x, or a gate on the drift of all outputs")
        return cls(text, condition=condition)

    def limit(self, base: int) -> float:
        """Bytes, where it is a size relative to so many or in bytes."""
        return self.nbytes or (self.relative or 0.0) * base

    def fits(self, found: Sequence[Unit], m: Method | None, base: Method) -> bool:
        """Whether a size holds for one option of all weights."""
        limit = self.limit(sum(nbytes(u.weight, base) for u in found))
        return sum(nbytes(u.weight, m) for u in found) <= limit * ROUNDING


@dataclass(frozen=True)
class Chosen:
    """The option of each weight, and what was tried on the whole model, with the frontier, as notes."""

    methods: Choice
    notes: tuple[Noted, ...]


def choose(
    g: Graph, env: Env, found: Sequence[Unit], methods: Sequence[Method | None], base: Method, budget: Budget,
    metric: str | None,
) -> Chosen:  # fmt: skip
    """The options that lose least within a budget of bytes, or the smallest ones that meet one of drift.

    Bytes are relative to those of all weights in the option `base`. Whatever the sums of losses say, the whole model
    decides, on calibration data that was left out. Raises `RecipeError` or `GateFailed` with the best that is reached.
    """
    if len(methods) == 1 and budget.condition is None and budget.fits(found, methods[0], base):
        return Chosen({u.name: methods[0] for u in found}, ())  # nothing to choose, so nothing is measured
    split, metric = env.split(), site_options.metric_of(g, metric)
    inputs = site_options.inputs_of(g, split, found)
    table = site_options.measure(g, split, found, methods, base, metric, inputs)
    front = Frontier.of([table[u.name] for u in found])
    case = _Case(g, split, found, methods, table, front, metric, sum(nbytes(u.weight, base) for u in found), inputs)
    if budget.condition is not None:
        return case.meeting(budget.condition)
    return case.within(budget.limit(case.base), budget.text)


@dataclass(frozen=True)
class _Case:
    """The weights of a model with their options, measured; `base` are the bytes that sizes are relative to."""

    g: Graph
    env: Env
    found: Sequence[Unit]
    methods: Sequence[Method | None]
    table: Mapping[str, Sequence[Option]]
    front: Frontier
    metric: str
    base: int
    inputs: Mapping[str, Inputs]

    def within(self, limit: float, text: str) -> Chosen:
        """Of the best sums of any options, one for all and the rule of thumb what loses least on the whole model."""
        at = self.front.within(limit)
        if at is None:
            least = self.front.costs[0]
            raise RecipeError(
                f"budget {text}: the smallest that these options reach is {least / self.base:.3f}x, "
                f"{least:,.0f} bytes; allow fewer bits or larger blocks"
            )
        uniform = {f"all {named(m)}": self._all(m) for m in self.methods}
        fitting = {"mixed": self._at(at)} | self._best(uniform, limit) | self._best(self._rule(), limit)
        edits = [site_options.plainly(self.found, c, self.inputs) for c in fitting.values()]
        scores = self.env.evaluate(edits, self.metric, site_options.SAMPLES)
        losses = {name: loss_of(s.value, self.metric) for name, s in zip(fitting, scores, strict=True)}
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

    def _measured(self, at: int, name: str) -> float:
        def edit(g: Graph) -> None:
            apply(g, self.env.split(), self.found, self._at(at))

        score = self.env.evaluate([edit], name, None)[0].value
        return -score if _higher(name) else score

    def _at(self, at: int) -> Choice:
        picked = self.front.choice(at)
        return {u.name: self.methods[i] for u, i in zip(self.found, picked, strict=True)}

    def _best(self, choices: Mapping[str, Choice], limit: float) -> dict[str, Choice]:
        """That of the least sum of losses among those that fit, if any does."""
        fitting = [name for name, c in choices.items() if self._cost(c) <= limit * ROUNDING]
        best = min(fitting, key=lambda name: self._sum(choices[name]), default=None)
        return {} if best is None else {best: choices[best]}

    def _sum(self, choice: Choice) -> float:
        return sum(self.table[name][self.methods.index(m)].loss for name, m in choice.items())

    def _all(self, m: Method | None) -> Choice:
        return {u.name: m for u in self.found}

    def _rule(self) -> dict[str, Choice]:
        """8 bits where the rule of thumb wants them, each other option for all others."""
        eight = next((m for m in self.methods if m is not None and m.bits == 8), None)
        wanted = rule_of_thumb(self.g)
        if eight is None or not wanted:
            return {}
        others = [m for m in self.methods if m is not eight]
        return {
            f"rule of thumb, 8 bits and {named(m)}": {
                u.name: eight if any(x.name in wanted for x in u.readers) else m for u in self.found
            }
            for m in others
        }

    def _cost(self, choice: Choice) -> int:
        return sum(nbytes(u.weight, choice[u.name]) for u in self.found)

    def _noted(self, name: str, choice: Choice, what: str, values: Mapping[str, float]) -> Noted:
        """A choice that was tried on the whole model, with its size."""
        cost = self._cost(choice)
        return Noted(name, f"{cost / self.base:.3f}x the bytes, {what}", {"bytes": cost, **values})

    def _points(self) -> list[Noted]:
        """The frontier of predicted losses at even steps of the bytes' logarithm."""
        costs = self.front.costs
        steps = [costs[0] * (costs[-1] / costs[0]) ** (i / (SHOWN - 1)) for i in range(SHOWN)]
        places = sorted({self.front.within(c * ROUNDING) or 0 for c in steps})
        sums = [float(self.front.losses[i]) for i in places]
        said = [
            f"{costs[i] / self.base:.3f}x the bytes, sum of losses {x:.3g}" for i, x in zip(places, sums, strict=True)
        ]
        values = [{"bytes": float(costs[i]), "loss": x} for i, x in zip(places, sums, strict=True)]
        return [Noted("frontier", *x) for x in zip(said, values, strict=True)]


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
    """Round the weights as chosen, each towards what the original gives there."""
    if g.opset < BLOCKWISE:
        raise ModelError(f"operator set {g.opset} has no codes in blocks; put canonicalize first")
    by_name = {x.name: choice[u.name] for u in found for x in u.readers}
    for u in found:
        for x in u.readers if choice[u.name] is None else ():
            g.decline(x.site, "stays float: fewer bits would cost more elsewhere")
    round_sites(g, env, {name: m for name, m in by_name.items() if m is not None}, tables=tables)


def _higher(name: str) -> bool:
    return name.replace("-", "_") in HIGHER_IS_BETTER
