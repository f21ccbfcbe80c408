"""Samples of original token ids for a model with a reduced vocabulary: texts split again, rows that still agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.data import texts, vocabulary
from onnxcomp.data.inputs import Batch, specs
from onnxcomp.data.vocabulary import Renumbering
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64
from onnxcomp.runtime.runner import Runner
from onnxcomp.validation.metrics import Metric, Seen, Sums
from onnxcomp.validation.outputs import View, see

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Again", "Gone", "Resplit", "again"]

TEXTS = ("perplexity", "accuracy", "f1")  # metrics that another splitting of the same text leaves comparable
MADE = ("tokens", "mask", "types", "positions")  # inputs that a text alone decides


@dataclass(frozen=True)
class Gone:
    """Where data holds tokens that a reduced vocabulary lacks: `[B, S]` per batch, padding left out.

    `before` and `whole` say whether any token comes before the first such one of its sample, and whether any sample
    has none.
    """

    places: tuple[Array, ...]
    tokens: int
    before: bool
    whole: bool

    @classmethod
    def of(cls, data: Iterable[Batch], words: Renumbering, roles: Mapping[str, str]) -> Gone:
        """Look through the data."""
        places, tokens, before, whole = list[Array](), 0, False, False
        stays = np.zeros(words.size, bool)
        stays[words.kept] = True
        for b in data:
            ids = b.feeds.get(roles.get("tokens", ""), np.zeros((0, 0), np.int64))
            real = _real(b, roles, ids)
            places.append(real & ~stays[np.clip(ids, 0, words.size - 1)])
            tokens += int(real.sum())
            before |= bool((real & (np.cumsum(places[-1], axis=1) == 0)).any())
            whole |= bool((real.any(axis=1) & ~places[-1].any(axis=1)).any())
        return cls(tuple(places), tokens, before, whole)

    @property
    def share(self) -> float:
        """Share of the tokens that are gone."""
        return sum(int(p.sum()) for p in self.places) / max(1, self.tokens)

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Batch and place in it of every sample with such tokens."""
        return [(n, int(i)) for n, p in enumerate(self.places) for i in np.flatnonzero(p.any(axis=1))]

    def agreeing(self, seen: Seen, batch: int, causal: bool) -> Seen:
        """The rows whose inputs are the same for both models, if any: before a causal model's first token gone."""
        place = self.places[batch]
        if len(place) != seen.size or not (self.before if causal else self.whole):
            return seen  # one answer for the whole batch, or no row that could be compared
        first = np.where(place.any(axis=1), place.argmax(axis=1), place.shape[1])
        own = first[seen.sample]
        keep = seen.place < own if causal else own == place.shape[1]
        cut = {k: getattr(seen, k)[keep] for k in ("rows", "against", "sample", "place")}
        return dataclasses.replace(seen, **cut)


def _real(b: Batch, roles: Mapping[str, str], ids: Array) -> Array:
    mask = b.feeds.get(roles.get("mask", ""))
    return mask != 0 if mask is not None and mask.shape == ids.shape else np.ones(ids.shape, bool)


