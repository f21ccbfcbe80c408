"""What an encoder makes of a text, an image or arrays, for the decoder beside it to write about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import Npz, axes_of, read_json
from onnxcomp.data.images import prepare, settings_of
from onnxcomp.data.inputs import completed, roles, specs
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["DECODER", "ENCODER", "Pair", "barred", "begins_with", "cross_caches", "ends_of", "pair_of", "pair_with"]

ENCODER, DECODER = "encoder_model", "decoder_model"
PRESENT, PAST = "present", "past_key_values"


@dataclass(frozen=True)
class Pair:
    """The files of an encoder and of the decoder that reads the caches which it fills."""

    encoder: Path
    decoder: Path

    def __iter__(self) -> Iterator[Path]:
        return iter((self.encoder, self.decoder))

    def fits(self) -> bool:
        """Whether the encoder makes the cross caches that the decoder takes; other exporters' decoders take states."""
        made, taken = (storage.read(f).graph for f in (self.encoder, self.decoder))
        names = {str(v.name).replace(PRESENT, PAST) for v in made.outputs if str(v.name).startswith(PRESENT)}
        return bool(names) and names <= {str(v.name) for v in taken.inputs}

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
        return cross_caches(whole, made, role)

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


def cross_caches(fed: Mapping[str, Array], made: Mapping[str, Array], role: Mapping[str, str]) -> dict[str, Array]:
    """The decoder's inputs by what an encoder was fed and made: caches of its states, and their mask if it has one."""
    caches = {n.replace(PRESENT, PAST): a for n, a in made.items() if n.startswith(PRESENT)}
    mask = fed.get(role.get("mask", ""))
    return caches if mask is None else caches | {"encoder_attention_mask": mask}


def pair_of(folder: Path) -> Pair | None:
    """The encoder and decoder of a folder, None where it holds no such two graphs.

    Raises `ModelError` where one of both is missing though config.json tells of both.
    """
    files = [folder / f"{name}.onnx" for name in (ENCODER, DECODER)]
    there = [f for f in files if f.is_file()] if folder.is_dir() else []
    if len(there) == 1 and read_json(folder / "config.json").get("is_encoder_decoder"):
        (missing,) = (f.name for f in files if f not in there)
        raise ModelError(f"{folder}: is an encoder-decoder without {missing}; --graph names one graph, {there[0].stem}")
    return Pair(*files) if len(there) == 2 else None


def pair_with(file: Path | None) -> Pair | None:
    """The pair that a file is the encoder or decoder of, where the decoder reads caches that the encoder makes."""
    if file is None or file.name not in (f"{ENCODER}.onnx", f"{DECODER}.onnx"):
        return None
    pair = Pair(*(file.parent / f"{name}.onnx" for name in (ENCODER, DECODER)))
    return pair if pair.encoder.is_file() and pair.decoder.is_file() and pair.fits() else None


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


def ends_of(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, of the configurations beside a model."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        given = read_json(file).get("eos_token_id") if file.is_file() else None
        if given is not None:
            return tuple(int(x) for x in (given if isinstance(given, list) else [given]) if isinstance(x, int))
    return ()
