"""Distance of a model's outputs from the original's (drift), as sums over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64
from onnxcomp.validation.moved import ClassSums, Moved, Similarity, SimilaritySums
from onnxcomp.validation.rows import OutputRows, chunks, row_cosine, row_kl

__all__ = ["Drift", "DriftSums", "MatchSums"]

# Infinities and NaN of a broken candidate are results here, not accidents.
_QUIET = np.errstate(invalid="ignore", divide="ignore", over="ignore")


@dataclass(frozen=True)
class Drift:
    """Distance of an output from the original's over all rows; `sqnr` in dB, `kl` in nats, None where undefined.

    `pooled_*` compare the mean over the tokens of each sample (embeddings); `agreement` is of the top-1 class.
    Integers, booleans and strings have `exact_match` alone, the share of equal entries. `undefined` entries are NaN in
    the original and count as equal. `kl_p99` and `kl_max` are the 99th percentile and the largest `kl` of a row,
    `kl_error` and `agreement_error` standard errors over rows, as if these were independent, as llama.cpp has them;
    `moved` the classes that changed, `similarity` how alike samples are to each other.
    """

    max_abs: float | None = None
    rel_l2: float | None = None
    sqnr: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    kl: float | None = None
    pooled_sqnr: float | None = None
    pooled_cosine: float | None = None
    exact_match: float | None = None
    finite: bool = True
    rows: int = 0
    undefined: int = 0
    kl_p99: float | None = None
    kl_max: float | None = None
    kl_error: float | None = None
    agreement_error: float | None = None
    moved: tuple[Moved, ...] = ()
    similarity: Similarity | None = None

    @property
    def equal(self) -> bool:
        """Whether every entry equals the original's."""
        return self.finite and self.decibels == math.inf

    @property
    def decibels(self) -> float:
        """The distance on one scale for all types: SQNR, or as if each unequal entry were noise as large as itself."""
        if not self.finite:
            return math.nan
        if self.exact_match is not None:
            return decibel(1.0, 1.0 - self.exact_match)
        return math.inf if self.sqnr is None else self.sqnr


class MatchSums:
    """Streaming counts behind the `Drift` of an output that is compared entry by entry for equality."""

    def __init__(self) -> None:
        self._equal = self._entries = self._rows = 0

    def update(self, batch: OutputRows) -> None:
        """Add one batch."""
        self._equal += int((batch.rows == batch.reference).sum())
        self._entries += batch.rows.size
        self._rows += len(batch.rows)

    def by_sample(self) -> dict[str, Float64]:
        """None: entries are equal or not."""
        return {}

    def result(self) -> Drift:
        """The share of equal entries over all batches; an output without entries is equal."""
        return Drift(exact_match=self._equal / self._entries if self._entries else 1.0, rows=self._rows)


