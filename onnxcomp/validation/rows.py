"""Outputs as rows, and what is computed row by row: cosine, divergence, likelihood; in float64, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.maths import Array, Float64

__all__ = ["OutputRows", "chunks", "row_cosine", "row_kl", "row_nll"]

CHUNK = 1 << 20  # elements widened to float64 at once: 8 MB, whatever the vocabulary


@dataclass(frozen=True)
class OutputRows:
    """One output of a batch as rows without padding, in the form that metrics read.

    `rows` is the model's output `[n, C]`, `reference` the original's (the same when the original itself is scored),
    `sample` the sample of the batch that each row belongs to and `position` its index there `[n]`.
    """

    rows: Array
    reference: Array
    sample: Array
    position: Array
    samples: int
    per_token: bool = False
    tokens: Array | None = None
    labels: Array | None = None
    outputs: Mapping[str, Array] = field(default_factory=dict)
    feeds: Mapping[str, Array] = field(default_factory=dict)

    def per_sample(self, values: Array, keep: Array | None = None) -> Float64:
        """Sum and count of a value per row, by sample: `[samples, 2]`."""
        sample = self.sample if keep is None else self.sample[keep]
        values = values if keep is None else values[keep]
        total = np.bincount(sample, values.astype(np.float64), self.samples)
        return np.stack([total, np.bincount(sample, minlength=self.samples).astype(np.float64)], axis=1)


def chunks(*arrays: Array) -> Iterator[tuple[slice, tuple[Float64, ...]]]:
    """The same row ranges of `[n, C]` arrays as float64, of at most `CHUNK` elements."""
    n, width = arrays[0].shape
    step = max(1, CHUNK // max(1, width))
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        yield part, tuple(a[part].astype(np.float64) for a in arrays)


def row_cosine(a: Array, b: Array) -> Float64:
    """Cosine per row, `[n]`; two zero rows agree, a zero and a non-zero row do not."""
    result = np.empty(len(a))
    for part, (x, y) in chunks(a, b):
        norms = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
        equal = (x == y).all(axis=1).astype(np.float64)
        result[part] = np.where(norms > 0, np.einsum("ij,ij->i", x, y) / np.where(norms > 0, norms, 1), equal)
    return result


def _log_softmax(x: Float64) -> Float64:
    shifted: Float64 = x - x.max(axis=1, keepdims=True, initial=-np.inf)  # a row of no elements has none
    with np.errstate(divide="ignore"):
        result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def row_kl(reference: Array, candidate: Array) -> Float64:
    """KL(reference || candidate) of the softmax of each row, `[n]`, nats."""
    result = np.empty(len(reference))
    for part, (x, y) in chunks(reference, candidate):
        p, q = _log_softmax(x), _log_softmax(y)
        result[part] = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(result, 0.0)


def row_nll(logits: Array, targets: Array) -> Float64:
    """Negative log-likelihood of class `targets[i]` under row `i`, `[n]`, nats."""
    result = np.empty(len(logits))
    for part, (x,) in chunks(logits):
        result[part] = -_log_softmax(x)[np.arange(len(x)), targets[part]]
    return result
