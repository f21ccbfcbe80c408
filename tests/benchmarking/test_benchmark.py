"""The benchmark's arithmetic on made-up numbers, its child processes, and shapes; no test looks at a clock."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import machine
from onnxcomp.benchmarking import benchmark, worker
from onnxcomp.benchmarking.benchmark import bench
from onnxcomp.benchmarking.results import LEAST, NARROW, BenchReport, Block, Rounds, disturbed
from onnxcomp.benchmarking.worker import Child, Watch, busy_seconds
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import as_dataset
from onnxcomp.errors import DataError, ModelError, OnnxcompError, TargetError
from onnxcomp.graph import Graph
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny

SMALL = ({"batch": 2, "sequence": 7},)
STAT = """cpu  999 0 0 0 0 0 0 0 0 0
cpu0 100 10 20 5000 7 1 2 3 50 4
cpu1 200 0 0 5000 9 0 0 0 0 0
cpu12 900 0 0 5000 0 0 0 0 0 0
intr 12345
"""


def rounds(*pairs: tuple[float, float], foreign: tuple[float | None, ...] = (), runs: int = 3) -> Rounds:
    """One round per pair of seconds; `foreign` cores per round, in the first model's block."""
    noise = foreign or (0.0,) * len(pairs)
    blocks = [(Block((a,) * runs, f), Block((b,) * runs, 0.0)) for (a, b), f in zip(pairs, noise, strict=True)]
    return Rounds(tuple(blocks))


def report(r: Rounds) -> BenchReport:
    return BenchReport(models=["a.onnx", "b.onnx"], rounds={"batch=1": r})


# ---- who else uses the cores -----------------------------------------------------------------------------------------


def test_busy_time_counts_our_cores_once_and_neither_idle_nor_guest_time() -> None:
    assert busy_seconds(STAT, frozenset({0}), 100) == pytest.approx((100 + 10 + 20 + 1 + 2 + 3) / 100)
    assert busy_seconds(STAT, frozenset({0, 1}), 100) == pytest.approx(3.36)
    assert busy_seconds(STAT, frozenset({7}), 100) == 0


