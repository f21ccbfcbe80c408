"""report.json against its schema, and the tables people read."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

import onnxcomp as oc
from onnxcomp import machine, version
from onnxcomp.benchmarking.benchmark import BenchReport, Block, Ratio, Rounds, Row
from onnxcomp.blocks.stored_parts import StoredPart
from onnxcomp.cli.console import show
from onnxcomp.data.datasets import Batch
from onnxcomp.engine import recipe
from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.graph import Declined
from onnxcomp.reports import json_report, tables
from onnxcomp.reports.outcome import DataUsed, Lowering, Origin, Report, Size, Step
from onnxcomp.runtime.placement import Placement
from onnxcomp.runtime.sessions import IntegerCheck
from onnxcomp.validation.drift import Drift
from onnxcomp.validation.gates import Verdict
from onnxcomp.validation.metrics import MetricResult
from onnxcomp.validation.results import Validation
from tests import tiny

SCHEMA = json_report.schema()


def valid(data: Any) -> Any:
    """The data as it reads back from a file, after a check against the schema."""
    again = json.loads(json.dumps(data, allow_nan=False))
    jsonschema.validate(again, SCHEMA)
    return again


def text(found: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    for item in found:
        show(console, item)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bench(ratio: float, spread: float = 0.0) -> BenchReport:
    """A benchmark of two models in which the second is `ratio` times as fast."""
    rng = np.random.default_rng(0)

    def block(seconds: float) -> Block:
        return Block(tuple(float(seconds * (1 + spread * x)) for x in rng.standard_normal(4)), 0.0)

    rounds = Rounds(tuple((block(0.1), block(0.1 / ratio)) for _ in range(8)))
    rows = [
        Row(name, "batch=1", 100.0, 101.0, 102.0, 99.0, 32, 0, 10.0, None, 100.0, 0.1, size, "CPUExecutionProvider", 2)
        for name, size in (("/data/a.onnx", 4.0), ("/data/stage/a.onnx", 1.0))
    ]
    names = [r.model for r in rows]
    return BenchReport(rows=rows, machine={"cpu": "a cpu"}, models=names, rounds={"batch=1": rounds})


def validation(sqnr: float = 20.0, finite: bool = True) -> Validation:
    drift = Drift(0.1, 0.01, sqnr, 0.999, finite=finite)
    metrics = {"accuracy": MetricResult("accuracy", 0.9, 0.88, -0.02, -0.04, math.nan)}
    return Validation({"logits": drift}, metrics, 40, "x.npz", True, scored="logits")


def full() -> Report:
    step = Step("qdq", "qdq: {clip: mse}", "lossy", 3, 1, 4, nodes=(10, 12), nbytes=(4_000_000, 1_000_000))
    step.declined = [Declined("head", "too small"), Declined("embed", "too small")]
    step.drift = validation().json()
    refused = [Verdict("sqnr>=30", 20.0, False), Verdict("kl<=1", None, False)]
    check = IntegerCheck(2, 1, 1, False, "one is dequantized")
    return Report(
        [step],
        refused,
        validation(),
        check,
        ["random data was used"],
        bench(2.0),
        size=Size(4000, 1000),
        calibration=DataUsed("a.npz", 3),
    )


def keys(x: Any) -> Any:
    """The names in JSON objects, objects in a list by its first one."""
    if isinstance(x, list):
        return keys(x[0]) if x else None
    return {k: keys(v) for k, v in x.items()} if isinstance(x, dict) else None


def test_the_error_on_left_out_samples_may_stand_beside_that_on_the_evaluation_data() -> None:
    r, said = full(), {"metric": "kl", "left_out": 0.1, "evaluation": 0.2, "samples": 16, "other_kind": False}
    r.steps[0].drift = {**validation().json(), "left_out": said}
    assert valid(json_report.to_json(r))["steps"][0]["drift"]["left_out"] == said


def test_the_names_in_a_report_stay() -> None:
    """Golden: whoever reads report.json by these names can read the next one."""
    r = full()
    r.origin = Origin(
        "a.onnx", "5a", "4b", "passes: []", "custom", "4e", "try less", "cpu", 3, passes="canonicalize, lower"
    )
    r.lowering = Lowering("lowered", "faster", {"batch=1": Ratio(1.5, 1.4, 1.6)})
    r.steps[0].choices, r.placement = [], Placement("CPUExecutionProvider", True, {"CPUExecutionProvider": {"Gelu": 1}})
    data = valid(json_report.to_json(r))
    assert list(data) == [
        "schema_version", "kind", "summary", "command", "models", "refused", "figures", "job", "source", "recipe",
        "target", "seed", "data", "size", "steps", "verdicts", "layers", "stream_note", "by_layer", "rungs", "remedy",
        "culprit", "validation", "benchmark", "lowering", "placement", "integer_check", "warnings", "machine",
        "versions",
    ]  # fmt: skip
    assert data["source"] == {"path": "a.onnx", "sha256": "5a"}
    assert data["recipe"] == {"name": "custom", "text": "passes: []", "sha256": "4e", "advice": "try less"}
    assert (data["job"], data["target"], data["seed"]) == ("4b", "cpu", 3)
    assert data["data"] == {"calibration": {"name": "a.npz", "samples": 3}, "evaluation": None}
    assert data["size"] == {"original": 4000, "result": 1000, "parts": [], "before": []}
    ratio = {"shape": "batch=1", "value": 1.5, "low": 1.4, "high": 1.6}
    assert data["lowering"] == {"kept": "lowered", "why": "faster", "ratios": [ratio]}
    assert list(data["steps"][0]) == [
        "name", "spec", "fidelity", "eligible", "changed", "edits", "declined", "nodes", "nbytes", "seconds",
        "choosing", "peak_mib", "drift", "rolled_back", "cached", "choices", "noted", "covered",
    ]  # fmt: skip
    assert keys(data["placement"]) == dict.fromkeys(("provider", "ran", "elsewhere", "detail")) | {
        "nodes": {"CPUExecutionProvider": {"Gelu": None}}
    }
    assert list(data["integer_check"]) == [
        "quantized_linears", "integer_products", "dequantized_weights", "ok", "detail",
    ]  # fmt: skip
    assert list(data["benchmark"]) == ["machine", "rows", "ratios", "slower", "noise", "warnings"]
    assert list(data["validation"]) == [
        "samples", "data", "random", "notes", "finite", "equal", "worst", "scored", "uncompared", "values", "outputs",
        "metrics",
    ]  # fmt: skip
    assert r.metadata == {
        "onnxcomp.version": oc.__version__, "onnxcomp.source": "5a", "onnxcomp.recipe": "4e",
        "onnxcomp.target": "cpu", "onnxcomp.schema": "3", "onnxcomp.passes": "canonicalize, lower",
    }  # fmt: skip


def test_an_empty_report_is_valid() -> None:
    data = valid(json_report.to_json(Report()))
    assert data["summary"] == "nothing was measured"
    assert data["schema_version"] == version.REPORT_SCHEMA


def test_a_full_report_is_valid() -> None:
    data = valid(json_report.to_json(full()))
    assert data["steps"][0]["declined"][0] == {"site": "head", "why": "too small"}
    assert data["verdicts"][1] == {"gate": "kl<=1", "value": None, "passed": False}
    assert data["validation"]["metrics"]["accuracy"]["high"] is None
    assert [r["model"] for r in data["benchmark"]["rows"]] == ["original", "result"]
    assert {r["model"]: r["value"] for r in data["benchmark"]["ratios"]} == {
        "original": pytest.approx(1.0),
        "result": pytest.approx(2.0),
    }
    assert data["integer_check"]["ok"] is False


def test_what_is_not_finite_becomes_null() -> None:
    r = full()
    r.validation, r.verdicts = validation(math.inf), [Verdict("sqnr>=30", math.nan, False)]
    r.steps[0].seconds = np.float32(1.5)  # type: ignore[assignment]
    data = valid(json_report.to_json(r))
    assert data["validation"]["values"]["sqnr"] is None
    assert data["verdicts"][0]["value"] is None
    assert data["steps"][0]["seconds"] == 1.5
    assert json_report.finite({1: (np.int64(3), -math.inf, Path("x"), None, True)}) == {"1": [3, None, "x", None, True]}


@pytest.mark.parametrize("change", [{"extra": 1}, {"schema_version": 1}, {"steps": [{}]}, {"size": {"original": 1}}])
def test_the_schema_refuses_anything_else(change: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(json.dumps({**json_report.to_json(Report()), **change})), SCHEMA)


def test_slower_is_the_first_line_whatever_the_gates() -> None:
    r = full()
    r.verdicts = [Verdict("sqnr>=3", 20.0, True)]
    assert json_report.headline(r).startswith("0.25x the size, 2.00x the speed")
    r.benchmark = bench(0.8)
    assert json_report.headline(r).startswith("slower than the original: 0.80x")
    # An interval that reaches 1 proves nothing.
    r.benchmark = bench(0.99, spread=0.3)
    assert r.benchmark.ratio(1, "batch=1").high > 1
    assert not json_report.headline(r).startswith("slower")


def test_the_headline_says_when_outputs_are_equal_or_broken() -> None:
    assert "equal outputs" in json_report.headline(Report(validation=validation(math.inf)))
    assert "not finite" in json_report.headline(Report(validation=validation(finite=False)))
    assert "accuracy 0.9 > 0.88" in json_report.headline(Report(validation=validation()))


def test_a_benchmark_s_headline_names_models() -> None:
    assert json_report.speed_headline(bench(2.0)).startswith("/data/stage/a.onnx: 2.00x the speed")
    assert "slower than /data/a.onnx: 0.50x" in json_report.speed_headline(bench(0.5))


def test_tables_hold_what_was_done_declined_and_measured() -> None:
    shown = text(tables.report_tables(full(), verbose=True))
    for part in (
        "qdq: {clip: mse}",
        "10 > 12",
        "4.0 > 1.0",
        "20.0 dB",
        "too small",
        "head, embed",
        "sqnr>=30",
        "REFUSED",
    ):
        assert part in shown, shown
    for part in ("not measured", "random data", "0.88", "[-0.04, nan]", "2.00x [", "integer check FAILED", "a cpu"):
        assert part in shown, shown
    assert "/data/stage" not in shown


def test_without_v_only_what_was_measured_is_shown() -> None:
    r = full()
    r.lowering = Lowering("lowered", "faster at batch=1")
    shown = text(tables.report_tables(r))
    for part in ("qdq 1 of 3 sites", "REFUSED", "20", "2.00x [", "integer check FAILED", "random data", "memory MB"):
        assert part in shown, shown
    for part in ("10 > 12", "too small", "p90", "load s", "faster at", "MiB"):
        assert part not in shown, shown
    r.integer = IntegerCheck(2, 2, 0, True)
    assert "integer check" not in text(tables.report_tables(r))
    whole = text(tables.report_tables(r, verbose=True))
    assert all(part in whole for part in ("integer check passed", "faster at", "p90", "load s"))


@pytest.mark.parametrize(
    ("nbytes", "says"),
    [(800, "0.0008 MB"), (12_345, "0.01 MB"), (58_480_000, "58.5 MB"), (173 << 20, "181 MB"), (3.41e9, "3.41 GB")],
)
def test_sizes_are_in_units_of_ten(nbytes: float, says: str) -> None:
    assert machine.size_text(nbytes) == says


def test_declined_sites_are_grouped_unless_all_are_asked_for() -> None:
    step = Step("qdq", "qdq", "lossy", declined=[Declined(f"node{i}", "too small") for i in range(9)])
    short, whole = (text([tables.declined([step], every=every)]) for every in (False, True))
    assert "node2, ..." in short
    assert "node8" not in short
    assert "node8" in whole
    assert short.count("too small") == whole.count("too small") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rolled_back": "sqnr>=20: measured 3, refused"}, "rolled back: sqnr>=20"),
        ({"drift": validation(math.inf).json()}, "none"),
        ({"drift": validation(finite=False).json()}, "not finite"),
        ({"cached": True}, "(cached)"),
    ],
)
def test_a_step_says_what_became_of_it(change: dict[str, Any], says: str) -> None:
    assert says in text([tables.steps([Step("qdq", "qdq", "lossy", **change)])])


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = json_report.write(full(), tmp_path / "deep" / "report.json")
    valid(json.loads(path.read_text()))
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OnnxcompError, match="cannot write the report"):
        json_report.write(full(), tmp_path / "file" / "report.json")


def test_a_real_report_is_valid(tmp_path: Path) -> None:
    source = storage.save(tiny.encoder(), tmp_path / "source")
    batches = [Batch(tiny.feeds(storage.load(source), 4, 9, seed=i)) for i in range(4)]
    steps = [recipe.parse_pass(x) for x in ("cleanup", "qdq: {min_size: 1}", "lower")]
    result = oc.compress(source, tmp_path / "out", passes=steps, calibration=batches, gates=["sqnr>=10"], measure=False)
    data = valid(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert data["source"]["sha256"] == storage.fingerprint(source)
    assert recipe.Recipe.from_yaml(data["recipe"]["text"]).hash() == data["recipe"]["sha256"]
    assert data["size"]["result"] < data["size"]["original"]
    assert (data["data"]["calibration"]["samples"], data["data"]["evaluation"]["samples"]) == (13, 3)
    assert any("3 of 16 calibration samples were held out" in w for w in data["warnings"])
    assert data["steps"][1]["changed"] == result.report.step("qdq").changed > 0
    assert "sqnr>=10" in text(tables.report_tables(result.report))


def test_a_busy_machine_is_said_in_the_headline_and_below_the_figures() -> None:
    r = full()
    assert r.benchmark is not None
    assert "busy" not in json_report.headline(r)
    quiet = r.benchmark.rounds["batch=1"].blocks
    noisy = tuple(tuple(Block(b.samples, 1.0) for b in row) for row in quiet)
    r.benchmark.rounds["batch=1"] = Rounds(noisy)
    r.benchmark.warnings.append("batch=1: noisy machine: 8 of 8 rounds were disturbed by others, all are shown")
    assert "at batch=1 on a busy machine" in json_report.headline(r)
    assert "at batch=1 on a busy machine" in json_report.speed_headline(r.benchmark)
    assert "note: batch=1: noisy machine" in text(tables.report_tables(r))


def test_what_stayed_float_is_said_with_its_bytes() -> None:
    parts = (
        StoredPart("embeddings", "float32", 46_900_000),
        StoredPart("linears", "int8", 10_600_000),
        StoredPart("norms", "float32", 120_000),
        StoredPart("other", "int64", 80),
    )
    assert tables.stored(parts) == [
        "float32 that stayed: embeddings 46.9 MB, norms 0.12 MB",
        "int8: linears 10.6 MB",
    ]
    assert tables.stored(parts[:1]) == ["float32: embeddings 46.9 MB"]
    r = full()
    r.size = Size(90_000_000, 58_000_000, parts)
    assert "float32 that stayed: embeddings 46.9 MB" in text(tables.report_tables(r))
    assert valid(json_report.to_json(r))["size"]["parts"][1] == {
        "part": "linears",
        "dtype": "int8",
        "nbytes": 10_600_000,
    }


def test_every_figure_names_the_output_that_it_is_of() -> None:
    from onnxcomp.reports.figures import figures
    from onnxcomp.validation.drift import Drift
    from onnxcomp.validation.results import Validation

    scores = Drift(sqnr=30.0, kl=0.01, agreement=0.9, max_abs=0.2)
    cache = Drift(sqnr=20.0, agreement=0.5, max_abs=0.1)
    v = Validation({"present": cache, "logits": scores}, {}, 4, scored="logits")
    found = {f["name"]: (f["at"], f["after"]) for f in figures(Report(validation=v))}
    assert found["sqnr"] == ("present", 20.0)
    assert found["kl"] == ("logits", 0.01)
    assert found["agreement"] == ("logits", 0.9)
