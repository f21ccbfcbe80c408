"""Texts that an encoder-decoder writes about the sources of pairs, beside their targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import read_json
from onnxcomp.data.datasets import Dataset
from onnxcomp.data.texts import longest, tokenizer_beside
from onnxcomp.engine.encoded import Encoded, is_cross
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.maths import Array
from onnxcomp.runtime.encoder_source import barred, begins_with, ends_of
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.target import Target

__all__ = ["references", "written"]


def references(data: Dataset, folder: Path) -> list[str]:
    """The targets as texts, in the order of the samples; arrays of tokens are read by the tokenizer beside a model."""
    source = data.source
    if not isinstance(source, Encoded):
        raise DataError(f"{data.name}: holds no pairs of a source and a target, so texts are compared with nothing")
    if source.given.texts is not None:
        return [source.given.texts[i] for i in data.indices]
    tok = tokenizer_beside(folder)
    return [text for batch in data for text in tok.decode_batch(batch.feeds["input_ids"].tolist())]


def written(decoder: Path, data: Dataset, new: int, target: Target) -> list[str]:
    """What a decoder writes, at most `new` tokens, behind what the data has of its encoder."""
    folder, stored = decoder.parent, storage.read(decoder)
    tok, told = tokenizer_beside(folder), [read_json(folder / f"{x}config.json") for x in ("", "generation_")]
    start, limit = begins_with(told[0], told[1], folder), longest(stored.graph, folder)
    most = new if limit is None else min(new, limit - len(start))
    texts, batches = list[str](), iter(data)
    first = next(batches)
    with Decoder(stored, target, given=_given(first.feeds)) as model:
        for batch in (first, *batches):
            model.reset(_given(batch.feeds))
            ends = ends_of(folder)
            begin = np.tile(start, (batch.size, 1))
            made = generated(model, begin, most, ends=ends, pad=ends[0] if ends else 0, barred=barred(told[1]))
            texts += _texts(tok, np.stack(list(made), axis=1), ends)
    return texts


def _given(feeds: dict[str, Array]) -> dict[str, Array]:
    return {name: a for name, a in feeds.items() if is_cross(name) or name == "encoder_attention_mask"}


def _texts(tok: Any, tokens: Array, ends: tuple[int, ...]) -> Iterator[str]:
    for row in tokens.tolist():
        stop = next((i for i, x in enumerate(row) if x in ends), len(row))
        yield tok.decode(row[:stop])
