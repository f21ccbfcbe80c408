"""The lowered model against the unlowered one: the better is kept, whatever was measured of its parts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp.benchmarking import benchmark
from onnxcomp.benchmarking.benchmark import BenchReport, Block, Rounds, Row
from onnxcomp.cli import main
from onnxcomp.engine import confirm, manager
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.settings import Settings
from onnxcomp.files import storage
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering import costs, race
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.pipeline import PassFault
from onnxcomp.reports import json_report, tables
from onnxcomp.reports.outcome import Report, Step
from onnxcomp.runtime.placement import placement
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny
from tests.hand import ops


def bench(seconds: dict[str, float]):
    """A benchmark by file name, in place of the real one; the number of models is what was asked."""

    def run(models, target, shapes=(), **_: object) -> BenchReport:
        names = [str(m) for m in models]
        times = [seconds.get(Path(n).stem, 1.0) for n in names]
        rounds = Rounds(tuple(tuple(Block((t, t), 0.0) for t in times) for _ in range(8)))
        rows = [
            Row(n, "batch=1", t, t, t, t, 16, 0, 1 / t, None, 1.0, 0.1, 1.0, "CPUExecutionProvider", 2)
            for n, t in zip(names, times, strict=True)
        ]
        return BenchReport(rows=rows, machine={"cpu": "a cpu"}, models=names, rounds={"batch=1": rounds})

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.onnx"
    storage.save(tiny.encoder(positions=200), path)
    return path


def no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms take a second, so that the table's stay."""
    monkeypatch.setattr(race, "_lap", lambda entry, target, threads, *, fetch: entry.laps.append((1.0, 1.0)) or {})


def optimized(source: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]):
    no_races(monkeypatch)
    monkeypatch.setattr(benchmark, "bench", bench(seconds))
    out = source.parent / "out"
    return out, oc.optimize(source, out)


def test_a_faster_lowered_model_is_kept(source, monkeypatch):
    out, result = optimized(source, monkeypatch, {"unlowered": 2.0})
    said = json.loads((out / "source.report.json").read_text())["lowering"]
    assert said["kept"] == "lowered"
    assert [x["value"] for x in said["ratios"]] == pytest.approx([2])
    assert ops(storage.load(out / "source.onnx"))["Sum"] > 0
    assert len(result.report.benchmark.models) == 2


def test_a_slower_lowered_model_gives_way_to_the_unlowered_one(source, monkeypatch):
    out, result = optimized(source, monkeypatch, {"unlowered": 0.5})
    found = json.loads((out / "source.report.json").read_text())
    assert found["lowering"]["kept"] == "unlowered"
    assert "slower" in found["lowering"]["why"]
    kept = storage.load(out / "source.onnx")
    assert ops(kept)["Sum"] == 0
    assert any("lowering was undone" in w for w in found["warnings"])
    assert [r["model"] for r in found["benchmark"]["rows"]] == ["original", "result"]
    assert found["benchmark"]["ratios"][1]["value"] == pytest.approx(2)
    assert result.report.benchmark.ratio(1, "batch=1").value == pytest.approx(2)
    assert result.report.validation is result.unlowered_validation is not None  # the figures of what was written
    feeds = tiny.feeds(kept, 2, 7)
    with Session(kept) as a, Session(source) as b:
        for x, y in zip(a.run(feeds).values(), b.run(feeds).values(), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_lowered_model_that_is_smaller_gives_way_to_none(source, monkeypatch):
    """Codes of 2 bits stand in 4 before they are lowered."""
    monkeypatch.setattr(confirm, "LARGER", 0.5)
    out, _ = optimized(source, monkeypatch, {"unlowered": 0.5})
    assert json.loads((out / "source.report.json").read_text())["lowering"]["kept"] == "lowered"


def test_a_result_slower_than_the_source_is_said_first(source, monkeypatch):
    _, result = optimized(source, monkeypatch, {"unlowered": 5.0})
    result.report.benchmark = bench({"a": 1.0, "b": 2.0})(["a.onnx", "b.onnx"], CPU)
    assert json_report.headline(result.report).startswith("slower than the original: 0.50x")


def test_a_lowered_model_with_other_outputs_is_undone_without_a_clock(source, monkeypatch):
    def bent(self, g: Graph, env) -> None:
        out = g.outputs[0]
        node = out.producer()
        g.replace(out, g.op("Mul", out, np.array(1.5, np.float32), like=out), users=None)
        g.set_input(g.outputs[0].producer(), 0, node.outputs[0])

    monkeypatch.setattr(Lower, "run", bent)
    monkeypatch.setattr(Lower, "sites", lambda self, g, target: [])
    with pytest.raises(PassFault, match="'lower' promised equal outputs"):
        oc.optimize(source, source.parent / "out", measure=False)
    # Where the original does not run on random inputs, nothing is compared before the result is written.
    monkeypatch.setattr(manager, "answers", lambda make, data, report: None)
    result = oc.optimize(source, source.parent / "out", measure=False)
    said = result.report.lowering
    assert said.kept == "unlowered"
    assert "differs" in said.why
    assert "the unlowered model, which was kept, was not compared with the original" in result.report.warnings


def test_without_measuring_files_are_the_same_bytes(source):
    texts = []
    for name in ("a", "b"):
        oc.optimize(source, source.parent / name, measure=False)
        texts.append((source.parent / name / "source.onnx").read_bytes())
    assert texts[0] == texts[1]


def test_pick_keeps_the_ratio_of_the_models_that_stay():
    found = bench({"a": 1.0, "b": 2.0, "c": 4.0})(["a.onnx", "b.onnx", "c.onnx"], CPU)
    both = confirm.pick(found, (0, 2), "result")
    assert both.models == ["a.onnx", "result"]
    assert [r.model for r in both.rows] == ["a.onnx", "result"]
    assert both.ratio(1, "batch=1").value == found.ratio(2, "batch=1").value == 0.25


@pytest.mark.parametrize(("work", "limit"), [(1.0, confirm.SHORTEST), (25.0, 25.0), (900.0, benchmark.BUDGET)])
def test_the_benchmark_takes_as_long_as_the_passes_unless_a_time_is_given(monkeypatch, work, limit):
    asked: list[float] = []
    monkeypatch.setattr(benchmark, "bench", lambda *_, budget, **__: asked.append(budget))
    report = Report(steps=[Step("lower", "lower", "exact", seconds=work + 4, choosing=4.0)])
    for settings in (Settings(), Settings(budget=30.0), Settings(budget=3.0)):
        confirm.timed([], report, settings, None)
    assert asked == [limit, 26.0, 0.0]


# ---- what the report says --------------------------------------------------------------------------------------------


def test_the_report_lists_candidates_and_reasons(source):
    (result,) = compress_each(source, source.parent / "out", preset="optimize", measure=False).values()
    found = json_report.to_json(result.report)
    (step,) = [s for s in found["steps"] if s["name"] == "lower"]
    kinds = {c["kind"] for c in step["choices"]}
    assert {"attention", "residual", "linear", "activation"} <= kinds
    assert all(c["reason"] and c["sites"] for c in step["choices"])
    assert found["placement"]["ran"]
    assert list(found["placement"]["nodes"]) == ["CPUExecutionProvider"]
    shown = [t.title for t in tables.report_tables(result.report, verbose=True) if not isinstance(t, str)]
    assert "Forms" in shown


# ---- placement -------------------------------------------------------------------------------------------------------


def test_every_operator_runs_on_the_targets_provider():
    g = PassManager([Lower()]).run(tiny.encoder()).model
    found = placement(g, CPU, tiny.feeds(g, 2, 7))
    assert found.ran
    assert found.ok
    assert found.nodes["CPUExecutionProvider"]["Attention"] == 2


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=lambda t: t.name)
def test_without_a_device_the_tables_are_asked_and_it_is_said(target):
    g = tiny.encoder()
    plain = placement(g, target, None, "no device")
    assert (plain.ran, plain.elsewhere, plain.detail) == (False, ("Attention",), "not run: no device")
    lowered = PassManager([Lower()], target=target).run(g).model
    assert placement(lowered, target, None).ok
    own = {n.op_type for n in lowered.nodes() if n.domain == CONTRIB}
    assert own <= set(target.contrib)


