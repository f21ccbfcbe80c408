"""Comparison of a model with a reduced vocabulary: re-tokenized texts for task metrics, unaffected rows for drift.

Data holds token ids of the original. Where a token was removed, the sample's text is decoded and tokenized again with
the reduced tokenizer; drift is measured on the rows whose inputs are the same for both models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.data import texts, vocabulary
from onnxcomp.data.inputs import Batch, specs
from onnxcomp.data.untrusted import guarded
from onnxcomp.data.vocabulary import Renumbering
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64
from onnxcomp.runtime.runner import Runner
from onnxcomp.validation.metrics import Metric, Sums
from onnxcomp.validation.outputs import View, as_float, output_rows
from onnxcomp.validation.rows import OutputRows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["RemovedTokens", "Retokenized", "Retokenizer", "retokenize"]

TEXT_METRICS = ("perplexity", "accuracy", "f1")  # comparable between two tokenizations of the same text
TEXT_ROLES = ("tokens", "mask", "types", "positions")  # inputs that follow from a text alone


@dataclass(frozen=True)
class RemovedTokens:
    """Which tokens of the data a reduced vocabulary lacks: one bool mask `[B, S]` per batch, false for padding.

    `tokens` counts all tokens; `prefixes` says whether some sample has tokens before its first removed one, `complete`
    whether some sample has no removed token.
    """

    masks: tuple[Array, ...]
    tokens: int
    prefixes: bool
    complete: bool

    @classmethod
    def of(cls, data: Iterable[Batch], vocab: Renumbering, roles: Mapping[str, str]) -> RemovedTokens:
        """Find them in the data; `roles` names the inputs (`data.inputs.roles`)."""
        masks, tokens, prefixes, complete = list[Array](), 0, False, False
        keep = np.zeros(vocab.size, bool)
        keep[vocab.kept] = True
        for b in data:
            ids = b.feeds.get(roles.get("tokens", ""), np.zeros((0, 0), np.int64))
            visible = _visible(b, roles, ids)
            masks.append(visible & ~keep[np.clip(ids, 0, vocab.size - 1)])
            tokens += int(visible.sum())
            prefixes |= bool((visible & (np.cumsum(masks[-1], axis=1) == 0)).any())
            complete |= bool((visible.any(axis=1) & ~masks[-1].any(axis=1)).any())
        return cls(tuple(masks), tokens, prefixes, complete)

    @property
    def share(self) -> float:
        """Share of the tokens that were removed."""
        return sum(int(p.sum()) for p in self.masks) / max(1, self.tokens)

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Batch number and index in the batch of every sample with removed tokens."""
        return [(n, int(i)) for n, p in enumerate(self.masks) for i in np.flatnonzero(p.any(axis=1))]

    def agreeing(self, rows: OutputRows, batch: int, causal: bool) -> OutputRows:
        """The rows whose inputs are the same for both models, if any; if causal, those before a removed token."""
        removed = self.masks[batch]
        if len(removed) != rows.samples or not (self.prefixes if causal else self.complete):
            return rows  # one output for the whole batch, or no row that could be compared
        first = np.where(removed.any(axis=1), removed.argmax(axis=1), removed.shape[1])
        first_removed = first[rows.sample]
        keep = rows.position < first_removed if causal else first_removed == removed.shape[1]
        cut = {k: getattr(rows, k)[keep] for k in ("rows", "reference", "sample", "position")}
        return dataclasses.replace(rows, **cut)


def _visible(b: Batch, roles: Mapping[str, str], ids: Array) -> Array:
    mask = b.feeds.get(roles.get("mask", ""))
    return mask != 0 if mask is not None and mask.shape == ids.shape else np.ones(ids.shape, bool)


