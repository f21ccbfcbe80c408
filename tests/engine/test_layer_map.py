"""The layers in a report: sizes before and after, element types, and errors that grow where something was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import onnxcomp as oc
from onnxcomp.data.datasets import Batch
from onnxcomp.engine import layer_map
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.errors import GateFailed
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.reports.outcome import Report
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return storage.load(storage.save(tiny.encoder(), tmp_path_factory.mktemp("model")))


def report(model: Graph, *steps: str, gates: tuple[str, ...] = (), **settings: Any) -> Report:
    batches = [Batch(tiny.feeds(model, 4, 9, seed=i)) for i in range(2)]
    passes = [parse_pass(x) for x in ("canonicalize", *steps)]
    return oc.PassManager(passes, gate=oc.Gate(gates), **settings).run(model, batches, batches).report


def test_heads_widths_and_types(model: Graph) -> None:
    found = report(model, "prune-ffn: {ratio: 0.5}", "qdq: {min_size: 1}").layers
    assert len(found) == 2
    assert all(x.heads[0] == x.heads[1] > 0 for x in found)
    assert sum(x.width[1] for x in found) < sum(x.width[0] for x in found)
    assert all(x.weights == {"int8": 6} for x in found)
    errors = [s.error for x in found for s in x.stream]
    assert [s.part for x in found for s in x.stream] == ["attention", "feed-forward"] * 2
    assert all(e is not None and 0 < e < 1 for e in errors)


def test_a_dropped_layer_is_gone(model: Graph) -> None:
    found = report(model, "drop-layers: {ratio: 0.5, protect: 0}").layers
    gone = [x for x in found if not x.weights]
    assert len(gone) == 1
    assert gone[0].heads[1] == gone[0].width[1] == 0


def test_exact_passes_have_no_map(model: Graph) -> None:
    assert report(model, "cleanup").layers == ()


def test_a_refused_result_has_the_map(model: Graph) -> None:
    with pytest.raises(GateFailed) as e:
        report(model, "qdq: {min_size: 1}", gates=("sqnr>=90",))
    assert isinstance(e.value.report, Report)
    assert len(e.value.report.layers) == 2


def test_large_models_are_not_run_for_it(model: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_map, "LARGEST", 1)
    found = report(model, "qdq: {min_size: 1}")
    assert [s.error for x in found.layers for s in x.stream] == [None] * 4
    assert found.stream_note.startswith("models above 0 MiB are not run once more for it")
    monkeypatch.undo()
    assert report(model, "qdq: {min_size: 1}", memory=1000).stream_note == found.stream_note


def test_of_larger_ones_one_sample_is_run(model: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = layer_map._run
    monkeypatch.setattr(layer_map, "_run", lambda g, feeds, *rest: runs.append(len(feeds)) or run(g, feeds, *rest))
    for small in (layer_map.SMALL, 1):
        monkeypatch.setattr(layer_map, "SMALL", small)
        found = report(model, "qdq: {min_size: 1}")
        assert all(s.error for x in found.layers for s in x.stream)
        assert found.stream_note == ""
    assert runs == [4, 4, 1, 1]


def test_a_batch_size_that_is_fixed_is_run_as_it_is(tmp_path: Path) -> None:
    fixed = storage.load(storage.save(tiny.encoder(batch=4), tmp_path / "fixed"))
    found = report(fixed, "qdq: {min_size: 1}")
    assert all(s.error for x in found.layers for s in x.stream)
    passes = [parse_pass("canonicalize"), parse_pass("dynamic-quant: {min_size: 1}")]
    given = [Batch(tiny.feeds(fixed, 4, 9, seed=i)) for i in range(2)]
    made_up = oc.PassManager(passes).run(fixed, given).report  # compared on random inputs, since there are no others
    assert all(s.error for x in made_up.layers for s in x.stream)


def test_a_narrower_stream_is_said(tmp_path: Path) -> None:
    decoder = storage.load(storage.save(tiny.decoder(), tmp_path / "decoder"))
    found = report(decoder, "slice: {ratio: 0.25}")
    assert found.stream_note == "no value of the original's residual stream is in the result by its name"
