"""Baselines of a language model: unigram, and bigram and trigram interpolated with absolute discounting.

Ney, Essen, Kneser 1994: p(w | h) = max(c(h w) - D, 0) / c(h) + D t(h) / c(h) p(w | h'), t(h) the number of different
words after h and h' the shorter history; one D per order, chosen on tuning windows. Windows are scored as a model sees
them: no history reaches over their start.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

DISCOUNTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Ngram:
    """Counts of one stream of tokens."""

    unigram: np.ndarray  # [vocab] probabilities, add-one
    pairs: dict[int, int]
    triples: dict[int, int]
    after_one: dict[int, tuple[int, int]]  # history -> (count, different followers)
    after_two: dict[int, tuple[int, int]]
    vocab: int


def fit(tokens: np.ndarray, vocab: int) -> Ngram:
    """Count a stream [T]."""
    t = tokens.astype(np.int64)
    unigram = np.bincount(t, minlength=vocab) + 1.0
    pairs = _counts(t[:-1] * vocab + t[1:])
    triples = _counts((t[:-2] * vocab + t[1:-1]) * vocab + t[2:])
    return Ngram(unigram / unigram.sum(), pairs, triples, _histories(pairs, vocab), _histories(triples, vocab), vocab)


def _counts(keys: np.ndarray) -> dict[int, int]:
    """How often each key occurs."""
    values, counts = np.unique(keys, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _histories(grams: dict[int, int], vocab: int) -> dict[int, tuple[int, int]]:
    """Count and number of different followers of every history."""
    keys, counts = np.array(list(grams)) // vocab, np.array(list(grams.values()))
    values, start, kinds = np.unique(keys, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, start)
    return {h: (c, t) for h, c, t in zip(values.tolist(), totals.tolist(), kinds.tolist(), strict=True)}


@dataclass(frozen=True)
class Seen:
    """What the counts say about every predicted token of some windows: arrays over all of them."""

    uni: np.ndarray
    two: np.ndarray  # [n, 3]: count of the pair, count of its history, followers of its history
    three: np.ndarray


def look_up(model: Ngram, windows: np.ndarray) -> Seen:
    """Counts for tokens 1.. of every window [N, W]."""
    v, uni, two, three = model.vocab, [], [], []
    for row in windows.tolist():
        for i in range(1, len(row)):
            pair = row[i - 1] * v + row[i]
            history = row[i - 2] * v + row[i - 1] if i > 1 else -1
            uni.append(model.unigram[row[i]])
            two.append((model.pairs.get(pair, 0), *model.after_one.get(row[i - 1], (0, 0))))
            three.append((model.triples.get(history * v + row[i], 0), *model.after_two.get(history, (0, 0))))
    return Seen(np.array(uni), np.array(two, float), np.array(three, float))


def _mix(counts: np.ndarray, shorter: np.ndarray, discount: float) -> np.ndarray:
    """One order of absolute discounting over the shorter history's probabilities."""
    count, total, kinds = counts.T
    some = np.maximum(total, 1)
    return np.where(total > 0, (np.maximum(count - discount, 0) + discount * kinds * shorter) / some, shorter)


def _perplexity(p: np.ndarray) -> float:
    return float(np.exp(-np.log(p).mean()))


def perplexities(train: np.ndarray, tune: np.ndarray, heldout: np.ndarray, vocab: int) -> dict[str, float]:
    """Perplexities on `heldout` [N, W] with counts from `train` [T] and discounts chosen on `tune` [M, W]."""
    model = fit(train, vocab)
    tuning, held = look_up(model, tune), look_up(model, heldout)

    def both(seen: Seen, d2: float, d3: float) -> tuple[float, float]:
        pair = _mix(seen.two, seen.uni, d2)
        return _perplexity(pair), _perplexity(_mix(seen.three, pair, d3))

    d2 = min(DISCOUNTS, key=lambda d: both(tuning, d, 0.5)[0])
    d2t, d3t = min(product(DISCOUNTS, DISCOUNTS), key=lambda d: both(tuning, *d)[1])
    return {"unigram": _perplexity(held.uni), "bigram": both(held, d2, 0.5)[0], "trigram": both(held, d2t, d3t)[1]}
