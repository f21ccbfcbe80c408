"""Gates: conditions a result must meet, written `NAME OP VALUE`, such as `sqnr>=20` or `perplexity-rise<=1%`.

The worst output decides, unless a condition names one: `sqnr[end_logits]>=20`.
A trailing `?` makes a condition optional: it counts only where the value can be measured (needs labels, a language
model). Presets use it, since they do not know the task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from onnxcomp.data.arguments import texts_of
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.validation.results import HIGHER_IS_BETTER, LOWER_IS_BETTER

if TYPE_CHECKING:
    from onnxcomp.validation.results import Validation

__all__ = ["Condition", "Gate", "Verdict", "score_of"]

# What each name measures: -drop is absolute, -rise relative to the original; latency and size are ratios to it.
NAMES = {
    "sqnr": "signal to quantization noise, dB",
    "pooled-sqnr": "the same on mean-pooled embeddings, dB",
    "cosine": "mean cosine between the outputs",
    "pooled-cosine": "the same on mean-pooled embeddings",
    "agreement": "share of equal top-1 answers",
    "exact-match": "share of equal entries of integer outputs",
    "kl": "KL divergence from the original's distribution, nats",
    "max-abs": "largest absolute difference",
    "rel-l2": "relative L2 difference",
    "accuracy-drop": "accuracy of the original minus that of the result",
    "f1-drop": "macro F1 of the original minus that of the result",
    "perplexity-rise": "relative rise of perplexity",
    "exact-drop": "share of generated texts equal to their targets, original minus result",
    "chrf-drop": "chrF of generated texts, original minus result",
    "wer-rise": "word error rate of generated texts, result minus original",
    "latency": "latency over the original's, worst asked shape",
    "size": "file size over the original's",
}
GENERATED = frozenset({"exact-drop", "chrf-drop", "wer-rise"})  # measured where texts are generated
MEASURED_ON_FILES = frozenset({"latency", "size"})
_EXPR = re.compile(r"^\s*([\w.:-]+?)\s*(?:\[(.+)\])?\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*(%|x|dB)?\s*(\?)?\s*$")
_HOLDS = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b}


@dataclass(frozen=True)
class Condition:
    """One condition; `text` is what the user wrote, `output` the output it is about (None: the worst of all)."""

    name: str
    op: str
    bound: float
    text: str
    optional: bool = False
    output: str | None = None

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `NAME OP VALUE`; raises `RecipeError` with the nearest name for a typo."""
        match = _EXPR.match(text)
        if match is None:
            raise RecipeError(f"gate '{text}' is not NAME OP VALUE, such as sqnr>=20 or perplexity-rise<=1%")
        name, output, op, number, unit, optional = match.groups()
        if name not in NAMES and not (":" in name and name.endswith(("-drop", "-rise"))):
            near = get_close_matches(name, NAMES, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(NAMES)}"
            raise RecipeError(f"gate '{text}': unknown name '{name}'{hint}")
        if output and (name in MEASURED_ON_FILES or name.endswith(("-drop", "-rise"))):
            raise RecipeError(f"gate '{text}': '{name}' is not measured for each output; write it without [{output}]")
        try:
            bound = float(number)
        except ValueError:
            raise RecipeError(f"gate '{text}': '{number}' is not a number") from None
        if not math.isfinite(bound):
            raise RecipeError(f"gate '{text}': the bound must be finite")
        return cls(name, op, bound / 100 if unit == "%" else bound, text.strip(), optional is not None, output)

    @property
    def measured(self) -> str:
        """The key of the value it is about, as in `Validation.values()`."""
        return self.name if self.output is None else f"{self.name}[{self.output}]"

    @property
    def on_files(self) -> bool:
        """Whether it is judged on the written file alone."""
        return self.name in MEASURED_ON_FILES

    @property
    def metric(self) -> str | None:
        """The task metric that has to be computed for this condition, if any."""
        for suffix in ("-drop", "-rise"):
            if self.name.endswith(suffix):
                return self.name.removesuffix(suffix)
        return None

    def holds(self, value: float) -> bool:
        """Whether the measured value meets the condition; NaN never does."""
        return bool(_HOLDS[self.op](value, self.bound))


@dataclass(frozen=True)
class Verdict:
    """A condition with what was measured; `value` is None when nothing could be measured."""

    gate: str
    value: float | None
    passed: bool

    def __str__(self) -> str:
        shown = "not measured" if self.value is None else f"measured {self.value:.4g}"
        return f"{self.gate}: {shown}, {'passed' if self.passed else 'refused'}"


class Gate:
    """A set of conditions; later ones on the same name and direction replace earlier ones."""

    def __init__(self, expressions: Iterable[str] = ()) -> None:
        chosen: dict[tuple[str, str], Condition] = {}
        for text in texts_of("gates", expressions, "sqnr>=20"):
            c = Condition.parse(text)
            chosen[c.measured, c.op[0]] = c
        self.conditions = tuple(chosen.values())

    def __repr__(self) -> str:
        return f"Gate({[c.text for c in self.conditions]})"

    @property
    def metrics(self) -> list[str]:
        """Task metrics that must be computed."""
        asked = (c for c in self.conditions if not c.optional and c.name not in GENERATED)
        return list(dict.fromkeys(m for c in asked if (m := c.metric)))

    @property
    def generated(self) -> list[str]:
        """Conditions on generated texts."""
        return [c.text for c in self.conditions if not c.optional and c.name in GENERATED]

    @property
    def wants_latency(self) -> bool:
        """Whether a benchmark is needed to judge."""
        return any(c.name == "latency" and not c.optional for c in self.conditions)

    def check(self, measures: Mapping[str, Collection[str]]) -> None:
        """Raise `RecipeError` where a condition names no output, or what is measured of none that it is about.

        `measures` has what can be measured of each output.
        """
        known, drifts = list(measures), {k.replace("_", "-") for k in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)}
        for c in self.conditions:
            if c.output is not None and c.output not in known:
                near = get_close_matches(c.output, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"its outputs are {', '.join(known)}"
                raise RecipeError(f"gate '{c.text}': the model has no output '{c.output}'; {hint}")
            about = known if c.output is None else [c.output]
            if c.name in drifts and not c.optional and not any(c.name in measures[x] for x in about):
                found = ", ".join(sorted({m for x in about for m in measures[x]})) or "nothing"
                raise RecipeError(
                    f"gate '{c.text}': '{c.name}' is never measured of {', '.join(map(repr, about))}; there is {found}"
                )

    def judge(self, values: Mapping[str, float], *, files: bool = False) -> list[Verdict]:
        """Verdicts on quality conditions, or with `files` on those measured on the written model.

        A value that was not measured refuses, since nobody can say that it holds, unless the condition is optional.
        """
        verdicts = []
        for c in self.conditions:
            if c.on_files is files:
                value = values.get(c.measured)
                if value is None and c.optional:
                    continue
                verdicts.append(Verdict(c.text, value, value is not None and c.holds(value)))
        return verdicts


def score_of(validation: Validation, metric: str | None) -> float:
    """A gate value by name (default: `kl`, else `rel-l2`), negated where higher is better, so that lower is better.

    It is that of the worst output; of the one that task metrics read where the worst is zero in the original.
    """
    values = validation.values()
    name = metric or ("kl" if "kl" in values else "rel-l2")
    if name not in values:
        raise OnnxcompError(f"no '{name}' was measured; there are {', '.join(validation.summary())}")
    value = values[name]
    if math.isinf(value):
        value = values.get(f"{name}[{validation.scored}]", value)
    return -value if name.replace("-", "_") in HIGHER_IS_BETTER else value