def test_work_on_another_provider_is_named():
    g = tiny.encoder()
    elsewhere = dataclasses.replace(CPU, providers=("CPUExecutionProvider",))
    found = placement(g, elsewhere, tiny.feeds(g, 2, 7))
    other = dataclasses.replace(found, elsewhere=("MatMul",))
    assert not other.ok


# ---- the command -----------------------------------------------------------------------------------------------------


def test_tune_writes_a_file_that_optimize_reads(source, monkeypatch, capsys):
    no_races(monkeypatch)
    path, shape = source.parent / "choices.json", ["--shape", "batch=1,sequence=16"]
    assert main(["tune", str(source), "-o", str(path), "-q", *shape]) == 0
    assert "written to" in capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert kept["header"]["target"] == "cpu"
    assert {"attention", "residual"} <= {c["kind"] for c in kept["sites"].values()}
    out = source.parent / "out"
    command = ["optimize", str(source), "-o", str(out), "--choices", str(path), "--no-measure", "--json", *shape]
    assert main(command) == 0
    steps = json.loads(capsys.readouterr().out)["graphs"]["source"]["steps"]
    assert "remembered" in {c["source"] for s in steps for c in s["choices"]}


def test_tune_measures_what_a_quantizing_preset_leaves(source, monkeypatch):
    no_races(monkeypatch)
    monkeypatch.setattr(costs, "_time", lambda forms, *_: dict.fromkeys(forms, 1e-3))
    path = source.parent / "choices.json"
    assert main(["tune", str(source), "-o", str(path), "--preset", "int8", "--shape", "batch=1,sequence=16"]) == 0
    kinds = {c["kind"] for c in json.loads(path.read_text())["sites"].values()}
    assert "quantized" in kinds
    assert json.loads(path.read_text())["numbers"]


def test_tune_is_refused_where_the_target_is_not(source, capsys):
    assert main(["tune", str(source), "-o", "x.json", "--target", "cpu-arm64"]) == 2
    assert "cannot be measured here" in capsys.readouterr().err


def test_a_plan_times_nothing(source, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the clock was asked")

    monkeypatch.setattr(race, "_lap", never)
    monkeypatch.setattr(costs, "_time", never)
    assert main(["compress", str(source), "--plan", "--preset", "optimize", "-q"]) == 0


def test_quantized_models_are_compared_too(source, monkeypatch):
    no_races(monkeypatch)
    monkeypatch.setattr(benchmark, "bench", bench({"unlowered": 2.0}))
    monkeypatch.setattr(costs, "_time", lambda forms, *_: dict.fromkeys(forms, 1e-3))
    out = source.parent / "int8"
    oc.compress(source, out, passes=["canonicalize", Qdq(min_size=1), "lower"], calibration="random", samples=8)
    found = json.loads((out / "source.report.json").read_text())
    assert found["lowering"]["kept"] == "lowered"
    assert found["integer_check"]["ok"]
