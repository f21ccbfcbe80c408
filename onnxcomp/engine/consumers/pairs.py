"""Folders of encoder-decoders: an encoder that gives states, and one decoder that makes its cross caches of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import read_json
from onnxcomp.engine.consumers.transformers_js import LARGEST, dtype_of
from onnxcomp.engine.probe import random_feeds
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.graph.cross_branch import FLAG, STATES, merged_decoder, states_only
from onnxcomp.maths import Array
from onnxcomp.runtime.encoder_source import PAST, PRESENT, Pair
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.drift import decibel

__all__ = ["PAIR_CONSUMERS", "Sides"]

ENCODER, MERGED = "encoder_model", "decoder_model_merged"
SHAPE, TOKENS = {"batch": 2, "sequence": 7}, 3
LEAST_DB = 60.0  # the same products in another graph
HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head")  # in Optimum's order of preference
WIDTHS = ("hidden_size", "d_model", "n_embd")
LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layer")


@dataclass(frozen=True)
class Sides:
    """The two graphs as consumers read them, and the configuration of the folder."""

    folder: Path
    encoder: Graph
    decoder: Graph
    config: dict[str, Any]

    @classmethod
    def of(cls, pair: Pair) -> Sides:
        """Made of a pair; raises `ModelError` where it cannot be, or would write another text."""
        folder = pair.encoder.parent
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: has no config.json, which every consumer reads; copy the checkpoint's")
        if not pair.fits():
            raise ModelError(f"{folder}: its decoder takes no caches from its encoder, as what export writes does")
        encoder, decoder = (storage.read(f).graph for f in pair)
        there = {str(v.name) for v in decoder.inputs}
        names = [str(v.name) for v in encoder.outputs if str(v.name).replace(PRESENT, PAST) in there]
        merged = merged_decoder(encoder, decoder, {n.replace(PRESENT, PAST): n for n in names})
        sides = cls(folder, states_only(encoder), merged, read_json(folder / "config.json"))
        if (db := _agreement(encoder, decoder, sides, folder)) < LEAST_DB:
            raise ModelError(f"{folder}: the joined decoder gives other scores ({db:.0f} dB); please report it")
        return sides

    @property
    def _told(self) -> dict[str, Any]:
        inner = self.config.get("decoder")
        return inner if isinstance(inner, dict) else self.config

    def check_layers(self, consumer: str) -> None:
        """Raise `ModelError` where config.json tells another number of layers than there are caches."""
        names = [str(v.name) for v in self.decoder.inputs if str(v.name).startswith(f"{PAST}.")]
        layers = [{int(n.split(".")[1]) for n in names if side in n} for side in (".decoder.", ".encoder.")]
        count = next((self._told[n] for n in LAYERS if isinstance(self._told.get(n), int)), len(layers[0]))
        if any(found != set(range(count)) for found in layers):
            raise ModelError(f"{self.folder}: {consumer} wants caches of all {count} layers, numbered from 0")

    def check_sizes(self, consumer: str) -> None:
        """Raise `ModelError` where caches that are made from config.json do not fit the decoder's inputs."""
        heads, width = (next((self._told[n] for n in names if n in self._told), 0) for names in (HEADS, WIDTHS))
        told = (heads, width // max(heads, 1))
        for v in self.decoder.inputs:
            sizes = (v.shape[1], v.shape[3]) if v.shape is not None and len(v.shape) == 4 else told
            if sizes != told:
                raise ModelError(
                    f"{self.folder}: '{v.name}' has {sizes[0]} heads of {sizes[1]}, {consumer} makes {told[0]} of "
                    f"{told[1]} from config.json"
                )


def _agreement(encoder: Graph, decoder: Graph, sides: Sides, folder: Path) -> float:
    """SQNR in dB of the scores of some tokens and of one more behind them, by both forms."""
    feeds = random_feeds(encoder, folder, SHAPE)
    masks = {"encoder_attention_mask": feeds["attention_mask"]} if "attention_mask" in feeds else {}
    ids = np.arange(2 * (TOKENS + 1)).reshape(2, -1) + 1
    with Session(encoder) as session:
        made = session.run(feeds)
    cross = {n.replace(PRESENT, PAST): a for n, a in made.items() if n.startswith(PRESENT)}
    ours = _scores(decoder, ids, {**cross, **masks}, {})
    with Session(sides.encoder) as session:
        states = session.run(feeds)["last_hidden_state"]
    theirs = _scores(sides.decoder, ids, {STATES: states, **masks}, {n: a[:, :, :0] for n, a in cross.items()})
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(ours, theirs, strict=True)]
    found = [decibel(float((x**2).sum()), float(((y - x) ** 2).sum())) for x, y in pairs]
    return -math.inf if any(map(math.isnan, found)) else min(found)


def _scores(g: Graph, ids: Array, steady: dict[str, Array], cross: dict[str, Array]) -> list[Array]:
    """Scores of the first tokens and of the last one, caches handed on."""
    with Session(g) as session:
        ports = {p.name: p for p in session.inputs}
        caches = dict(cross)
        for name in (n for n in ports if ".decoder." in n):
            sizes: list[Any] = [len(ids), ports[name].shape[1], 0, ports[name].shape[3]]
            caches[name] = np.zeros(sizes, ports[name].dtype)
        found = []
        for i, part in enumerate((ids[:, :TOKENS], ids[:, TOKENS:])):
            flag = {FLAG: np.array([i > 0])} if FLAG in ports else {}
            fed = {n: a for n, a in steady.items() if n in ports}
            out = session.run({"input_ids": part, **fed, **caches, **flag})
            found.append(out["logits"])
            caches = {n: out[n.replace(PAST, PRESENT)] for n in caches}
    return found


def _optimum(sides: Sides, folder: Path) -> None:
    sides.check_layers("Optimum")
    sides.check_sizes("Optimum")
    storage.copy_companions(sides.folder, folder)
    storage.save(sides.encoder, folder, name=f"{ENCODER}.onnx")
    storage.save(sides.decoder, folder, name=f"{MERGED}.onnx")


def _transformers_js(sides: Sides, folder: Path) -> None:
    sides.check_layers("transformers.js")
    storage.copy_companions(sides.folder, folder)
    (folder / "onnx").mkdir()
    types = {}
    for name, g in ((ENCODER, sides.encoder), (MERGED, sides.decoder)):
        if (size := storage.written_bytes(g)) > LARGEST:
            raise ModelError(f"{name}: has {size / 1e9:.1f} GB; transformers.js is given files of at most 2 GB")
        types[name], suffix = dtype_of(g)
        storage.save(g, folder / "onnx" / f"{name}{suffix}.onnx", one_file=True)
    config = sides.config | {"transformers.js_config": {"dtype": types}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


PAIR_CONSUMERS: dict[str, Callable[[Sides, Path], None]] = {"optimum": _optimum, "transformers.js": _transformers_js}