class Resplit:
    """Decodes samples with the original tokenizer and splits them with the one of the reduced vocabulary.

    Raises `OnnxcompError` where that cannot be done for any sample, with the reason.
    """

    def __init__(self, original: Graph, words: Renumbering, roles: Mapping[str, str]) -> None:
        folder = original.path if original.path is None or original.path.is_dir() else original.path.parent
        self._roles = roles
        self._old, self._new = (texts.tokenizer(x) for x in vocabulary.tokenizers(folder, words))
        self._limit = texts.longest(original, folder)
        known = {roles.get(r) for r in MADE}
        others = [s.name for s in specs(original) if s.name not in known or len(s.shape) != 2]
        fixed = [s.name for s in specs(original) if any(isinstance(d, int) and d > 1 for d in s.shape)]
        if others or fixed:
            raise DataError(f"input '{(others or fixed)[0]}' {'is more than a text' if others else 'has a fixed size'}")

    def sample(self, batch: Batch, i: int) -> Batch | None:
        """One sample as a batch of its own; None where its text is not split into the same tokens by the original."""
        ids = batch.feeds[self._roles["tokens"]]
        real = _real(batch, self._roles, ids)[i]
        types = batch.feeds.get(self._roles.get("types", ""))
        old = ids[i][real].tolist()
        words = self._old.decode(old, skip_special_tokens=False)
        if _split(self._old, words) != old or (types is not None and types[i][real].any()):
            return None
        new = np.array([_split(self._new, words)], ids.dtype)
        if new.shape[1] > (self._limit or ids.shape[1]):
            return None
        made = {"tokens": new, "mask": np.ones_like(new), "types": np.zeros_like(new)}
        made["positions"] = np.arange(new.shape[1])[None]
        feeds = {name: made[r].astype(batch.feeds[name].dtype) for r, name in self._roles.items() if r in made}
        return Batch(feeds, None if batch.labels is None else batch.labels[i : i + 1])


@dataclass(frozen=True)
class Again:
    """Sums of the samples that were split again, by metric and sample; `left` of them were not, and why."""

    sums: Mapping[str, Mapping[int, Float64]] = field(default_factory=dict)
    left: int = 0
    why: str = ""

    def put(self, metric: Metric, original: Float64, candidate: Float64) -> Float64:
        """The candidate's sums with those of the samples split again; what perplexity counts are original tokens."""
        found = candidate.copy()
        for i, row in self.sums.get(metric.name, {}).items():
            found[i] = [row[0], original[i, 1]] if metric.name == "perplexity" else row
        return found

    def note(self, gone: Gone, causal: bool) -> str:
        """What a reader of the numbers must know."""
        split = len(gone.samples) - self.left
        said = f"{gone.share:.2%} of the data's tokens are gone"
        if split:
            names = " and ".join(n for n, x in self.sums.items() if x)
            said += f": the texts of {split} samples were split again for {names}"
            said += ", which counts the original's tokens" if self.sums.get("perplexity") else ""
        if self.left:
            said += f"; {self.left} samples read them as the unknown token, since {self.why}"
        agree = gone.before if causal else gone.whole
        drift = "drift is of rows before which none is gone" if agree else "drift reads them as the unknown token"
        return f"{said}; {drift}. More calibration text keeps more tokens"


def again(
    session: Runner, original: Graph, data: Iterable[Batch], gone: Gone, words: Renumbering, metrics: Sequence[Metric]
) -> Again:
    """Score the samples with tokens that are gone once more, as the reduced tokenizer splits their texts."""
    view, several = View.of(original), len(gone.samples)
    first, labels = view.outputs[0], next(iter(data)).labels
    chosen = [m for m in metrics if m.name in TEXTS and (labels is None or labels.ndim == 1)]
    if not chosen:
        return Again({}, several, "there is no metric of whole texts")
    try:
        resplit = Resplit(original, words, view.roles)
    except OnnxcompError as e:
        return Again({}, several, str(e))
    found: dict[int, Batch] = {}
    start = 0
    for b, places in zip(data, gone.places, strict=True):
        for i in map(int, np.flatnonzero(places.any(axis=1))):
            if (one := resplit.sample(b, i)) is not None:
                found[start + i] = one
        start += len(places)
    sums: dict[str, dict[int, Float64]] = {m.name: {} for m in chosen}
    for at, (b, out) in zip(found, session.each(list(found.values()), [first.name]), strict=True):
        answers = {k: a.astype(np.float32, copy=False) for k, a in out.items()}
        scored = Sums(chosen)
        for seen in see(first, view, b, answers, answers):
            scored.update(seen)
        for m in chosen:
            sums[m.name][at] = scored.of(m)[0]
    return Again(sums, several - len(found), "their texts are too long or do not come out of their tokens")


def _split(tok: Tokenizer, words: str) -> list[int]:
    found: list[int] = tok.encode(words, add_special_tokens=False).ids
    return found
