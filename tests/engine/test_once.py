"""A job parses each model file once, raises the model once, and runs the original once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp import canonical
from onnxcomp.benchmarking import benchmark
from onnxcomp.benchmarking.results import Block, Rounds, Row
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import EXACT_SAMPLES
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import race
from onnxcomp.passes import canonicalize
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation import compare, kept
from onnxcomp.validation.compare import Reference
from tests import tiny

PASSES = ["canonicalize", {"prune-ffn": {"ratio": 0.5}}, {"qdq": {"min_size": 1}}, "lower"]
CUT = "config.json still says intermediate_size: 64, but the layers have 24 to 40"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.external(tiny.decoder(layers=2, ffn=64, spelled="dynamo"), folder)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "intermediate_size": 64}))
    return folder


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model file was parsed, by the folder it lies in."""
    found, parse = Counter[str](), storage._read

    def counted(p: Path) -> object:
        found["staging" if p.parent.name.startswith((".", "onnxcomp-")) else p.parent.name] += 1
        return parse(p)

    monkeypatch.setattr(storage, "_read", counted)
    return found


def test_a_job_parses_the_source_and_the_result_once_and_raises_the_model_once(source, tmp_path, parsed, monkeypatch):
    raised: list[Graph] = []
    assert canonicalize.canonical is canonical
    raise_it = canonical.canonicalize
    monkeypatch.setattr(canonical, "canonicalize", lambda g, **options: raised.append(g) or raise_it(g, **options))
    result = oc.compress(source, tmp_path / "out", passes=PASSES, calibration="random", samples=10, measure=False)
    assert parsed == {"model": 1, "staging": 1}
    assert len(raised) == 1
    assert CUT in result.report.warnings  # config.json was compared with the sizes of both
    assert result.report.placement.ran
    assert result.report.integer.quantized_linears > 0


def test_measuring_parses_no_file_again(source, tmp_path, parsed, monkeypatch):
    timed: list[int] = []

    def measure(run: benchmark._Run, shape: dict[str, int]) -> None:
        timed.append(len(run.models))
        run.report.rounds[open_axes.label(shape)] = Rounds((tuple(Block((1.0,), 0.0) for _ in run.models),) * 3)
        run.report.rows += [
            Row(m.name, "", 1.0, 1.0, 1.0, 1.0, 3, 0, 1.0, None, 1.0, 0.1, 1.0, "CPUExecutionProvider", 2)
            for m in run.models
        ]

    monkeypatch.setattr(benchmark._Run, "measure", measure)
    monkeypatch.setattr(race, "_lap", lambda entry, target, threads, *, fetch: entry.laps.append((1.0, 1.0)) or {})
    shapes = [{"batch": 1, "sequence": 8}, {"batch": 2, "sequence": 8}]
    result = oc.optimize(source, tmp_path / "out", shapes=shapes)
    assert sum(parsed.values()) == 2  # source and result; the unlowered model is still in memory
    assert timed == [3, 3]
    assert list(result.report.benchmark.rounds) == ["batch=1,sequence=8", "batch=2,sequence=8"]


def test_a_plan_parses_the_source_once(source, parsed):
    from onnxcomp.engine.compress import compress_each

    compress_each(source, None, passes=["canonicalize", "lower"], plan=True)
    assert parsed == {"model": 1}


def test_the_benchmark_takes_models_that_were_parsed(source, parsed):
    held = storage.read(source)
    report = oc.bench([held, held], shapes=[{"batch": 1, "sequence": 4}], runs=1, window=0.001)
    assert parsed == {"model": 1}
    assert report.models == [str(source / "model.onnx")] * 2
    assert report.rows[0].size_mib == pytest.approx(held.nbytes / 2**20)


def test_exact_passes_are_compared_with_answers_that_are_kept(source, tmp_path, monkeypatch):
    ran: list[bool] = []
    run = Reference._run
    monkeypatch.setattr(Reference, "_run", lambda self, model: ran.append(True) or run(self, model))
    given = {"calibration": "random", "evaluation": "random", "samples": 40}
    passes = ["canonicalize", "cleanup", {"qdq": {"min_size": 1}}, "lower"]
    report = oc.compress(source, tmp_path / "out", passes=passes, **given, measure=False).report
    assert len(ran) == 1
    drifts = [report.step(name).drift["samples"] for name in ("canonicalize", "qdq", "lower")]
    assert drifts == [EXACT_SAMPLES, 40, EXACT_SAMPLES]


# ---- the first answers -----------------------------------------------------------------------------------------------


def batches(lengths: list[int], size: int = 4) -> list[dict[str, np.ndarray]]:
    g = tiny.decoder()
    return [tiny.feeds(g, size, n, seed=i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("n", "samples"), [(1, 4), (4, 4), (7, 4), (8, 8), (100, 12)])
def test_the_head_of_a_reference_is_that_of_whole_batches(n, samples, monkeypatch):
    g, data = tiny.decoder(), as_dataset(batches([5, 7, 6]), tiny.decoder(), batch=4)
    whole, other = Reference(g, data), tiny.decoder(seed=1)
    want = Reference(g, data.head(samples)).against(other).json()
    monkeypatch.setattr(compare, "Runner", OnlyOnce(compare.Runner, other))
    assert whole.head(n).against(other).json() == want
    assert want["samples"] == samples
    assert len(whole.metrics) == len(want["metrics"]) == 1


class OnlyOnce:
    """Runs the candidate; the original may not be run again."""

    def __init__(self, runner: type, candidate: Graph) -> None:
        self.runner, self.candidate = runner, candidate

    def __call__(self, model: Graph, *args: object, **options: object) -> object:
        assert model is self.candidate
        return self.runner(model, *args, **options)


def test_metrics_that_gates_ask_for_are_not_those_of_the_head():
    g, data = tiny.encoder(classes=3), [tiny.feeds(tiny.encoder(classes=3), 4, 6)]
    whole = Reference(g, data, metrics=["agreement"])
    assert [m.name for m in whole.metrics] == ["agreement"]
    assert whole.head(4).metrics == []


def test_answers_on_disk_outlive_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    g = tiny.decoder()
    few = Reference(g, as_dataset(batches([5, 5]), g, batch=4)).head(4)
    assert few.against(g).values()["sqnr"] > 100


# ---- what was stored -------------------------------------------------------------------------------------------------


def test_a_stored_model_knows_its_bytes_and_its_hash(source):
    held = storage.read(source)
    assert held.nbytes == storage.file_bytes(source / "model.onnx") == sum(p.stat().st_size for p in held.files)
    assert len(held.files) == 2
    assert held.fingerprint == storage.fingerprint(source / "model.onnx")
    with Session(held) as a, Session(held.graph) as b:
        feeds = tiny.feeds(held.graph, 2, 5)
        for x, y in zip(a.run(feeds).values(), b.run(feeds).values(), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
