"""How far a model is from its original: every output, the worst of them, and task metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxcomp.maths import Float64
from onnxcomp.validation.drift import Drift
from onnxcomp.validation.metrics import MetricResult

__all__ = ["Validation", "together"]

HIGHER_IS_BETTER = ("sqnr", "pooled_sqnr", "cosine", "pooled_cosine", "agreement", "exact_match")
OF_TEXTS = ("exact", "chrf", "wer")
LOWER_IS_BETTER = ("max_abs", "rel_l2", "kl")


@dataclass(frozen=True)
class Validation:
    """How far a candidate is from the original: the drift of each of the `outputs`, and task `metrics`.

    `scored` is the output that task metrics read; `uncompared` are outputs that are maps. `by_sample` has the error of
    each sample by output and metric, for comparisons of samples; no report has it.
    """

    outputs: dict[str, Drift]
    metrics: dict[str, MetricResult]
    samples: int
    data: str = ""
    random: bool = False
    notes: tuple[str, ...] = ()
    scored: str = ""
    uncompared: tuple[str, ...] = ()
    by_sample: Mapping[str, Mapping[str, Float64]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def finite(self) -> bool:
        """False when the candidate gives NaN or infinity where the original does not; every gate fails then."""
        return all(d.finite for d in self.outputs.values())

    @property
    def equal(self) -> bool:
        """Whether every output equals the original's, entry by entry."""
        return not self.uncompared and all(d.equal for d in self.outputs.values())

    @property
    def worst(self) -> str:
        """The name of the output that is furthest from the original's."""
        return min(self.outputs, key=lambda name: _order(self.outputs[name].decibels))

    @property
    def drift(self) -> Drift:
        """The drift of the worst output."""
        return self.outputs[self.worst]

    def read_by(self, metric: str) -> str:
        """The output that a task metric reads where there are several; empty for those of generated texts."""
        return "" if metric in OF_TEXTS or len(self.outputs) < 2 else self.scored

    def summary(self) -> dict[str, float]:
        """What was measured, by gate name, the worst over all outputs; all NaN where one of them is not finite.

        Agreement is that of class scores where the model has any: which feature is largest says nothing.
        """
        scores = [d for d in self.outputs.values() if d.kl is not None]
        values: dict[str, float] = {}
        for key, pick in ((k, p) for names, p in ((HIGHER_IS_BETTER, min), (LOWER_IS_BETTER, max)) for k in names):
            of = scores if key == "agreement" and scores else self.outputs.values()
            found = [float(x) for d in of if (x := getattr(d, key)) is not None]
            if found:
                values[key.replace("_", "-")] = math.nan if any(map(math.isnan, found)) else pick(found)
        for m in self.metrics.values():
            if m.name in ("accuracy", "f1", "exact", "chrf") or ":" in m.name:
                values[f"{m.name}-drop"] = m.reference - m.candidate
            if m.name == "wer":
                values["wer-rise"] = m.candidate - m.reference
            if m.name == "perplexity" or ":" in m.name:
                values[f"{m.name}-rise"] = m.candidate / m.reference - 1 if m.reference else math.nan
        return values if self.finite else dict.fromkeys(values, math.nan)

    def values(self) -> dict[str, float]:
        """The summary, and what was measured of each output, by gate name: `sqnr`, `sqnr[logits]`."""
        values = self.summary()
        for name, d in self.outputs.items():
            for key in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
                if (x := getattr(d, key)) is not None:
                    values[f"{key.replace('_', '-')}[{name}]"] = float(x) if d.finite else math.nan
        return values

    def json(self) -> dict[str, Any]:
        """Plain values; a number that is infinite (SQNR of equal outputs) or undefined becomes None."""
        return {
            "samples": self.samples,
            "data": self.data,
            "random": self.random,
            "notes": list(self.notes),
            "finite": self.finite,
            "equal": self.equal,
            "worst": self.worst,
            "scored": self.scored,
            "uncompared": list(self.uncompared),
            "values": _plain(self.summary()),
            "outputs": {name: _plain({**dataclasses.asdict(d), "equal": d.equal}) for name, d in self.outputs.items()},
            "metrics": {name: _plain(dataclasses.asdict(m)) for name, m in self.metrics.items()},
        }


def together(encoder: Validation, decoder: Validation) -> Validation:
    """What was measured of both graphs of one model: the outputs of both, and the task metrics of the decoder."""
    return dataclasses.replace(
        decoder,
        outputs={**decoder.outputs, **encoder.outputs},
        notes=tuple(dict.fromkeys((*encoder.notes, *decoder.notes))),
        uncompared=(*encoder.uncompared, *decoder.uncompared),
        by_sample={**decoder.by_sample, **encoder.by_sample},
    )


def _order(decibels: float) -> float:
    return -math.inf if math.isnan(decibels) else decibels


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
