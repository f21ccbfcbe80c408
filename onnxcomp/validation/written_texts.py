"""How near generated texts are to their references: exact match, chrF and word error rate, of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Float64
from onnxcomp.validation.metrics import MetricResult, bootstrap

__all__ = ["TEXT_METRICS", "TextMetric", "scores"]

ORDERS = 6  # of character n-grams, as in the paper
BETA = 2.0  # recall counts twice as much as precision


@dataclass(frozen=True)
class TextMetric:
    """A metric as sums `[k]` of each text and its reference; `reduce` gives the value of summed ones `[R, k]`."""

    name: str
    score: Callable[[str, str], Sequence[float]]
    reduce: Callable[[Float64], Float64]
    relative: bool = False


def _exact(text: str, reference: str) -> Sequence[float]:
    return text.strip() == reference.strip(), 1


def _chrf(text: str, reference: str) -> Sequence[float]:
    """For each order: n-grams of the text, of the reference, and those in both, spaces left out."""
    sums = list[float]()
    for n in range(1, ORDERS + 1):
        made, wanted = _grams(text, n), _grams(reference, n)
        sums += [made.total() if wanted else 0, wanted.total(), (made & wanted).total()]
    return sums


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def _f_score(sums: Float64) -> Float64:
    """chrF (Popović 2015): F of precision and recall, each the mean over orders that both sides have, `[R]`."""
    made, wanted, both = np.moveaxis(sums.reshape(len(sums), ORDERS, 3), 2, 0)
    used = (made > 0) & (wanted > 0)
    count = np.maximum(used.sum(axis=1), 1)
    precision, recall = (np.where(used, both / np.maximum(x, 1), 0).sum(axis=1) / count for x in (made, wanted))
    under = BETA**2 * precision + recall
    result: Float64 = np.where(under > 0, (1 + BETA**2) * precision * recall / np.where(under > 0, under, 1), 0)
    return result


def _words(text: str, reference: str) -> Sequence[float]:
    made, wanted = text.split(), reference.split()
    return edits(made, wanted), len(wanted)


def edits(made: Sequence[str], wanted: Sequence[str]) -> int:
    """Words to insert, remove or replace to get one text from the other (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(made, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def _mean(sums: Float64) -> Float64:
    result: Float64 = sums[:, 0] / sums[:, 1]
    return result


TEXT_METRICS = (
    TextMetric("exact", _exact, _mean),
    TextMetric("chrf", _chrf, _f_score),
    TextMetric("wer", _words, _mean),
)


def scores(original: Sequence[str], result: Sequence[str], references: Sequence[str]) -> dict[str, MetricResult]:
    """The metrics of both models' texts against the references, with intervals of their change."""
    found = {}
    for m in TEXT_METRICS:
        sums = [
            np.array([m.score(a, b) for a, b in zip(texts, references, strict=True)], np.float64)
            for texts in (original, result)
        ]
        found[m.name] = bootstrap(m, *sums)
    return found
