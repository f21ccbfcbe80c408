"""Task metrics of two models, as per-sample sums that bootstrap can resample."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onnxcomp.errors import DataError, RecipeError
from onnxcomp.maths import RESAMPLES, Array, Float64
from onnxcomp.validation.rows import OutputRows, row_cosine, row_nll

__all__ = ["METRICS", "Metric", "MetricResult", "Sums", "bootstrap", "find"]

MAX_GROUPS = 4096  # samples are summed in so many groups for the bootstrap, whose cost then depends on no data size
# Infinities and NaN of a broken candidate are results here, not accidents.
_QUIET = np.errstate(invalid="ignore", divide="ignore", over="ignore")


class Reducing(Protocol):
    """What has a name and makes values `[R]` of summed sums `[R, k]`; `relative` ones report changes as a ratio."""

    @property
    def name(self) -> str: ...
    @property
    def reduce(self) -> Callable[[Float64], Float64]: ...
    @property
    def relative(self) -> bool: ...


@dataclass(frozen=True)
class Metric:
    """A metric as per-sample sums: `score` gives them for a batch `[B, k]`, `reduce` the value of summed ones `[R]`.

    `relative` metrics report their change as a ratio.
    """

    name: str
    score: Callable[[OutputRows], Float64]
    reduce: Callable[[Float64], Float64]
    relative: bool = False


@dataclass(frozen=True)
class MetricResult:
    """A metric of both models; `change` is the difference (perplexity: relative) with its 95 % bootstrap interval."""

    name: str
    reference: float
    candidate: float
    change: float
    low: float
    high: float


# ---- metrics ---------------------------------------------------------------------------------------------------------


def _mean(sums: Float64) -> Float64:
    """Total over count, `[R]`."""
    result: Float64 = sums[:, 0] / sums[:, 1]
    return result


def _agreement(batch: OutputRows) -> Float64:
    return batch.per_sample(batch.rows.argmax(axis=1) == batch.reference.argmax(axis=1))


def _cosine(batch: OutputRows) -> Float64:
    return batch.per_sample(row_cosine(batch.reference, batch.rows))


def _classes(batch: OutputRows, metric: str) -> tuple[Array, Array]:
    """The label of each row, and which rows count (labels below 0 do not); raises `DataError` if they do not fit."""
    labels, what = batch.labels, f"metric '{metric}'"
    if labels is None:
        raise DataError(f"{what} needs labels: add a field 'label' to each line of the data (array 'labels' in npz)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{what} needs integer class labels, these are {labels.dtype}")
    if labels.ndim not in (1, 2) or len(labels) != batch.samples:
        raise DataError(f"{what}: labels of shape {labels.shape} do not fit a batch of {batch.samples} samples")
    if (labels.ndim == 2) != batch.per_token:
        wanted, given = ("token", "sample") if batch.per_token else ("sample", "token")
        raise DataError(f"{what}: the model answers per {wanted}, so give one label per {wanted}, not per {given}")
    if batch.per_token and batch.position.max(initial=0) >= labels.shape[1]:
        raise DataError(f"{what}: {labels.shape[1]} labels per sample do not cover all its tokens")
    chosen = labels[batch.sample, batch.position] if batch.per_token else labels[batch.sample]
    if batch.rows.dtype.kind not in "iu" and chosen.max(initial=0) >= batch.rows.shape[1]:
        raise DataError(f"{what}: label {int(chosen.max())} in the data, the model has {batch.rows.shape[1]} classes")
    return chosen, chosen >= 0


def _accuracy(batch: OutputRows) -> Float64:
    labels, keep = _classes(batch, "accuracy")
    given = batch.rows[:, 0] if batch.rows.dtype.kind in "iu" else batch.rows.argmax(axis=1)  # labels, or scores
    return batch.per_sample(given == labels, keep)


def _f1(batch: OutputRows) -> Float64:
    """Per sample and class: true positives, predictions, labels; `[B, 3 C]`."""
    labels, keep = _classes(batch, "f1")
    classes = batch.rows.shape[1]
    if classes > 1000:  # three sums per sample and class are kept
        raise DataError(f"metric 'f1' is for at most 1000 classes, the model has {classes}; use accuracy")
    guess, labels, sample = batch.rows.argmax(axis=1)[keep], labels[keep], batch.sample[keep]
    hits = guess == labels
    start = sample * 3 * classes
    at = np.concatenate([(start + labels)[hits], start + classes + guess, start + 2 * classes + labels])
    return np.bincount(at, minlength=batch.samples * 3 * classes).astype(np.float64).reshape(batch.samples, -1)


def _macro_f1(sums: Float64) -> Float64:
    """Mean F1 over the classes that occur as label or answer, `[R]`."""
    hits, guessed, labelled = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    occurs = guessed + labelled
    per_class = 2 * hits / np.maximum(occurs, 1)
    result: Float64 = per_class.sum(axis=1) / (occurs > 0).sum(axis=1)
    return result


def _perplexity(batch: OutputRows) -> Float64:
    """Negative log-likelihood of each next token, summed per sample; padding and each first token are left out."""
    if batch.tokens is None or not batch.per_token:
        raise DataError("metric 'perplexity' needs a language model: token ids in, scores for every token out")
    after = np.flatnonzero((np.diff(batch.sample) == 0) & (np.diff(batch.position) == 1))
    targets = batch.tokens[batch.sample[after], batch.position[after] + 1]
    if targets.max(initial=0) >= batch.rows.shape[1] or targets.min(initial=0) < 0:
        raise DataError(
            f"metric 'perplexity': token {targets.max()} is outside the model's {batch.rows.shape[1]} scores"
        )
    keep = np.zeros(len(batch.rows), bool)
    keep[after] = True
    values = np.zeros(len(batch.rows))
    values[after] = row_nll(batch.rows[after], targets)
    return batch.per_sample(values, keep)


def _exp_mean(sums: Float64) -> Float64:
    result: Float64 = np.exp(_mean(sums))
    return result


METRICS = {
    m.name: m
    for m in (
        Metric("agreement", _agreement, _mean),
        Metric("accuracy", _accuracy, _mean),
        Metric("f1", _f1, _macro_f1),
        Metric("perplexity", _perplexity, _exp_mean, relative=True),
        Metric("cosine", _cosine, _mean),
    )
}


def find(name: str, *, allow_code: bool = False) -> Metric:
    """A built-in metric, or your `package.module:function(outputs, feeds, labels) -> [B]`; raises `RecipeError`."""
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise RecipeError(f"unknown metric '{name}'; there are {', '.join(METRICS)}, or package.module:function")
    if not allow_code:
        raise RecipeError(f"metric '{name}' runs code of yours; allow it with --allow-code")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise RecipeError(f"metric '{name}' cannot be imported: {e}") from e
    return Metric(name, lambda batch: _custom(name, call, batch), _mean)


def _custom(name: str, call: Callable[..., Any], batch: OutputRows) -> Float64:
    scores = np.asarray(call(dict(batch.outputs), dict(batch.feeds), batch.labels), np.float64)
    if scores.shape != (batch.samples,) or not np.isfinite(scores).all():
        raise DataError(
            f"metric '{name}' must give one finite score per sample: [{batch.samples}], it gave {scores.shape}"
        )
    return np.stack([scores, np.ones(batch.samples)], axis=1)


# ---- intervals -------------------------------------------------------------------------------------------------------


class Sums:
    """Per-sample sums of several metrics over the batches of one model."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._parts: dict[str, list[Float64]] = {m.name: [] for m in metrics}
        self.metrics = metrics

    @_QUIET
    def update(self, batch: OutputRows) -> None:
        """Score one batch with every metric."""
        for m in self.metrics:
            self._parts[m.name].append(m.score(batch))

    def of(self, metric: Metric) -> Float64:
        """All samples, `[N, k]`."""
        return np.concatenate(self._parts[metric.name])


