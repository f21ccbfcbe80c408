"""How long two decoders say the same: greedy text of both behind the same beginnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.inputs import roles, specs
from onnxcomp.data.vocabulary import between
from onnxcomp.errors import DataError
from onnxcomp.maths import Array
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.target import CPU, Target

__all__ = ["Greedy", "greedy"]


@dataclass(frozen=True)
class Greedy:
    """Of `texts` of `new` tokens: how many are `equal`, the share of equal tokens, tokens before the first other one.

    `tokens` counts those up to the first difference over all tokens, since what follows it answers another text.
    """

    texts: int
    prompt: int
    new: int
    equal: int
    tokens: float
    median_first: float

    def __str__(self) -> str:
        return (
            f"greedy text behind {self.prompt} tokens: {self.equal} of {self.texts} texts of {self.new} are equal, "
            f"{self.tokens:.0%} of all tokens come before the first difference (median {self.median_first:g})"
        )


def greedy(original: Model, result: Model, data: Dataset, *, prompt: int, new: int, target: Target = CPU) -> Greedy:
    """Generate behind the first `prompt` tokens of each text of `data` by both models, one session at a time.

    Raises `DataError` where no text is that long or the words differ, `ModelError` for a model that is no decoder.
    """
    role, words = roles(specs(graph_of(original))), between(graph_of(original), graph_of(result))
    if "tokens" not in role:
        raise DataError("greedy text is of decoders of text; the original takes no tokens")
    if words is not None:
        raise DataError("greedy text is compared token by token; the result has other words than the original")
    starts = [text for batch in data for text in _starts(batch.feeds, role, prompt)]
    if not starts:
        raise DataError(f"{data.name}: no text has {prompt} tokens; ask for shorter beginnings")
    texts = []
    for model in (original, result):
        with Decoder(model, target) as decoder:
            made = []
            for start in starts:
                decoder.reset()
                made.append([int(x[0]) for x in generated(decoder, start[None], new)])
            texts.append(np.array(made))
    first = np.where((texts[0] == texts[1]).all(axis=1), new, (texts[0] != texts[1]).argmax(axis=1))
    equal = int((first == new).sum())
    return Greedy(len(starts), prompt, new, equal, float(first.sum() / (new * len(first))), float(np.median(first)))


def _starts(feeds: Mapping[str, Array], role: Mapping[str, str], count: int) -> list[Array]:
    """The first tokens of texts that are long enough, without padding."""
    tokens, mask = feeds[role["tokens"]], feeds.get(role.get("mask", ""))
    shown = np.ones(tokens.shape, bool) if mask is None or mask.shape != tokens.shape else mask.astype(bool)
    return [row[keep][:count] for row, keep in zip(tokens, shown, strict=True) if keep.sum() >= count]