class Retokenizer:
    """Decodes samples with the original tokenizer and encodes the text with the one of the reduced vocabulary.

    Raises `OnnxcompError` with the reason where that can be done for no sample.
    """

    def __init__(self, original: Graph, vocab: Renumbering, roles: Mapping[str, str]) -> None:
        folder = original.path if original.path is None or original.path.is_dir() else original.path.parent
        self._roles = roles
        self._old, self._new = (texts.tokenizer(x) for x in vocabulary.tokenizers(folder, vocab))
        self._limit = texts.longest(original, folder)
        text_inputs = {roles.get(r) for r in TEXT_ROLES}
        others = [s.name for s in specs(original) if s.name not in text_inputs or len(s.shape) != 2]
        fixed = [s.name for s in specs(original) if any(isinstance(d, int) and d > 1 for d in s.shape)]
        if others or fixed:
            raise DataError(f"input '{(others or fixed)[0]}' {'is more than a text' if others else 'has a fixed size'}")

    def sample(self, batch: Batch, i: int) -> Batch | None:
        """One sample as a batch of its own; None where its tokens do not survive decoding and encoding."""
        ids = batch.feeds[self._roles["tokens"]]
        visible = _visible(batch, self._roles, ids)[i]
        types = batch.feeds.get(self._roles.get("types", ""))
        old = ids[i][visible].tolist()
        text = self._old.decode(old, skip_special_tokens=False)
        if _split(self._old, text) != old or (types is not None and types[i][visible].any()):
            return None
        new = np.array([_split(self._new, text)], ids.dtype)
        if new.shape[1] > (self._limit or ids.shape[1]):
            return None
        arrays = {"tokens": new, "mask": np.ones_like(new), "types": np.zeros_like(new)}
        arrays["positions"] = np.arange(new.shape[1])[None]
        feeds = {name: arrays[r].astype(batch.feeds[name].dtype) for r, name in self._roles.items() if r in arrays}
        return Batch(feeds, None if batch.labels is None else batch.labels[i : i + 1])


@dataclass(frozen=True)
class Retokenized:
    """Sums of re-tokenized samples by metric and sample number; how many were `skipped`, and why."""

    sums: Mapping[str, Mapping[int, Float64]] = field(default_factory=dict)
    skipped: int = 0
    why: str = ""

    def put(self, metric: Metric, original: Float64, candidate: Float64) -> Float64:
        """The candidate's sums with those of re-tokenized samples; perplexity counts the original's tokens."""
        sums = candidate.copy()
        for i, row in self.sums.get(metric.name, {}).items():
            sums[i] = [row[0], original[i, 1]] if metric.name == "perplexity" else row
        return sums

    def note(self, removed: RemovedTokens, causal: bool) -> str:
        """One sentence for reports: how removed tokens were treated in metrics and drift."""
        split = len(removed.samples) - self.skipped
        note = f"{removed.share:.2%} of the data's tokens were removed from the vocabulary"
        if split:
            names = " and ".join(n for n, x in self.sums.items() if x)
            note += f": the texts of {split} samples were re-tokenized for {names}"
            note += ", which counts the original's tokens" if self.sums.get("perplexity") else ""
        if self.skipped:
            note += f"; {self.skipped} samples read them as the unknown token, since {self.why}"
        agree = removed.prefixes if causal else removed.complete
        where = "rows before the first of them" if causal else "samples without them"
        drift = f"drift is measured on {where}" if agree else "drift reads them as the unknown token"
        return f"{note}; {drift}. More calibration text keeps more tokens"


def retokenize(
    session: Runner,
    original: Graph,
    view: View,
    data: Iterable[Batch],
    removed: RemovedTokens,
    vocab: Renumbering,
    metrics: Sequence[Metric],
) -> Retokenized:
    """Score the samples with removed tokens again, on their texts as the reduced tokenizer encodes them."""
    count, first, labels = len(removed.samples), view.scored, next(iter(data)).labels
    chosen = [m for m in metrics if m.name in TEXT_METRICS and (labels is None or labels.ndim == 1)]
    if not chosen:
        return Retokenized({}, count, "no metric was computed that two tokenizations share")
    try:
        resplit = Retokenizer(original, vocab, view.roles)
    except OnnxcompError as e:
        return Retokenized({}, count, str(e))
    samples: dict[int, Batch] = {}
    start = 0
    for b, masks in zip(data, removed.masks, strict=True):
        for i in map(int, np.flatnonzero(masks.any(axis=1))):
            if (one := resplit.sample(b, i)) is not None:
                samples[start + i] = one
        start += len(masks)
    sums: dict[str, dict[int, Float64]] = {m.name: {} for m in chosen}
    for at, (b, out) in zip(samples, session.each(list(samples.values()), [first.name]), strict=True):
        answers = {k: as_float(a) for k, a in out.items()}
        scored = Sums(chosen)
        for rows in output_rows(first, view, b, answers, answers):
            scored.update(rows)
        for m in chosen:
            sums[m.name][at] = scored.of(m)[0]
    return Retokenized(sums, count - len(samples), "their texts are too long or decode to other tokens")


def _split(tok: Tokenizer, text: str) -> list[int]:
    with guarded("the tokenizer failed"):
        ids: list[int] = tok.encode(text, add_special_tokens=False).ids
    return ids
