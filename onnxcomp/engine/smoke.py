"""A written model must load, and run where its original runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data import open_axes
from onnxcomp.data.vocabulary import renumbering
from onnxcomp.engine.compared import NO_KERNEL
from onnxcomp.engine.probe import SHAPES, batches, fitted, random_feeds
from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.files import storage
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.pipeline import PassFault
from onnxcomp.runtime import trial
from onnxcomp.target import Target

__all__ = ["prove", "proven", "runs", "smoke"]


def prove(source: Stored, target: Target) -> None:
    """Run a model nobody has run yet in a worker; raises `ModelError` where it crashes the runtime or does not end."""
    renumbering(source.graph)  # metadata that is damaged is the file's fault, not that of a pass
    try:
        feeds = _small(source)
    except OnnxcompError:
        return  # nothing can be made up for it, so nothing made up will run either
    trial.prove(source, feeds, target)


def proven(model: Graph | Stored | str | Path, target: Target) -> Graph | Stored:
    """A model, read where a path is given; one in a file is proven."""
    given = storage.read(model) if isinstance(model, (str, Path)) else model
    if isinstance(given, Stored):
        prove(given, target)
    return given


def _small(model: Stored) -> Mapping[str, Any]:
    """Made-up inputs of a small size; from the roles of inputs where an open axis has no size of its own."""
    g = model.graph
    try:
        return open_axes.feeds_for(g, {k: min(n, 8) for k, n in open_axes.default_shapes(g)[0].items()})
    except OnnxcompError:
        return random_feeds(g, model.path.parent, SHAPES[0])


def smoke(original: Stored, written: Stored, target: Target) -> list[str]:
    """Run the written model on random inputs of the original at two shapes (where its axes are dynamic).

    Raises `PassFault` where it does not load, or fails though the original runs, and `ModelError` where only its
    outputs are not finite or the runtime lacks an operator; a note where the original fails as well.
    """
    notes = []
    for shape, feeds in batches(original.graph, original.path.parent):
        found = _Run.of(written, fitted(feeds, original.graph, written.graph), target)
        if not found.trouble:
            continue
        before = _Run.of(original, feeds, target)
        if not found.loaded and before.trouble and NO_KERNEL not in found.trouble:
            raise ModelError(f"{original}: neither it nor what was made of it can be run: {before.trouble}")
        if not found.loaded or not before.trouble:
            _refuse(found, shape)
        notes.append(f"the original fails on random inputs at {shape} as well as the result: {found.trouble}")
    return notes


def runs(model: Stored, target: Target) -> str:
    """Why a model does not load, or gives no finite outputs for made-up inputs of a small size; empty if it does."""
    return _Run.of(model, _small(model), target).trouble


@dataclass(frozen=True)
class _Run:
    """What came of one run: whether the runtime loaded and ran the model, and what is wrong, empty if nothing is."""

    trouble: str
    loaded: bool
    ran: bool = False

    @classmethod
    def of(cls, model: Stored, feeds: Mapping[str, Any], target: Target) -> _Run:
        loaded = False
        try:
            trial.load(model, target)
            loaded = True
            outputs = trial.run(model, feeds, target)
        except OnnxcompError as e:
            return cls(str(e).replace(str(model.path), model.path.name), loaded)  # it may lie in a temporary folder
        bad = [name for name, y in outputs.items() if hasattr(y, "dtype") and y.dtype.kind == "f" and not _finite(y)]
        return cls(f"output '{bad[0]}' is not finite" if bad else "", loaded=True, ran=True)


def _finite(y: Any) -> bool:
    return bool(np.isfinite(y).all())


def _refuse(found: _Run, shape: Mapping[str, int]) -> None:
    if not found.loaded and NO_KERNEL not in found.trouble:
        raise PassFault(f"the result does not load: {found.trouble}")
    what = f"the result fails on random inputs at {shape}, the original does not: {found.trouble}"
    if NO_KERNEL in found.trouble:
        raise ModelError(f"{what}; --opset 21 writes older operators")
    if found.ran:
        raise ModelError(what)
    raise PassFault(what)