def test_foreign_use_is_busy_time_minus_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores busy for 1 s of wall time, 1.25 s of it ours: others had 0.75 cores."""
    clock = iter([10.0, 11.0])
    own = iter([5.0, 6.25])
    busy = iter([100.0, 102.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(worker.time, "process_time", lambda: next(own))
    monkeypatch.setattr(Watch, "_busy", lambda _: next(busy))
    watch = Watch()
    watch._known = True
    assert watch.foreign() == pytest.approx(0.75)


def test_a_system_that_does_not_tell_is_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker, "_STAT", tmp_path / "none")
    assert Watch().foreign() is None
    told = list(benchmark.warnings(rounds((1, 1), foreign=(None,)), "batch=1"))
    assert len(told) == 1
    assert "CPU use of other processes is not available here" in told[0]


def test_memory_is_read_from_the_system_or_from_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = machine.peak_mib()
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    assert machine.peak_mib() > 10
    assert told > 10


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("foreign", "dirty"), [(0.0, False), (0.15, False), (0.16, True), (1.9, True), (None, False)])
def test_blocks_are_disturbed_above_the_limit(foreign: float | None, dirty: bool) -> None:
    assert disturbed([Block((1.0,), foreign)]) is dirty


def test_a_round_is_judged_as_a_whole_by_the_time_of_its_blocks() -> None:
    assert not disturbed([Block((1.0,) * 3, 0.0), Block((1.0,), 0.4), Block((9.0,), None)])
    assert disturbed([Block((1.0,), 0.0), Block((1.0,) * 3, 0.4)])


def test_disturbed_rounds_are_dropped_for_all_models() -> None:
    r = rounds((1, 0.5), (9, 0.5), (1, 0.5), (1, 0.5), foreign=(0, 0.9, 0.1, 0.05))
    assert r.clean == [0, 2, 3]
    assert r.samples(0).tolist() == [[1] * 3] * 3
    assert [r.dropped(0), r.dropped(1)] == [3, 3]
    assert r.ratio(1).value == 2


def test_too_few_clean_rounds_are_shown_with_a_warning() -> None:
    r = rounds((1, 1), (2, 2), (3, 3), (4, 4), foreign=(0, 0, 1, 1))
    assert r.used == [0, 1, 2, 3]
    assert r.dropped(0) == 0
    told = list(benchmark.warnings(r, "batch=1"))
    assert told == ["batch=1: noisy machine: 2 of 4 rounds were disturbed by others, all are shown"]


def test_many_dropped_rounds_are_said() -> None:
    r = rounds(*[(1.0, 1.0)] * 8, foreign=(0, 0, 0, 1, 1, 1, 1, 1))
    assert list(benchmark.warnings(r, "x")) == ["x: noisy machine: 5 of 8 rounds were disturbed and dropped"]
    assert list(benchmark.warnings(rounds(*[(1.0, 1.0)] * 8), "x")) == []
    assert r.busy
    assert not rounds(*[(1.0, 1.0)] * 8).busy


def test_another_kind_of_machine_cannot_be_timed_here() -> None:
    with pytest.raises(TargetError, match="'cpu-arm64' is another kind of machine"):
        bench(["model.onnx"], "cpu-arm64")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.5, 2), min_size=3, max_size=12), st.floats(0.2, 5))
def test_a_ratio_survives_a_drifting_clock(clock: list[float], speedup: float) -> None:
    """Both models slow down and speed up together; pairing by rounds keeps the interval on the true ratio."""
    r = rounds(*[(c, c / speedup) for c in clock]).ratio(1)
    assert r.value == pytest.approx(speedup)
    assert r.low == pytest.approx(speedup)
    assert r.high == pytest.approx(speedup)


def test_the_first_model_has_ratio_one() -> None:
    r = report(rounds((1, 2), (3, 2), (2, 2)))
    assert r.ratio(0, "batch=1").value == r.ratio(0, {"batch": 1}).low == 1
    assert r.ratio(1, "batch=1", base=1).value == 1
    assert r.ratio(0, "batch=1", base=1).value == 1 / r.ratio(1, "batch=1").value
    assert r.shapes == ["batch=1"]


def test_slower_means_the_whole_interval_is_below_one() -> None:
    assert report(rounds((1, 1.2), (1, 1.3), (1, 1.1))).slower() == ["b.onnx"]
    assert report(rounds((1, 1.2), (1, 0.5), (1, 0.6))).slower() == []
    assert report(rounds((1, 0.5), (1, 0.5), (1, 0.5))).slower() == []


def test_a_ratio_that_was_not_measured_names_what_was() -> None:
    with pytest.raises(OnnxcompError, match="2 models at batch=1"):
        report(rounds((1, 1))).ratio(1, {"batch": 3})


def test_the_plan_asks_for_enough_rounds() -> None:
    plan = benchmark._Plan(runs=30, threads=0, window=0.3)
    assert [plan.count(s) for s in (0.0001, 0.01, 0.8)] == [1000, 30, 1]
    assert benchmark._Plan(runs=None, threads=0, window=0.3).rounds([2]) == benchmark.ROUNDS
    assert plan.rounds([1000, 30]) == benchmark.ROUNDS
    assert plan.rounds([30, 2]) == 15
    assert benchmark._Plan(runs=2, threads=0, window=0.3).rounds([100]) == 2


class FakeChild:
    """Answers with fixed times; the first blocks are disturbed."""

    log: list[str]

    def __init__(self, name: str, seconds: float, dirty: int = 0) -> None:
        self.name, self.seconds, self.dirty = name, seconds, dirty

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        FakeChild.log.append(self.name)
        foreign = 1.0 if self.dirty > 0 and message["count"] > 2 else 0.0
        self.dirty -= message["count"] > 2
        return {"samples": [self.seconds] * message["count"], "foreign": foreign, "peak_mib": 5.0}


def interleaved(dirty: int, runs: int | None = 4, deadline: float = math.inf) -> tuple[Rounds, list[tuple[int, int]]]:
    """Two models of 0.1 and 0.05 s measured with a fake clock, and what was told meanwhile."""
    FakeChild.log, seen = [], []
    children: Any = [FakeChild("A", 0.1), FakeChild("B", 0.05, dirty)]
    plan = benchmark._Plan(runs, 0, 0.3)
    made, peaks = benchmark._interleave(
        children, [c.seconds for c in children], plan, deadline, lambda r, total: seen.append((len(r.clean), total))
    )
    assert peaks == [5.0, 5.0]
    return made, seen


def test_blocks_alternate_their_order() -> None:
    r, seen = interleaved(dirty=0)
    assert FakeChild.log == list("AB" + "ABBAABBA")
    assert [len(b.samples) for b in r.blocks[0]] == [3, 6]
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_disturbed_rounds_are_measured_again_up_to_a_limit() -> None:
    r, _ = interleaved(dirty=2)
    assert (len(r.blocks), len(r.clean)) == (6, 4)
    r, _ = interleaved(dirty=99)
    assert (len(r.blocks), len(r.clean)) == (12, 0)


def test_measuring_ends_when_the_ratios_are_sure() -> None:
    r, seen = interleaved(dirty=0, runs=None)
    assert len(r.blocks) == len(seen) == LEAST
    assert seen[0] == (0, benchmark.ROUNDS)
    assert len(interleaved(dirty=2, runs=None)[0].blocks) == LEAST + 2


def test_a_wide_interval_is_measured_on() -> None:
    spread = 1 + 2 * NARROW
    wide = rounds(*[(1.0, 1.0), (spread, 1.0), (1.0, spread)] * 3)
    assert not wide.narrow
    assert rounds(*[(1.0, 1.0)] * LEAST).narrow
    assert not rounds(*[(1.0, 1.0)] * (LEAST - 1)).narrow
    plan = benchmark._Plan(None, 0, 0.3)
    assert not plan.done(wide, benchmark.ROUNDS, math.inf)
    assert plan.done(rounds(*[(1.0, 1.0)] * LEAST), benchmark.ROUNDS, math.inf)
    assert not benchmark._Plan(30, 0, 0.3).done(rounds(*[(1.0, 1.0)] * LEAST), benchmark.ROUNDS, math.inf)


def test_no_round_begins_after_the_deadline() -> None:
    assert len(interleaved(dirty=0, deadline=0.0)[0].blocks) == benchmark.FEWEST
    assert len(interleaved(dirty=0, runs=2, deadline=0.0)[0].blocks) == 2
    told = list(benchmark.warnings(rounds(*[(1.0, 1.0)] * 3), "batch=1", late=True))
    assert told == ["batch=1: time was up after 3 rounds, so the interval is wide; --budget gives more"]


def test_the_time_for_measuring_is_shared_by_the_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: 100.0)
    monkeypatch.setattr(benchmark._Run, "measure", lambda run, shape: given.append((run.end - 100.0) / run.left))
    path, shapes = tiny.external(tiny.linear(), tmp_path), [{"batch": n, "sequence": 2} for n in (1, 2, 3)]
    for options in ({}, {"budget": 6.0}, {"runs": 3}, {"runs": 3, "budget": 6.0}):
        bench([path], CPU, shapes, **options)
    assert given[::3] == [benchmark.BUDGET / 3, 2.0, math.inf, 2.0]


# ---- child processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process the benchmark starts."""
    made: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def keep(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", keep)
    return made


def test_two_models_are_measured_and_the_processes_are_gone(
    tmp_path: Path, spawned: list[subprocess.Popen[str]]
) -> None:
    (tmp_path / "deep").mkdir()
    a, b = tiny.external(tiny.encoder(), tmp_path), tiny.external(tiny.encoder(layers=3), tmp_path / "deep")
    seen: list[tuple[str, int, int]] = []
    r = bench([a, tmp_path / "deep"], CPU, SMALL, runs=2, window=0.01, threads=1, watch=lambda *x: seen.append(x))
    assert [(row.model, row.shape) for row in r.rows] == [
        (str(a), "batch=2,sequence=7"),
        (str(tmp_path / "deep"), "batch=2,sequence=7"),
    ]
    for row, path in zip(r.rows, (a, b), strict=True):
        assert row.min <= row.median_ms <= row.p90 <= row.p99
        assert row.samples + row.dropped >= 4
        assert row.provider == "CPUExecutionProvider"
        assert row.threads == 1
        assert row.peak_mib > row.base_mib > 0
        assert row.load_s > 0
        files = path.stat().st_size + path.with_name("model.onnx.data").stat().st_size
        assert row.size_mib == pytest.approx(files / (1 << 20))
        assert row.throughput == pytest.approx(2000 / row.median_ms)
        assert row.tokens == pytest.approx(14000 / row.median_ms)
    assert seen[0] == ("measuring batch=2,sequence=7, rounds", 0, 2)
    ratio = r.ratio(1, SMALL[0])
    assert ratio.low <= ratio.value <= ratio.high
    assert r.machine["runtime"]
    assert r.machine["cores"] >= 1
    plain = json.loads(json.dumps(r.json(), allow_nan=False))
    assert [x["model"] for x in plain["ratios"]] == [str(a), str(tmp_path / "deep")]
    assert len(spawned) == 2
    assert all(p.returncode == 0 for p in spawned)


@pytest.mark.parametrize("target", [CUDA, TENSORRT])
def test_a_device_that_is_not_there_is_an_error_and_never_cpu_numbers(
    tmp_path: Path, target: Any, spawned: list[subprocess.Popen[str]]
) -> None:
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a device here")
    with pytest.raises(TargetError, match=target.name):
        bench([tiny.external(tiny.linear(), tmp_path)], target, [{"batch": 1, "sequence": 2}], runs=1)
    assert all(p.returncode is not None for p in spawned)


def test_a_model_the_runtime_rejects_is_one_clear_error(tmp_path: Path, spawned: list[subprocess.Popen[str]]) -> None:
    g = tiny.linear()
    next(g.nodes("MatMul")).op_type = "NoSuchOperator"
    path = tmp_path / "odd.onnx"
    ir.save(g.model, path)
    with pytest.raises(ModelError, match=r"odd\.onnx"):
        bench([path], CPU, [{"batch": 1, "sequence": 2}], runs=1)
    assert all(p.returncode is not None for p in spawned)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('boom', file=sys.stderr); sys.exit(3)", "ended with code 3: boom"),
        ("import os; os.kill(os.getpid(), 9)", "was killed, most likely for using too much memory"),
    ],
)
def test_a_worker_that_dies_says_how(code: str, message: str) -> None:
    with (
        pytest.raises(OnnxcompError, match=f"m: the benchmark's process {message}"),
        Child("m", [sys.executable, "-c", code]) as c,
    ):
        c.ask("load")


