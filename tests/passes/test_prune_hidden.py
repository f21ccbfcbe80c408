"""prune-hidden: what reads the narrower stream and what is added to it make up for the cut; refit after it declines."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp import blocks, catalog
from onnxcomp.data import Batch, as_dataset
from onnxcomp.graph import Graph
from onnxcomp.manager import PassManager
from onnxcomp.runtime import Session
from tests import tiny

OPTIONS = {"ratio": 0.25, "multiple_of": 1}


def batches(g: Graph, count: int, seed: int = 0) -> list[Batch]:
    return [Batch(tiny.feeds(g, 4, 9, seed=seed + i)) for i in range(count)]


def cut(g: Graph, **options: object) -> Graph:
    return PassManager([catalog.load("prune-hidden")(**OPTIONS, **options)]).run(g, as_dataset(batches(g, 12), g)).model


def outputs(g: Graph, data: list[Batch]) -> np.ndarray:
    with Session(g) as s:
        return np.concatenate([next(iter(s.run(b.feeds).values())).ravel() for b in data])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("score", ["energy", "magnitude"])
def test_repair_brings_held_out_outputs_closer(score, tied):
    g = tiny.decoder(tied=tied)
    held = batches(g, 4, seed=100)
    there = outputs(g, held)
    none, repaired = (
        np.linalg.norm(outputs(cut(g, score=score, repair=how), held) - there) for how in ("none", "least-squares")
    )
    assert repaired < 0.95 * none


def test_what_is_added_to_the_stream_is_fitted_to_its_remaining_channels():
    """Magnitudes choose the same channels with and without repair, so that only repair tells the weights apart."""
    g = tiny.decoder()
    none, repaired = (cut(g, score="magnitude", repair=how) for how in ("none", "least-squares"))
    for a, b in zip(blocks.linears(none), blocks.linears(repaired), strict=True):
        assert a.sizes == b.sizes
        assert not np.array_equal(none.array(a.weight), repaired.array(b.weight)), a.name


def test_refit_declines_a_stream_of_another_width():
    g = tiny.decoder()
    passes = [catalog.load("prune-hidden")(**OPTIONS), catalog.load("refit")()]
    step = PassManager(passes, allow_unchanged=True).run(g, as_dataset(batches(g, 4), g)).report.step("refit")
    assert step.edits == step.changed == 0
    assert all("wide in the" in d.why or "shared" in d.why for d in step.declined)
