"""Random inputs of the original's interface: for the comparison where nobody gives data, and for the written result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import Rows, axes_of
from onnxcomp.data.datasets import Dataset, load_data, roles, specs, static_batch
from onnxcomp.data.input_check import InputCheck
from onnxcomp.data.inputs import vocabulary
from onnxcomp.data.vocabulary import between
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["SHAPES", "Probe", "batches", "fitted", "probe", "random_feeds"]

CODES = 32  # of a number of size 1, in a cache of codes
LARGE = 32 << 20  # bytes of a batch after which no larger one is made: 8 million numbers take seconds to compare
SHAPES = ({"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 12})


def random_feeds(g: Graph, folder: Path | None, shape: Mapping[str, int]) -> dict[str, Array]:
    """One batch for a model at a shape, where its axes are open; `folder` holds its configuration."""
    sizes: dict[str, Any] = {"batch": shape["batch"], "samples": shape["batch"], "sequence": shape["sequence"]}
    return next(iter(load_data("random", g, folder, **sizes))).feeds


def batches(g: Graph, folder: Path | None) -> Iterator[tuple[Mapping[str, int], dict[str, Array]]]:
    """Shapes with a batch of each; of inputs that are large by themselves only the first."""
    for shape in SHAPES:
        feeds = random_feeds(g, folder, shape)
        yield shape, feeds
        if sum(a.nbytes for a in feeds.values()) > LARGE:
            return


class Probe(Dataset):
    """Random batches that a model takes, to compare a result on where no data was given."""

    def __init__(self, g: Graph, folder: Path | None) -> None:
        source = Rows.of([feeds for _, feeds in batches(g, folder)], "random", axes_of(specs(g)))
        source.random = True
        check = InputCheck(specs(g), vocabulary(g), "random")
        super().__init__(source, source.widest, check, fixed_batch=static_batch(g) is not None)


def probe(g: Graph) -> tuple[Probe | None, str]:
    """Random inputs to judge on, and a note; none where they cannot be made."""
    try:
        return Probe(g, g.path.parent if g.path else None), "no data was given to judge on"
    except OnnxcompError as e:
        return None, f"the result was not compared with the original, since there are no random inputs: {e}"


def fitted(feeds: Mapping[str, Array], original: Graph, result: Graph) -> dict[str, Array]:
    """Inputs of the original as its result takes them: ids of a reduced vocabulary, other caches, none removed."""
    ports = {s.name: s for s in specs(result)}
    made = dict(feeds)
    if (words := between(original, result)) is not None:
        tokens = roles(specs(original)).get("tokens")
        made = words.feeds(made, [tokens] if tokens else [])
    for name in ports.keys() & made.keys():
        for axis, n in enumerate(ports[name].shape):
            if isinstance(n, int) and made[name].ndim == len(ports[name].shape) and n < made[name].shape[axis]:
                made[name] = np.take(made[name], np.arange(n), axis=axis)
        if made[name].dtype.kind == "f" and ports[name].integer:  # any codes will do for a cache of them
            bounds = np.iinfo(ports[name].dtype)
            made[name] = np.clip(made[name] * CODES, bounds.min, bounds.max).astype(ports[name].dtype)
    return made
