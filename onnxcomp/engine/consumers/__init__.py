"""Folders that other engines load: onnxruntime-genai, Optimum and transformers.js, made of a model and its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnxcomp.data.arguments import path_of
from onnxcomp.engine.consumers import genai, optimum, transformers_js
from onnxcomp.engine.consumers.genai_whisper import write_whisper
from onnxcomp.engine.consumers.pairs import PAIR_CONSUMERS, Sides
from onnxcomp.engine.consumers.source import Source
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.runtime.encoder_source import Pair, pair_of

__all__ = ["CONSUMERS", "package"]

CONSUMERS: dict[str, Callable[[Source, Path], None]] = {
    "genai": genai.write,
    "optimum": optimum.write,
    "transformers.js": transformers_js.write,
}


def package(
    model: str | Path,
    out: str | Path,
    consumer: str,
    *,
    threads: int = 0,
    graph: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write the folder `out` that `consumer` (genai, optimum or transformers.js) loads; returns it.

    `threads` is what genai's configuration asks for, 0 for as many as this machine has cores; `graph` names one of
    several; `tell` gets notes on what was done to the graph. Raises `ModelError` for a model or configuration that the
    consumer cannot load, with the reason, and for a folder that is not empty.
    """
    path, folder = path_of("model", model) or Path(), path_of("out", out) or Path()
    if consumer not in CONSUMERS:
        raise ModelError(f"'{consumer}' is no consumer; there are {', '.join(CONSUMERS)}")
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder}: is a file; a package is written to a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder}: is not empty; a package is written to a new folder")
    pair = pair_of(path) if graph is None else None
    if pair is not None:
        return _package_pair(pair, folder, consumer, threads)
    source = Source.of(storage.one_graph(path, graph), threads)
    if source.slides:  # genai allocates outputs for all tokens; the others count tokens by the length of a cache
        raise ModelError(
            f"{source.path}: its caches hold fewer tokens than were read, which {consumer} does not know; package a "
            "model that keeps all tokens (cache: whole)"
        )
    with storage.publish(folder) as staging:
        CONSUMERS[consumer](source, staging)
    if tell is not None:
        for note in source.notes:
            tell(note)
    return folder


def _package_pair(pair: Pair, folder: Path, consumer: str, threads: int) -> Path:
    """An encoder-decoder for a consumer."""
    sides = None if consumer == "genai" else Sides.of(pair)
    with storage.publish(folder) as staging:
        if sides is None:
            write_whisper(pair, staging, threads)
        else:
            PAIR_CONSUMERS[consumer](sides, staging)
    return folder