def test_a_worker_that_hangs_is_ended_when_we_are_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), Child("m", [sys.executable, "-c", "import time; time.sleep(600)"]) as c:
        raise KeyboardInterrupt
    assert c.process.returncode == -9


def test_default_shapes_shrink_to_what_the_model_takes(tmp_path: Path) -> None:
    r = bench([tiny.external(tiny.encoder(layers=1, positions=40), tmp_path)], runs=1, window=0.01)
    assert r.shapes == ["batch=1,sequence=32", "batch=8,sequence=32"]
    with pytest.raises(ModelError, match=r"failed to run on input_ids \[1, 128\]"):
        bench([tmp_path / "model.onnx"], CPU, [{"sequence": 128}], runs=1, window=0.01)


def test_what_cannot_be_benchmarked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model"):
        bench([])
    for name in ("encoder.onnx", "decoder.onnx"):
        ir.save(tiny.linear().model, tmp_path / name)
    with pytest.raises(ModelError, match="2 graphs"):
        bench([tmp_path])


def test_the_worker_speaks_lines(tmp_path: Path) -> None:
    """Its two commands, its errors, and runs before a model is there."""
    ir.save(tiny.linear().model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((1, 2, 8), np.float32))
    target = benchmark.dataclasses.asdict(CPU)
    load = {"do": "load", "model": str(tmp_path / "m.onnx"), "feeds": str(tmp_path / "x.npz"), "target": target}
    run = {"do": "run", "warmup": 1, "count": 3}
    ready = {"do": "ready", "target": target}
    lines = [ready, run, {**load, "threads": 1}, run, {**load, "threads": 1, "model": str(tmp_path / "none.onnx")}]
    out = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(x) + "\n" for x in lines)), out)
    first, early, loaded, ran, lost = (json.loads(x) for x in out.getvalue().splitlines())
    assert first == {}
    assert early["error"] == "OnnxcompError"
    assert loaded["provider"] == "CPUExecutionProvider"
    assert len(ran["samples"]) == 3
    assert lost["error"] == "ModelError"