class DriftSums:
    """Streaming sums behind a `Drift`; `pooled` also compares the mean of each sample's rows."""

    def __init__(self, *, logits: bool, pooled: bool = False) -> None:
        self._logits, self._pooled = logits, pooled
        self._rows = self._cosine = self._agree = self._kl = 0.0
        self._signal = self._noise = self._max = 0.0
        self._means = np.zeros(4)  # signal, noise, cosine and number of pooled rows
        self._finite = self._classes = True
        self._undefined = 0
        self._kls: list[Array] = []
        self._by_sample: dict[str, list[Float64]] = {}
        self._moved, self._alike = ClassSums(), SimilaritySums()

    @_QUIET
    def update(self, batch: OutputRows) -> None:
        """Add one batch; infinities both models share (masked scores) count as equal."""
        reference, candidate = batch.reference, batch.rows
        if undefined := int((missing := np.isnan(reference)).sum()):
            reference, candidate = (np.where(missing, 0, a) for a in (reference, candidate))
            self._undefined += undefined
        self._finite &= not bool((~np.isfinite(candidate) & (candidate != reference)).any())
        self._classes &= reference.shape[1] > 1
        signals, noises = np.zeros(len(reference)), np.zeros(len(reference))
        for part, (x, y) in chunks(reference, candidate):
            noise = np.where(x == y, 0.0, y - x)
            signal = np.where(np.isfinite(x), x, 0.0)
            signals[part], noises[part] = (np.einsum("ij,ij->i", a, a) for a in (signal, noise))
            self._max = max(self._max, float(np.abs(noise).max(initial=0.0)))
        self._signal += float(signals.sum())
        self._noise += float(noises.sum())
        self._keep("sqnr", *(batch.per_sample(a)[:, 0] for a in (noises, signals)))
        defined = np.isfinite(reference).all(axis=1)
        self._cosine += float(row_cosine(reference[defined], candidate[defined]).sum() + (~defined).sum())
        self._rows += len(reference)
        if self._classes:
            self._agree += float((reference.argmax(axis=1) == candidate.argmax(axis=1)).sum())
        if self._logits:
            kls = row_kl(reference, candidate)
            self._kl += float(kls.sum())
            self._kls.append(kls.astype(np.float32))
            self._keep("kl", *batch.per_sample(kls).T)
            self._moved.update(batch)
        elif _of_samples(batch):
            self._alike.update(reference, candidate)
        if self._pooled and len(reference):
            self._pool(_means(reference, batch.sample), _means(candidate, batch.sample))

    def _pool(self, x: Float64, y: Float64) -> None:
        signal, noise = (x * x).sum(axis=1), ((y - x) ** 2).sum(axis=1)
        self._alike.update(x, y)
        self._keep("pooled-sqnr", noise, signal)
        self._means += [float(signal.sum()), float(noise.sum()), float(row_cosine(x, y).sum()), len(x)]

    def _keep(self, metric: str, errors: Float64, sizes: Float64) -> None:
        """Note the error of each sample, relative to its size; samples of no size have none."""
        self._by_sample.setdefault(metric, []).append(errors[sizes > 0] / sizes[sizes > 0])

    def by_sample(self) -> dict[str, Float64]:
        """Errors of single samples `[samples]` by gate name: mean `kl`, noise relative to signal for SQNR."""
        return {metric: np.concatenate(parts) for metric, parts in self._by_sample.items()}

    def result(self) -> Drift:
        """The drift over all batches; raises `DataError` when every row was padding."""
        n = self._rows
        if n == 0:
            raise DataError("every token of the evaluation data is padding; check its attention mask")
        signal, noise, cosine, pooled = self._means
        kls = np.concatenate(self._kls) if self._kls and self._classes else np.zeros(0, np.float32)
        return Drift(
            max_abs=self._max,
            rel_l2=math.sqrt(self._noise / self._signal) if self._signal > 0 else (math.inf if self._noise else 0.0),
            sqnr=decibel(self._signal, self._noise),
            cosine=self._cosine / n,
            agreement=self._agree / n if self._classes else None,
            kl=self._kl / n if self._logits and self._classes else None,
            pooled_sqnr=decibel(signal, noise) if pooled else None,
            pooled_cosine=float(cosine / pooled) if pooled else None,
            finite=self._finite,
            rows=int(n),
            undefined=self._undefined,
            kl_p99=float(np.quantile(kls, 0.99)) if kls.size else None,
            kl_max=float(kls.max()) if kls.size else None,
            kl_error=float(kls.std(ddof=1, dtype=np.float64) / math.sqrt(len(kls))) if kls.size > 1 else None,
            agreement_error=_share_error(self._agree / n, n) if self._classes and n > 1 else None,
            moved=self._moved.result(),
            similarity=self._alike.result(),
        )


def _share_error(share: float, count: float) -> float:
    """The standard error of a share."""
    return math.sqrt(share * (1 - share) / (count - 1))


def _of_samples(batch: OutputRows) -> bool:
    """Whether each row is all there is of a sample."""
    return len(batch.rows) == batch.samples and not batch.per_token and not batch.position.any()


def _means(rows: Array, sample: Array) -> Float64:
    """Mean row of each sample that has any, `[<=B, C]`; `sample` ascends."""
    starts = np.flatnonzero(np.diff(sample, prepend=-1))
    counts = np.diff(starts, append=len(sample))[:, None]
    result: Float64 = np.add.reduceat(rows.astype(np.float64), starts, axis=0) / counts
    return result


def decibel(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)`: infinite for no noise, NaN when a sum is."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf
