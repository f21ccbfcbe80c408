"""A model cut and repaired, and how far its outputs are on other data: what tests of repairs share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny


def batches(g: Graph, count: int, seed: int = 0) -> list[Batch]:
    """Batches of eight samples of nine tokens."""
    return [Batch(tiny.feeds(g, 8, 9, seed=seed + i)) for i in range(count)]


def error(g: Graph, model: Graph, data: Sequence[Batch]) -> float:
    """The sum over batches of the squared error of the first output."""
    with Session(g) as a, Session(model) as b:
        pairs = [[next(iter(s.run(x.feeds).values())).astype(np.float64) for s in (a, b)] for x in data]
    return float(sum(np.square(y - z).sum() for y, z in pairs))


def cut(g: Graph, name: str, data: Sequence[Batch], **options: Any) -> tuple[Graph, list[str], float]:
    """The model that a pass cuts and repairs, what is said of sites, and its error on four other batches."""
    found = PassManager([catalog.load(name)(**options)]).run(g, as_dataset(data, g), data[:1])
    said = [n.what for n in found.report.step(name).noted]
    return found.model, said, error(g, found.model, batches(g, 4, seed=100))
