"""Copies of token sequences with some tokens replaced at random: more rows for fits on a small data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.inputs import Batch, Source, roles, specs, vocabulary
from onnxcomp.graph import Graph

__all__ = ["ReplacedTokens", "replaced", "token_count"]


@dataclass
class ReplacedTokens:
    """The samples of a source, and behind them copies with a `share` of their tokens replaced by any of `vocabulary`.

    The first and the last token of a sequence stay, which mark its ends, and so does padding. What a copy holds depends
    on its index only, not on the batch that it is in.
    """

    source: Source
    tokens: str
    mask: str | None
    vocabulary: int
    share: float

    def __post_init__(self) -> None:
        self.name, self.random, self.notes = self.source.name, self.source.random, self.source.notes

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> object:
        """As the sample that it is a copy of."""
        return self.source.key(index % len(self.source))

    def rows(self, indices: Sequence[int]) -> Batch:
        """The samples of these indices as one batch; index `i + c n` is copy `c` of sample `i` of `n`."""
        count = len(self.source)
        batch = self.source.rows([i % count for i in indices])
        ids = batch.feeds[self.tokens].copy()
        shown = batch.feeds[self.mask] > 0 if self.mask in batch.feeds else np.ones(ids.shape, bool)
        for row, real, index in zip(ids, shown, indices, strict=True):
            if index < count:
                continue
            places = np.flatnonzero(real)[1:-1]
            rng = np.random.default_rng(index)
            hit = rng.random(len(places)) < self.share
            row[places[hit]] = rng.integers(0, self.vocabulary, len(places))[hit]
        return Batch({**batch.feeds, self.tokens: ids}, batch.labels)


def _roles(g: Graph) -> tuple[str | None, str | None]:
    """The inputs with token ids and with their mask, where both are arrays of the same shape."""
    names = roles(specs(g))
    return names.get("tokens"), names.get("mask")


def token_count(data: Dataset, g: Graph) -> int | None:
    """How many tokens all samples have together, padding left out; None where the model takes no token ids."""
    tokens, mask = _roles(g)
    if tokens is None or tokens not in vocabulary(g):
        return None
    return sum(int((b.feeds[mask] > 0).sum()) if mask in b.feeds else b.feeds[tokens].size for b in data)


def replaced(data: Dataset, g: Graph, copies: int, share: float) -> Dataset:
    """The samples and `copies` of each with a share of the tokens replaced at random."""
    tokens, mask = _roles(g)
    assert tokens is not None
    size = vocabulary(g)[tokens]
    return data.copied(lambda source: ReplacedTokens(source, tokens, mask, size, share), copies)
