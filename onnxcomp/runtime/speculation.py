"""Speculative decoding: a smaller model proposes tokens, a larger one reads several at once and keeps its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Array, Float64
from onnxcomp.maths.sampling import Sampling
from onnxcomp.runtime.generation import Decoder

__all__ = ["LOOKAHEAD", "Drafted", "speculated"]

LOOKAHEAD = 4  # proposals at once: of 80 % accepted ones 3.4 tokens come of each round, and more proposals add little


@dataclass
class Drafted:
    """How many tokens a draft proposed and how many of these the larger model took, in how many rounds."""

    proposed: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def rate(self) -> float | None:
        """The share of proposals that were taken; None where there were none."""
        return self.accepted / self.proposed if self.proposed else None


def speculated(
    decoder: Decoder,
    draft: Decoder,
    tokens: Array,
    most: int,
    sampling: Sampling | None = None,
    *,
    ends: Collection[int] = (),
    lookahead: int = LOOKAHEAD,
    told: Drafted | None = None,
) -> Iterator[int]:
    """Up to `most` next tokens of one prompt `[n]`, distributed as the `decoder` alone would give them.

    A proposal is kept with probability min(1, p / q), else one is drawn from max(0, p - q); greedy text is the same
    (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). The text ends with one of `ends`.
    """
    how, count = sampling or Sampling(), told if told is not None else Drafted()
    rng = np.random.default_rng(how.seed)
    scores, unread = decoder.read(tokens[None])[:, -1], [int(x) for x in tokens]
    made, new = 0, int(how.pick(scores, rng)[0])
    while True:
        yield new
        made += 1
        if made >= most or new in ends:
            return
        unread.append(new)
        proposals, q = _proposed(draft, unread, min(lookahead, most - made - 1), how, rng)
        p = how.odds(decoder.read(np.array([[new, *proposals]]))[0])
        kept, new = _judged(p, q, proposals, rng)
        count.proposed, count.accepted = count.proposed + len(proposals), count.accepted + kept
        count.rounds += 1
        decoder.forget(len(proposals) - kept)
        # The last proposal was never read by the draft.
        draft.forget(max(len(proposals) - 1 - kept, 0))
        unread = proposals[len(proposals) - 1 :] if kept == len(proposals) else []
        for x in proposals[:kept]:
            yield x
            made += 1
            if x in ends:
                return


def _proposed(
    draft: Decoder, unread: list[int], count: int, how: Sampling, rng: np.random.Generator
) -> tuple[list[int], Float64]:
    """Proposed tokens, each with the probabilities `[count, V]` that it was drawn by; `unread` is read first."""
    proposals, odds, reading = list[int](), list[Float64](), unread
    for _ in range(count):
        q = how.odds(draft.read(np.array([reading]))[:, -1])[0]
        proposals.append(_drawn(q, rng))
        odds.append(q)
        reading = proposals[-1:]
    return proposals, np.array(odds)


def _judged(p: Float64, q: Float64, proposals: list[int], rng: np.random.Generator) -> tuple[int, int]:
    """How many proposals are kept, and the token behind them, of probabilities `[count + 1, V]` and `[count, V]`."""
    for i, x in enumerate(proposals):
        if rng.random() * q[i, x] >= p[i, x]:
            left = np.maximum(p[i] - q[i], 0)
            return i, _drawn(left / left.sum() if left.any() else p[i], rng)  # nothing is left of equal odds
    return len(proposals), _drawn(p[-1], rng)


def _drawn(odds: Float64, rng: np.random.Generator) -> int:
    """A token drawn by its probability; of a certain one, that one."""
    if odds.max() == 1:
        return int(odds.argmax())
    cumulated = np.cumsum(odds)
    return int((cumulated <= rng.random() * cumulated[-1]).sum())
