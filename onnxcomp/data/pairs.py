"""Sources with the texts that a decoder is to write about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxcomp.data.arrays import read_json
from onnxcomp.data.datasets import open_data
from onnxcomp.data.inputs import Batch, Source, word_count
from onnxcomp.data.texts import Columns, open_text
from onnxcomp.data.untrusted import guarded
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["TARGET", "Pairs", "columns_of", "open_pairs"]

TARGET = "decoder_input_ids"  # an array of the tokens that a decoder reads, as transformers calls it
COLUMNS = ("text", "target")
OPTION = "--text-column SOURCE,TARGET"
RANDOM_TOKENS = 8


class Pairs:
    """Samples of an encoder with the tokens that a decoder reads, as `decoder_input_ids`, and their `texts` if known.

    Only those of equally many tokens share a batch.
    """

    def __init__(
        self, source: Source, targets: Sequence[Array] | None = None, texts: Sequence[str] | None = None
    ) -> None:
        self.source, self.targets, self.texts = source, targets, texts
        self.name, self.random, self.notes = source.name, source.random, source.notes

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> object:
        """Number of tokens, and what the encoder's samples must share."""
        return self.source.key(index), None if self.targets is None else len(self.targets[index])

    def rows(self, indices: Sequence[int]) -> Batch:
        """The encoder's inputs with the decoder's tokens `[samples, tokens]`; labels have no meaning here."""
        batch = self.source.rows(indices)
        if self.targets is not None:
            return Batch({**batch.feeds, TARGET: np.stack([self.targets[i] for i in indices])})
        return Batch(dict(batch.feeds))


def columns_of(text_column: str | None) -> tuple[str, str]:
    """The fields of source and target of a line of JSONL, given as `a,b`, or as `a` alone."""
    names = [x.strip() for x in (text_column or "").split(",") if x.strip()]
    return names[0] if names else COLUMNS[0], names[1] if len(names) > 1 else COLUMNS[1]


def open_pairs(
    src: str,
    encoder: Graph,
    decoder: Graph,
    folder: Path,
    *,
    samples: int | None,
    sequence: int | None,
    text_column: str | None,
    allow_code: bool,
    seed: int,
) -> Pairs:
    """Pairs from `.jsonl` (`text` and `target`), arrays of the encoder with `decoder_input_ids`, or random ones.

    `.txt` has no targets. Raises `DataError`; the first sample is looked at.
    """
    first, second = columns_of(text_column)
    path = Path(src)
    with guarded(f"{src}: cannot be used with the files beside the model"):
        if path.suffix == ".txt" and path.is_file():
            raise DataError(f"{src}: has no targets; an encoder-decoder takes .jsonl with '{first}' and '{second}'")
        source = open_data(
            src, encoder, folder, samples=samples, sequence=sequence, columns=(first, None), allow_code=allow_code,
            seed=seed,
        )  # fmt: skip
        if path.suffix == ".jsonl" and path.is_file():
            found = open_text(path, decoder, folder, sequence, Columns(second, option=OPTION))
            start = _start(folder)
            return Pairs(source, [_begun(x, start) for x in found.ids], found.texts)
        if source.random:
            tokens = np.random.default_rng(seed).integers(0, word_count(decoder), (len(source), RANDOM_TOKENS))
            return Pairs(source, list(tokens))
    return Pairs(source)


def _start(folder: Path) -> int:
    """The token that every text of the decoder begins with; raises `DataError` where no configuration tells."""
    told = {**read_json(folder / "config.json"), **read_json(folder / "generation_config.json")}
    for name in ("decoder_start_token_id", "bos_token_id"):
        if isinstance(told.get(name), int):
            return int(told[name])
    raise DataError(f"{folder}: neither config.json nor generation_config.json has 'decoder_start_token_id'")


def _begun(ids: Array, start: int) -> Array:
    return ids if ids[0] == start else np.concatenate([[start], ids])
