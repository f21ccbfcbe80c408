"""What an encoder makes of a text, an image or arrays, for the decoder beside it to write about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import Npz, axes_of
from onnxcomp.data.images import prepare, settings_of
from onnxcomp.data.inputs import completed, roles, specs
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["Pair", "pair_of"]

ENCODER, DECODER = "encoder_model", "decoder_model"
PRESENT, PAST = "present", "past_key_values"


@dataclass(frozen=True)
class Pair:
    """The files of an encoder and of the decoder that reads the caches which it fills."""

    encoder: Path
    decoder: Path

    def read(self, source: str, tokens: list[int] | None, target: Target, threads: int) -> dict[str, Array]:
        """The decoder's inputs of one source: its `tokens`, or the image or `.npz` that `source` names.

        Raises `DataError` where the source is of another kind than the encoder reads.
        """
        stored = storage.read(self.encoder)
        inputs = specs(stored.graph)
        role = roles(inputs)
        if "tokens" in role:
            if not tokens:
                raise DataError("the text has no tokens; give at least one word")
            feeds: Mapping[str, Array] = {role["tokens"]: np.array([tokens])}
        else:
            feeds = self._arrays(Path(source), inputs)
        whole, _ = completed(dict(feeds), inputs)
        with Session(stored, target, threads=threads) as session:
            made = session.run(whole)
        fed = {n.replace(PRESENT, PAST): a for n, a in made.items() if n.startswith(PRESENT)}
        mask = whole.get(role.get("mask", ""))
        return fed if mask is None else fed | {"encoder_attention_mask": mask}

    def _arrays(self, file: Path, inputs: Any) -> dict[str, Array]:
        """The first sample of an `.npz`, or an image as the model wants it."""
        if not file.is_file():
            wanted = ", ".join(f"{s.name} {list(s.shape)}" for s in inputs)
            raise DataError(f"{str(file)[:80]}: no such file; the encoder reads {wanted}: give an image or an .npz")
        if file.suffix == ".npz":
            return dict(Npz([file], str(file), axes_of(inputs)).rows([0]).feeds)
        if "pixels" not in roles(inputs):
            raise DataError(
                f"{file}: the encoder reads {inputs[0].name}; give an .npz of what a feature extractor makes"
            )
        return {inputs[0].name: prepare(file, settings_of(self.encoder.parent), inputs[0])[None]}


def pair_of(folder: Path) -> Pair | None:
    """The encoder and decoder of a folder, None where it holds no such two graphs."""
    files = [folder / f"{name}.onnx" for name in (ENCODER, DECODER)]
    return Pair(*files) if folder.is_dir() and all(f.is_file() for f in files) else None


def begins_with(config: Mapping[str, Any], generation: Mapping[str, Any], where: Path) -> list[int]:
    """The tokens that a decoder's text begins with; raises `ModelError` where the configurations do not tell."""
    told = {**config, **{k: v for k, v in generation.items() if v is not None}}
    start = told.get("decoder_start_token_id", told.get("bos_token_id"))
    if not isinstance(start, int):
        raise ModelError(f"{where}: neither config.json nor generation_config.json has 'decoder_start_token_id'")
    forced = told.get("forced_decoder_ids") or []
    tokens = [start, *(x[1] for x in forced if isinstance(x, list) and len(x) == 2)]
    tokens += [told["forced_bos_token_id"]] if told.get("forced_bos_token_id") is not None else []
    return [int(x) for x in tokens if isinstance(x, int)]


def barred(generation: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens that are never generated, and those that are not the first."""
    single = [x[0] for x in generation.get("bad_words_ids") or [] if isinstance(x, list) and len(x) == 1]
    return [*(generation.get("suppress_tokens") or []), *single], list(generation.get("begin_suppress_tokens") or [])