@_QUIET
def bootstrap(metric: Reducing, reference: Float64, candidate: Float64, *, seed: int = 0) -> MetricResult:
    """Both values and the 95 % interval of the change, resampling the same samples `[N, k]` of both models."""
    values = [float(metric.reduce(s.sum(axis=0, keepdims=True))[0]) for s in (reference, candidate)]
    reference, candidate = _grouped(reference), _grouped(candidate)
    n = len(reference)
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 22) // n)  # resamples drawn at once: 32 MB of float64 counts
    changes = []
    for start in range(0, RESAMPLES, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, RESAMPLES - start)).astype(np.float64)
        changes.append(_change(metric, metric.reduce(counts @ reference), metric.reduce(counts @ candidate)))
    resampled = np.concatenate(changes)
    usable = resampled[np.isfinite(resampled)]
    low, high = np.quantile(usable, [0.025, 0.975]) if usable.size else (math.nan, math.nan)
    change = float(_change(metric, np.array(values[:1]), np.array(values[1:]))[0])
    return MetricResult(metric.name, values[0], values[1], change, float(low), float(high))


def _grouped(sums: Float64) -> Float64:
    """Sums of at most `MAX_GROUPS` interleaved groups: with that many, resampling groups approximates samples well."""
    n = min(len(sums), MAX_GROUPS)
    return sums if n == len(sums) else np.stack([sums[i::n].sum(axis=0) for i in range(n)])


def _change(metric: Reducing, reference: Float64, candidate: Float64) -> Float64:
    result: Float64 = candidate / reference - 1 if metric.relative else candidate - reference
    return result
