"""What a drift means for those who use a model: classes that changed, and how alike samples are to each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.validation.rows import OutputRows

__all__ = ["ClassSums", "Moved", "Similarity", "SimilaritySums"]

MOST_CLASSES = 1000  # of scores whose changes are counted; words of a language model are not classes
LISTED = 40  # kinds of changes that are kept, the most frequent
MOST_SAMPLES = 256  # samples that are compared with each other: 65,536 pairs


@dataclass(frozen=True)
class Moved:
    """So many `samples` for which the original says class `original` and the result `result`, by label if known."""

    label: int | None
    original: int
    result: int
    samples: int


@dataclass(frozen=True)
class Similarity:
    """Cosines between the vectors of all pairs of `samples`, in the result against the original.

    `mean_change` and `max_change` are of absolute differences; `neighbours` is the share of samples whose nearest other
    sample is still the same.
    """

    samples: int
    mean_change: float
    max_change: float
    neighbours: float


class ClassSums:
    """Counts of changed classes, one class a sample."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int | None, int, int]] = Counter()

    def update(self, batch: OutputRows) -> None:
        """Add one batch of scores, unless they are of tokens or of too many classes."""
        if batch.per_token or not 1 < batch.rows.shape[1] <= MOST_CLASSES:
            return
        before, after = batch.reference.argmax(axis=1), batch.rows.argmax(axis=1)
        labels = batch.labels
        known = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
        for i in np.flatnonzero(before != after):
            label = int(labels[batch.sample[i]]) if labels is not None and known else None
            self._counts[label, int(before[i]), int(after[i])] += 1

    def result(self) -> tuple[Moved, ...]:
        """The most frequent changes."""
        return tuple(Moved(*key, n) for key, n in self._counts.most_common(LISTED))


class SimilaritySums:
    """Vectors of the first samples, `[n, C]` of both models."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Float64, Float64]] = []
        self._samples = 0

    def update(self, reference: Array, candidate: Array) -> None:
        """Add the vectors of a batch, `[b, C]`."""
        if room := max(0, MOST_SAMPLES - self._samples):
            x, y = (a[:room].astype(np.float64) for a in (reference, candidate))
            self._pairs.append((x, y))
            self._samples += len(x)

    def result(self) -> Similarity | None:
        """None for fewer than three samples, or vectors that are not finite."""
        if self._samples < 3 or len({x.shape[1] for x, _ in self._pairs}) > 1:
            return None
        x, y = (_cosines(np.concatenate([p[i] for p in self._pairs])) for i in (0, 1))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return None
        off = ~np.eye(len(x), dtype=bool)
        change = np.abs(x - y)[off]
        nearest = [np.where(off, a, -np.inf).argmax(axis=1) for a in (x, y)]
        same = float((nearest[0] == nearest[1]).mean())
        return Similarity(len(x), float(change.mean()), float(change.max()), same)


def _cosines(vectors: Float64) -> Float64:
    """Cosine of each pair of rows, `[n, n]`; that of a zero vector is 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1.0)
    result: Float64 = unit @ unit.T
    return result
