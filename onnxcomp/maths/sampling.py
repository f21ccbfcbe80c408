"""The next token of a sequence: the likeliest, or drawn from the likeliest ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.maths import Array, Float64

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen: the likeliest at `temperature` 0, else drawn with these odds.

    Only the `top_k` likeliest can be drawn (0: all), and of these the fewest that hold `top_p` of the probability
    (nucleus sampling, arXiv 1904.09751, section 3.1). Raises `DataError` for numbers out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise DataError("temperature and top-k are at least 0, top-p is above 0 and at most 1")

    def odds(self, logits: Array) -> Float64:
        """The probability of each token `[b, V]`, given scores `[b, V]`."""
        x = logits.astype(np.float64)
        if self.temperature == 0:
            return np.asarray(np.arange(x.shape[1]) == x.argmax(axis=1)[:, None], np.float64)
        x = (x - x.max(axis=1, keepdims=True)) / self.temperature
        if 0 < self.top_k < x.shape[1]:
            x[x < np.partition(x, -self.top_k, axis=1)[:, -self.top_k, None]] = -np.inf
        p = np.exp(x)
        p /= p.sum(axis=1, keepdims=True)
        order = np.argsort(-p, axis=1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=1)
        ranked[np.cumsum(ranked, axis=1) - ranked >= self.top_p] = 0
        np.put_along_axis(p, order, ranked, axis=1)
        return np.asarray(p / p.sum(axis=1, keepdims=True))

    def pick(self, logits: Array, rng: np.random.Generator) -> Array:
        """One token for each row of scores `[b, V]`: `[b]`, int64."""
        if self.temperature == 0:
            return np.asarray(logits.argmax(axis=1), np.int64)
        cumulated = np.cumsum(self.odds(logits), axis=1)
        drawn = rng.random((len(cumulated), 1)) * cumulated[:, -1:]
        return np.asarray((cumulated <= drawn).sum(axis=1), np.int64)