# ---- shapes ----------------------------------------------------------------------------------------------------------


def named(*inputs: tuple[str, Any, list[int | str | None]]) -> Graph:
    values = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape(s)) for n, t, s in inputs]
    return Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 23}, name="inputs"), ir_version=10))


I64, F32, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL


def test_axes_are_matched_by_name_then_by_what_they_are() -> None:
    g = tiny.encoder(batch="n", sequence="length")
    full = {"input_ids": (4, 9), "attention_mask": (4, 9)}
    assert open_axes.shapes_of(g, {"batch": 4, "sequence": 9}) == full
    assert open_axes.shapes_of(g, {"n": 4, "length": 9}) == full
    assert open_axes.shapes_of(g, {"length": 9}) == {"input_ids": (1, 9), "attention_mask": (1, 9)}


def test_unnamed_axes_can_be_given_by_input_and_place() -> None:
    g = named(("x", F32, ["batch", None, 8]))
    with pytest.raises(DataError, match=r"axis 'x\.1' of input 'x' is open"):
        open_axes.shapes_of(g, {"batch": 2})
    assert open_axes.shapes_of(g, {"batch": 2, "x.1": 5}) == {"x": (2, 5, 8)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 3}, "no axis 'width'; its open axes are batch, sequence"),
        ({"batch": 0, "sequence": 2}, "at least 1"),
        ({"batch": 1}, "axis 'sequence' of input 'input_ids' is open"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_axes.shapes_of(tiny.encoder(), shape)


def test_a_fixed_axis_of_another_size_is_refused() -> None:
    g = tiny.encoder(batch=1, sequence=16)
    assert open_axes.shapes_of(g, {"batch": 1, "sequence": 16})["input_ids"] == (1, 16)
    with pytest.raises(DataError, match="batch=8 was asked, but input 'input_ids' has a fixed batch of 1"):
        open_axes.shapes_of(g, {"batch": 8})
    assert open_axes.default_shapes(g) == [{}]
    assert open_axes.label({}) == "fixed"


def test_default_shapes_use_the_axes_that_are_open() -> None:
    assert open_axes.default_shapes(tiny.encoder()) == [{"batch": 1, "sequence": 128}, {"batch": 8, "sequence": 128}]
    assert open_axes.default_shapes(tiny.encoder(batch=2)) == [{"sequence": 128}]
    assert open_axes.default_shapes(named(("pixel_values", F32, ["batch", 3, 8, 8]))) == [{"batch": 1}, {"batch": 8}]


def test_inputs_are_valid_and_the_same_for_every_model() -> None:
    g = tiny.encoder(vocabulary=11)
    feeds = open_axes.feeds_for(g, {"batch": 4, "sequence": 64})
    assert feeds["input_ids"].max() <= 10
    assert feeds["input_ids"].min() >= 0
    assert (feeds["attention_mask"] == 1).all()
    again = open_axes.feeds_for(tiny.encoder(layers=1, vocabulary=11), {"batch": 4, "sequence": 64})
    assert np.array_equal(feeds["input_ids"], again["input_ids"])


def test_other_inputs_get_harmless_values() -> None:
    g = named(
        ("position_ids", I64, ["batch", "sequence"]),
        ("token_type_ids", I64, ["batch", "sequence"]),
        ("flag", BOOL, ["batch"]),
        ("x", ir.DataType.FLOAT16, ["batch", 3]),
    )
    feeds = open_axes.feeds_for(g, {"batch": 2, "sequence": 3})
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert not feeds["token_type_ids"].any()
    assert feeds["flag"].all()
    assert feeds["x"].dtype == np.float16
    assert np.isfinite(feeds["x"]).all()


def test_inputs_from_data_are_cut_and_repeated() -> None:
    g = tiny.encoder()
    ds = as_dataset([tiny.feeds(g, batch=2, sequence=5)], g)
    first = next(iter(ds)).feeds["input_ids"]
    feeds = open_axes.feeds_for(g, {"batch": 3, "sequence": 7}, ds)
    assert feeds["input_ids"].shape == (3, 7)
    assert np.array_equal(feeds["input_ids"][:2, :5], first)
    assert np.array_equal(feeds["input_ids"][2, 5:], first[0, :2])
    assert open_axes.feeds_for(g, {"batch": 1, "sequence": 2}, ds)["input_ids"].tolist() == [first[0, :2].tolist()]


def test_data_without_an_input_is_refused() -> None:
    ds = as_dataset([{"x": np.ones((1, 2), np.float32)}])
    with pytest.raises(DataError, match="no input 'input_ids'"):
        open_axes.feeds_for(tiny.encoder(), {"sequence": 2}, ds)
    with pytest.raises(DataError, match="empty"):
        open_axes.feeds_for(tiny.encoder(), {"sequence": 2}, ds.head(0))


def test_the_machine_is_described() -> None:
    m = machine.machine()
    assert {"cpu", "cores", "features", "os", "python", "onnxcomp"} <= set(m)
    assert not math.isnan(m["cores"])
