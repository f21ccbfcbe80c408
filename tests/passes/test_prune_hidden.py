"""prune-hidden: what reads the narrower stream and what is added to it make up for the cut; refit after it declines."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.coupling import Coupling
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.methods.repair import readers
from onnxcomp.passes import prune_hidden
from onnxcomp.runtime.sessions import Session
from tests import tiny

OPTIONS = {"ratio": 0.25, "multiple_of": 1}


def batches(g: Graph, count: int, seed: int = 0) -> list[Batch]:
    return [Batch(tiny.feeds(g, 4, 9, seed=seed + i)) for i in range(count)]


def cut(g: Graph, **options: object) -> Graph:
    return PassManager([catalog.load("prune-hidden")(**OPTIONS, **options)]).run(g, as_dataset(batches(g, 12), g)).model


def outputs(g: Graph, data: list[Batch]) -> np.ndarray:
    with Session(g) as s:
        return np.concatenate([next(iter(s.run(b.feeds).values())).ravel() for b in data])


@pytest.mark.slow
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


@pytest.mark.parametrize("tied", [False, True])
def test_the_target_is_what_all_readers_of_the_stream_make_best_of_the_channels_kept(tied):
    g = tiny.decoder(tied=tied)
    (place,) = catalog.load("prune-hidden")(**OPTIONS).places(Coupling(g))
    linears = [x for x in blocks.linears(g, tied=True) if x.source in {n.output for n in blocks.norms(g)}]
    gains = {n.output: g.array(n.gain)[:, None] for n in blocks.norms(g)}
    read = np.concatenate(
        [(g.array(x.weight).T if x.transposed else g.array(x.weight)) * gains[x.source] for x in linears], axis=1
    ).astype(np.float64)
    assert len(linears) == 5 * len(blocks.layers(g)) + 1
    keep = np.arange(0, place.group.units, 2)
    found = prune_hidden._projection(g, place, keep)
    want = np.linalg.lstsq(read[keep].T, read.T, rcond=None)[0].T
    np.testing.assert_allclose(found, want, atol=1e-4)
    np.testing.assert_allclose(found[keep], np.eye(len(keep)), atol=1e-4)


def test_channels_that_nothing_reads_are_no_part_of_the_target():
    g = tiny.decoder()
    (place,) = catalog.load("prune-hidden")(**OPTIONS).places(Coupling(g))
    keep = np.arange(place.group.units - 4)
    gone = np.setdiff1d(np.arange(place.group.units), keep)
    readers.silence(g, place.group, gone)
    found = prune_hidden._projection(g, place, keep)
    np.testing.assert_allclose(found, np.eye(place.group.units)[:, keep], atol=1e-6)
