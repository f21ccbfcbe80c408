"""The command line from outside: what is printed where, exit codes, and that nothing half-written is left."""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import typer

import onnxcomp
from onnxcomp import cli
from onnxcomp.benchmarking import benchmark
from onnxcomp.cli import console, diagnosis
from onnxcomp.engine import compress as compressing
from onnxcomp.engine import remedy
from onnxcomp.engine.recipe import presets
from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.files import storage
from onnxcomp.lowering import costs, race
from onnxcomp.pipeline import PassFault
from onnxcomp.reports import json_report
from onnxcomp.runtime import installed, sessions
from tests import tiny

RECIPE = "passes: [canonicalize, cleanup, {qdq: {min_size: 1}}, lower]\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(logging.getLogger("onnxcomp"), "level", logging.NOTSET)  # put back after -v
    monkeypatch.setattr(console, "SILENT", 1e9)  # no progress, however slow the machine is

    def go(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data and recipes; tests only read it."""
    folder = tmp_path_factory.mktemp("cli")
    model = storage.save(tiny.encoder(), folder / "model")
    g = storage.load(model)
    found = [tiny.feeds(g, 4, 9, seed=i) for i in range(5)]
    arrays = {k: np.concatenate([f[k] for f in found]) for k in found[0]}
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "empty.npz", **{k: v[:0] for k, v in arrays.items()})
    np.savez(folder / "wrong_type.npz", **{k: v.astype(np.float32) + 0.5 for k, v in arrays.items()})
    np.savez(folder / "missing.npz", attention_mask=arrays["attention_mask"])
    (folder / "text.csv").write_text("a,b\n")
    (folder / "broken.npz").write_bytes((folder / "data.npz").read_bytes()[:200])
    (folder / "truncated.onnx").write_bytes(model.read_bytes()[:3000])
    (folder / "text.onnx").write_text("not a model")
    (folder / "empty").mkdir()
    linear = storage.save(tiny.linear(8, 6), folder / "linear")
    floats = next(iter(tiny.feeds(storage.load(linear), 4, 9).values()))
    name = storage.load(linear).inputs[0].name
    np.savez(folder / "floats.npz", **{name: floats})
    floats[1, 2, 3] = np.nan
    np.savez(folder / "nan.npz", **{name: floats})
    (folder / "r.yaml").write_text(RECIPE + "gates: [sqnr>=10]\n")
    (folder / "strict.yaml").write_text(RECIPE + "gates: [sqnr>=99]\nadvice: try something gentler\n")
    storage.save(tiny.decoder(spelled="dynamo"), folder / "decoder")
    return folder


def one_object(out: str) -> Any:
    """stdout as the one JSON object it must be."""
    return json.loads(out)


# ---- what works ------------------------------------------------------------------------------------------------------


def compress(place: Path, out: Path, *more: object) -> list[object]:
    return [
        "compress",
        place / "model",
        "-o",
        out,
        "--recipe",
        place / "r.yaml",
        "--calibration",
        place / "data.npz",
        *more,
    ]


def test_compress_writes_a_model_and_a_report(run: Run, place: Path, tmp_path: Path) -> None:
    code, out, err = run(*compress(place, tmp_path / "out", "--no-measure", "--report", tmp_path / "copy.json"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("0.")
    assert "sqnr>=10" in out
    assert f"written to {tmp_path / 'out'}" in out
    assert {"model.onnx", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(
        (tmp_path / "out" / "report.json").read_text()
    )
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert [d.dim_param for d in written.graph.output[0].type.tensor_type.shape.dim][:2] == ["batch", "sequence"]


def test_compress_as_json(run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "bench", functools.partial(benchmark.bench, runs=1, window=0.01))
    monkeypatch.setattr(race, "ROUNDS", 3)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    shape = ("--shape", "batch=2,sequence=4")
    code, out, err = run(*compress(place, tmp_path / "out", "--json", "--eval", place / "data.npz", *shape))
    assert (code, err) == (0, "")
    found = one_object(out)
    jsonschema.validate(found["graphs"]["model"], json_report.schema())
    assert [s["name"] for s in found["graphs"]["model"]["steps"]] == ["canonicalize", "cleanup", "qdq", "lower"]
    ratios = found["graphs"]["model"]["benchmark"]["ratios"]
    assert {r["shape"] for r in ratios} == {"batch=2,sequence=4"}


def test_quiet_is_one_line(run: Run, place: Path, tmp_path: Path) -> None:
    code, out, err = run(*compress(place, tmp_path / "out", "--no-measure", "-q"))
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_plan_writes_nothing(run: Run, place: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    code, out, _ = run(*compress(place, tmp_path / "out", "--plan", "--json"))
    assert code == 0
    assert one_object(out)["out"] is None
    assert set(tmp_path.iterdir()) == before
    code, out, _ = run(*compress(place, tmp_path / "out", "--plan"))
    assert out.startswith("would change")
    assert "qdq" in out
    assert "nothing was written" in out


def test_passes_on_the_command_line(run: Run, place: Path, tmp_path: Path) -> None:
    specs = (
        "--pass",
        "cleanup",
        "--pass",
        "qdq: {min_size: 1, clip: minmax}",
        "--gate",
        "size<=3x",
        "--memory",
        "1GiB",
    )
    args = ("compress", place / "model", "-o", tmp_path / "out", *specs, "--calibration", "random", "--samples", 8)
    code, out, _ = run(*args, "--no-measure", "--json")
    assert code == 0
    found = one_object(out)["graphs"]["model"]
    assert found["steps"][1]["spec"] == "qdq: {clip: minmax, min_size: 1}"
    assert [v["gate"] for v in found["verdicts"]] == ["size<=3x"]
    assert any("random data" in w for w in found["warnings"])


def test_optimize_needs_no_data(run: Run, place: Path, tmp_path: Path) -> None:
    code, out, err = run("optimize", place / "model", "-o", tmp_path / "fast", "--no-measure")
    assert (code, err) == (0, "")
    assert "canonicalize" not in out
    assert "canonicalize" in run("optimize", place / "model", "-o", tmp_path / "fast", "--no-measure", "-v")[1]
    assert (tmp_path / "fast" / "model.onnx").is_file()


def test_inspect_says_what_it_is(run: Run, place: Path) -> None:
    code, out, _ = run("inspect", place / "model")
    assert code == 0
    assert out.startswith("model: 2 layers, width 32, 4 heads")
    facts = one_object(run("inspect", place / "model" / "model.onnx", "--json")[1])["graphs"]["model"]
    assert facts["layers"] == 2
    assert facts["inputs"]["input_ids"] == "int64[batch, sequence]"
    assert facts["outputs"] == {"last_hidden_state": "float[batch, sequence, 32]"}
    assert facts["parameters"]["total"] > 0
    assert [x["shape"] for x in facts["linears"]] == [[32, 32]] * 4 + [[32, 64], [64, 32]] + [[32, 32]] * 4 + [
        [32, 64],
        [64, 32],
    ]


def test_inspect_shows_what_was_not_recognised(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcomp.cli import inspect_model

    def decline(g: Any, *, exact_rows: bool) -> None:
        g.decline("softmax_3", "attention: the mask depends on the scores")

    monkeypatch.setattr(inspect_model, "canonicalize", decline)
    _, out, _ = run("inspect", place / "model")
    assert "1 places not recognised" in out
    assert "the mask depends on the scores" in out


def test_validate_compares_and_judges(run: Run, place: Path) -> None:
    args = ("validate", place / "model", place / "model", "--eval", place / "data.npz")
    code, out, err = run(*args, "--gate", "sqnr>=20", "--gate", "size<=1x")
    assert (code, err) == (0, "")
    assert "equal outputs" in out
    assert out.count("passed") == 2
    code, out, err = run(*args, "--gate", "size<=0.5x", "--json")
    assert code == 3
    assert "size<=0.5x: measured 1, refused" in err
    assert one_object(out)["verdicts"] == [{"gate": "size<=0.5x", "value": 1.0, "passed": False}]


def test_bench_times_models(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxcomp, "bench", functools.partial(benchmark.bench, window=0.01))
    args = ("bench", place / "model", place / "linear", "--shape", "batch=1,sequence=4", "--runs", 2, "--threads", 1)
    code, out, err = run(*args, "--json")
    assert (code, err) == (0, "")
    found = one_object(out)
    assert len(found["rows"]) == 2
    assert {r["threads"] for r in found["rows"]} == {1}
    code, out, _ = run("bench", *args[2:])
    assert code == 0
    assert "batch=1,sequence=4" in out


def test_bench_takes_one_of_several_graphs(run: Run, place: Path, tmp_path: Path) -> None:
    for name in ("encoder", "decoder"):
        (tmp_path / f"{name}.onnx").write_bytes((place / "linear" / "model.onnx").read_bytes())
    code, _, err = run("bench", tmp_path)
    assert (code, "name one with --graph" in err) == (2, True)
    code, _, err = run("bench", tmp_path, "--graph", "encoder", "--runs", "1", "--budget", "0.1s")
    assert code == 0, err


def test_export_passes_its_options_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def export(source: str, out: Path, **options: Any) -> Path:
        asked.update(options, source=source)
        out.mkdir()
        (out / "export.json").write_text('{"task": "text-classification", "dtype": "fp16"}')
        return out

    monkeypatch.setattr(onnxcomp, "export", export)
    args = ("export", "org/name", "-o", tmp_path / "out", "--dtype", "fp16", "--opset", 20, "--revision", "v1")
    code, out, err = run(*args, "--static", "batch=1", "--json")
    assert (code, err) == (0, "")
    assert one_object(out) == {"out": str(tmp_path / "out"), "task": "text-classification", "dtype": "fp16"}
    given = {k: asked[k] for k in ("source", "dtype", "opset", "revision", "static", "allow_pickle")}
    expected = {"source": "org/name", "dtype": "fp16", "opset": 20, "revision": "v1", "static": {"batch": 1}}
    assert given == expected | {"allow_pickle": False}


def test_passes_are_listed_and_explained(run: Run) -> None:
    code, out, _ = run("passes")
    assert code == 0
    assert {"qdq", "cleanup", "lower"} <= {line.split()[0] for line in out.splitlines() if line.strip()}
    assert run("passes", "-q")[1].split() == [p["name"] for p in one_object(run("passes", "--json")[1])["passes"]]
    code, out, _ = run("passes", "qdq")
    assert code == 0
    for part in ("qdq: stage activations, lossy", "min_size", "1024", ">50, <=100", "mse | minmax"):
        assert part in out
    assert one_object(run("passes", "qdq", "--json")[1])["options"][0]["name"] == "clip"
    assert "No options." in run("passes", "cleanup")[1]


def test_schema_is_three_json_schemas(run: Run) -> None:
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    for schema in one_object(out).values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert set(one_object(out)) == {"inspect", "recipe", "report"}


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    names = "export inspect optimize compress validate bench generate package passes schema doctor"
    for name in names.split():
        assert name in out
        assert run(name, "--help")[0] == 0
    assert run("--version")[1] == f"onnxcomp {onnxcomp.__version__}\n"


def test_help_names_every_preset() -> None:
    command = typer.main.get_command(cli.app).commands["compress"]
    (option,) = (p for p in command.params if p.name == "preset")
    assert option.help.partition(";")[0].removeprefix("One of ").split(", ") == presets()


def test_presets_say_what_they_are_for_and_need(run: Run) -> None:
    found = {p["name"]: p for p in one_object(run("presets", "--json")[1])["presets"]}
    assert list(found) == presets() == run("presets", "-q")[1].split()
    assert all(p["about"] and p["passes"][0] == "canonicalize" for p in found.values())
    assert {n: (p["data"].partition(" ")[0], p["target"]) for n, p in found.items() if n in ("int8", "fp16")} == {
        "int8": ("calibration", "cpu"),
        "fp16": ("calibration", "cuda"),
    }
    assert found["optimize"]["data"] == "none"
    assert "--eval" in found["int8-dynamic"]["data"]
    code, out, err = run("presets")
    assert (code, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines() if line.strip()} >= set(found)
    assert "sqnr>=12" not in out
    assert "sqnr>=12" in run("presets", "-v")[1]


@pytest.mark.parametrize(
    ("words", "offered"),
    [("compress m --preset int", {"int8", "int8-dynamic"}), ("bench m --target ten", {"tensorrt"}), ("tun", {"tune"})],
)
def test_shells_complete_commands_presets_and_targets(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, offered: set[str]
) -> None:
    typed = f"onnxcomp {words}"
    monkeypatch.setenv("_ONNXCOMP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, out, _ = run()
    assert code == 0
    assert set(out.split()) >= offered


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.Output().progress() as watch:
        watch("fp16 is not faster on 'cpu'", 0, 0)
    assert capsys.readouterr().err == "note: fp16 is not faster on 'cpu'\n"
    clock = iter([100.0, 101.0, 104.0, 106.0, 109.5])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.Output().progress() as watch:
        for i in range(4):
            watch("measuring batch=1, rounds", i, 12)
    told = ["[4 s] measuring batch=1, rounds: 1 of 12", "[10 s] measuring batch=1, rounds: 3 of 12"]
    assert capsys.readouterr().err.splitlines() == told
    with console.Output(quiet=True).progress() as watch:
        assert watch is None


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("90", 90), ("1.5m", 90), ("1h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    assert console.parse_seconds(text) == seconds


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_able(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "CPUExecutionProvider runs models" in out
    found = one_object(run("doctor", "--json")[1])
    assert found["ok"] is True
    assert {"versions", "runtime", "target cpu", "int8", "threads", "memory"} <= {c["check"] for c in found["checks"]}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, "onnxcomp[cpu]"),
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, "pip uninstall -y onnxruntime onnxruntime-gpu"),
    ],
)
def test_doctor_sees_a_broken_runtime(
    run: Run, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], says: str
) -> None:
    monkeypatch.setattr(installed, "installed_runtimes", lambda: found)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    data = one_object(out)
    assert data["ok"] is False
    assert says in next(c for c in data["checks"] if c["check"] == "runtime")["advice"]


def test_doctor_tells_a_cpu_that_does_not_run_from_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TargetError("does not run here")

    monkeypatch.setattr(sessions, "Session", refuse)
    status = {c["check"]: c["status"] for c in diagnosis.diagnose()["checks"]}
    assert (status["target cpu"], status["target cuda"]) == ("broken", "info")


@pytest.mark.parametrize(
    ("features", "status", "says"),
    [
        ({"avx2", "avx512f", "vnni"}, "ok", "fast"),
        ({"dotprod"}, "ok", "fast"),
        ({"avx2"}, "warning", "saturate"),
        ({"avx512f"}, "warning", "no integer dot products"),
        (set(), "info", "not known"),
    ],
)
def test_doctor_explains_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, features: set[str], status: str, says: str
) -> None:
    monkeypatch.setattr(diagnosis, "cpu_features", lambda: frozenset(features))
    check = diagnosis._integers()
    assert check.status == status
    assert says in check.detail


def test_doctor_names_missing_extras_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = diagnosis._extra("gadget", ("json", "no_such_module"), "gadgets")
    assert (missing.status, missing.detail, missing.advice) == (
        "info",
        "no_such_module missing, needed for gadgets",
        "pip install 'onnxcomp[gadget]'",
    )
    monkeypatch.setattr(diagnosis, "memory", lambda: (8 << 30, 1 << 30))
    assert diagnosis._memory().status == "warning"
    monkeypatch.setattr(diagnosis, "memory", lambda: (None, None))
    assert diagnosis._memory().status == "info"


# ---- what does not work ----------------------------------------------------------------------------------------------

MODELS = {
    "no-such.onnx": "no-such.onnx",
    "truncated.onnx": "truncated.onnx",
    "text.onnx": "text.onnx",
    "empty": "no .onnx file",
    "text.csv": "text.csv",
}
DATA = {
    "no-such.npz": "no-such.npz",
    "broken.npz": "broken.npz",
    "empty.npz": "empty.npz",
    "wrong_type.npz": "input_ids",
    "missing.npz": "input_ids",
    "text.csv": "text.csv",
    "no.such.module:function": "--allow-code",
}
OPTIONS = {
    ("--preset", "int9"): "did you mean 'int8'",
    ("--recipe", "no-such.yaml"): "no-such.yaml",
    ("--pass", "qdqq"): "did you mean 'qdq'",
    ("--pass", "qdq: {clip: nope}"): "clip",
    ("--pass", "qdq", "--preset", "int8"): "exactly one of",
    (): "exactly one of",
    ("--preset", "int8", "--target", "gpu"): "unknown target 'gpu'",
    ("--preset", "int8", "--target", "cuda"): "cuda",
    ("--preset", "int8", "--gate", "sqn>=3"): "did you mean 'sqnr'",
    ("--preset", "int8", "--gate", "fast"): "NAME OP VALUE",
    ("--preset", "int8", "--on-fail", "ignore"): "rollback",
    ("--preset", "int8", "--shape", "batch"): "AXIS=SIZE",
    ("--preset", "int8", "--memory", "much"): "4GB",
    ("--preset", "int8", "--budget", "soon"): "60s or 2m",
    ("--preset", "int8", "--budget", "0s"): "60s or 2m",
    ("--preset", "int8", "--threads", "-1"): "--threads",
    ("--preset", "int8", "--graph", "decoder"): "no graph 'decoder'",
    ("--preset", "int8", "--samples", "0"): "--samples",
    ("--preset", "int8", "--no-such-option"): "--no-such-option",
    ("--pass", "lower", "--pass", "qdq"): "must come before",
}


def refused(run: Run, out: Path, *args: object) -> str:
    """The message of a command that must fail as bad input, writing nothing."""
    before = set(out.parent.iterdir())
    code, stdout, err = run(*args)
    assert code == 2, (code, stdout, err)
    assert stdout == ""
    assert "Traceback" not in err
    assert not out.exists()
    assert set(out.parent.iterdir()) == before
    return err


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["compress", "optimize", "inspect", "bench", "validate"])
def test_a_bad_model_is_named(run: Run, place: Path, tmp_path: Path, command: str, name: str) -> None:
    more: dict[str, list[object]] = {
        "compress": ["-o", tmp_path / "out", "--recipe", place / "r.yaml", "--calibration", place / "data.npz"],
        "optimize": ["-o", tmp_path / "out"],
        "validate": [place / "model", "--eval", place / "data.npz"],
    }
    err = refused(run, tmp_path / "out", command, place / name, *more.get(command, []))
    assert err.startswith("error: ")
    assert MODELS[name] in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("option", ["--calibration", "--eval"])
def test_bad_data_is_named(run: Run, place: Path, tmp_path: Path, option: str, name: str) -> None:
    source = name if ":" in name else place / name
    other = ["--calibration", place / "data.npz"] if option == "--eval" else []
    args = ["compress", place / "model", "-o", tmp_path / "out", "--recipe", place / "r.yaml", option, source, *other]
    err = refused(run, tmp_path / "out", *args)
    assert err.startswith("error: ")
    assert DATA[name] in err
    assert err.count("\n") == 1, err


def test_nan_in_data_is_named(run: Run, place: Path, tmp_path: Path) -> None:
    args = ["compress", place / "linear", "-o", tmp_path / "out", "--recipe", place / "r.yaml"]
    err = refused(run, tmp_path / "out", *args, "--calibration", place / "nan.npz")
    assert "nan.npz" in err
    assert "nan" in err.lower()


def test_missing_data_comes_with_an_example(run: Run, place: Path, tmp_path: Path) -> None:
    err = refused(run, tmp_path / "out", "compress", place / "model", "-o", tmp_path / "out", "--preset", "int8")
    assert "--calibration" in err
    assert "jsonl" in err


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_bad_option_is_explained(run: Run, place: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    args = ("compress", place / "model", "-o", tmp_path / "out", "--calibration", place / "data.npz", *options)
    assert OPTIONS[options] in refused(run, tmp_path / "out", *args)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("compress", "{}/model", "--preset", "int8"), "--plan"),
        (("compress",), "MODEL"),
        (("compress", "{}/model", "-o", "", "--preset", "int8-dynamic"), "-o is empty"),
        (("compress", "{}/model", "--out=", "--preset", "int8-dynamic"), "--out is empty"),
        (("optimize", "", "-o", "out"), "an argument is empty"),
        (("optimize", "{}/model", "-o", "out", "--no-measure", "--shape", "nope=3"), "no axis 'nope'"),
        (("optimize", "{}/model", "-o", "out", "--no-measure", "--shape", "batch=0"), "must be at least 1"),
        (("compress", "{}/model", "--plan", "--preset", "int8-dynamic", "--shape", "nope=3"), "no axis 'nope'"),
        (("validate", "{}/model", "{}/model", "--eval", "{}/data.npz", "--gate", "latency<=1x"), "times nothing"),
        (("validate", "{}/model", "{}/model", "--eval", "{}/data.npz", "--gate", "exact-match>=1"), "never measured"),
        (("nonsense",), "nonsense"),
        (("passes", "quantise"), "unknown pass 'quantise'"),
        (("bench", "{}/model", "--shape", "batch=0"), "must be at least 1"),
        (("bench", "{}/model", "--target", "tpu"), "unknown target 'tpu'"),
        (("bench", "{}/model", "--target", "cuda"), "cuda"),
        (("validate", "{}/model", "{}/linear", "--eval", "{}/data.npz"), "differ"),
        (("validate", "{}/model", "{}/model", "--eval", "{}/data.npz", "--metric", "bleu"), "bleu"),
        (("validate", "{}/model", "{}/model", "--eval", "{}/data.npz", "--metric", "accuracy"), "label"),
        (("export", "{}/empty", "-o", "out", "--static", "batch"), "AXIS=SIZE"),
    ],
)
def test_bad_usage_of_other_commands(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(run, tmp_path / "out", *(a.format(place) for a in args))


def test_an_error_is_one_json_object(run: Run, place: Path, tmp_path: Path) -> None:
    code, out, err = run("optimize", place / "text.onnx", "-o", tmp_path / "out", "--json")
    assert code == 2
    error = one_object(out)["error"]
    assert (error["type"], error["exit_code"]) == ("ModelError", 2)
    assert error["message"] in err
    code, out, _ = run("optimize", "--json")
    assert code == 2
    assert one_object(out)["error"]["type"] == "UsageError"


def test_a_gate_refuses_with_numbers_and_advice(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedy, "SECONDS", 0.1)  # of ranking sites, of which nothing is asked here
    args = ["compress", place / "model", "-o", tmp_path / "out", "--recipe", place / "strict.yaml"]
    args += ["--calibration", place / "data.npz", "--no-measure", "--report", tmp_path / "why.json"]
    code, out, err = run(*args)
    assert (code, out) == (3, "")
    assert err.startswith("refused: ")
    assert "sqnr>=99: measured" in err
    assert "What to try:\ntry something gentler" in err
    assert "Nothing was written." in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["why.html", "why.json"]
    jsonschema.validate(json.loads((tmp_path / "why.json").read_text()), json_report.schema())
    code, out, _ = run(*args, "--json")
    found = one_object(out)
    assert (code, found["error"]["type"], found["error"]["exit_code"]) == (3, "GateFailed", 3)
    jsonschema.validate(found["report"], json_report.schema())
    assert found["report"]["verdicts"][0]["passed"] is False


def test_rollback_keeps_what_the_gate_allows(run: Run, place: Path, tmp_path: Path) -> None:
    args = ["compress", place / "model", "-o", tmp_path / "out", "--recipe", place / "strict.yaml", "--no-measure"]
    code, out, _ = run(*args, "--calibration", place / "data.npz", "--on-fail", "rollback")
    assert code == 0
    assert "rolled back" in out
    assert "QuantizeLinear" not in {n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node}


def test_a_fault_of_a_pass_is_a_fault_of_ours(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise PassFault("pass 'x' left a broken graph")

    monkeypatch.setattr(compressing, "compress_each", broken)
    code, out, err = run("optimize", place / "model", "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "a pass is at fault" in err
    assert "Traceback" not in err
    code, _, err = run("optimize", place / "model", "-o", tmp_path / "out", "-v")
    assert code == 1
    assert "Traceback" in err


# ---- as a process ----------------------------------------------------------------------------------------------------

MAIN = "import sys; from onnxcomp.cli import main; sys.exit(main())"
CRASH = "import onnxcomp.engine.catalog as c\ndef names(): raise ZeroDivisionError('oops')\nc.names = names\n" + MAIN


def process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_what_nobody_expected_is_a_fault_of_ours() -> None:
    quiet, loud = (process(CRASH, "passes", *more) for more in ((), ("-v", "--json")))
    assert quiet.returncode == loud.returncode == 1
    assert "fault of ours" in quiet.stderr
    assert "ZeroDivisionError: oops" in quiet.stderr
    assert "Traceback" not in quiet.stderr
    assert quiet.stdout == ""
    assert "Traceback" in loud.stderr
    assert one_object(loud.stdout)["error"] == {
        "type": "ZeroDivisionError",
        "message": "ZeroDivisionError: oops",
        "exit_code": 1,
    }


def test_an_interrupt_ends_with_130_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    wait = (
        "import onnxcomp.engine.manager as m, time, pathlib\n"
        f"def run(*a): pathlib.Path({str(started)!r}).touch(); time.sleep(60)\n"
        f"m.PassManager.run = run\n{MAIN}"
    )
    command = [sys.executable, "-c", wait, "optimize", str(place / "model"), "-o", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A test run in the background ignores the signal, and children inherit that.
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes) as child:
        for _ in range(600):
            if started.exists() or child.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGINT)
        child.communicate(timeout=60)
    assert child.returncode == 130
    assert [p.name for p in tmp_path.iterdir()] == ["started"]


# ---- values on the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29), ("64k", 64_000), ("123", 123), ("2TiB", 2 << 40)],
)
def test_memory(text: str, size: int) -> None:
    assert console.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 gigs", "0", "1e9", "4GiB!"])
def test_memory_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        console.parse_memory(text)


def test_shapes() -> None:
    assert console.parse_shape("batch=1, sequence=128") == {"batch": 1, "sequence": 128}


@pytest.mark.parametrize("text", ["", "batch", "batch=", "=1", "batch=-1", "batch=x", "batch=1,batch=2", "a=1,"])
def test_shapes_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="AXIS=SIZE"):
        console.parse_shape(text)


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Output(quiet=True).progress() as watch:
        assert watch is None
    with console.Output().progress() as watch:
        assert watch is not None
        watch("qdq", 1, 3)
    assert "qdq" in terminal.text


def test_exact_rows_reach_canonicalize(run: Run, place: Path, tmp_path: Path) -> None:
    found = one_object(run("inspect", place / "decoder", "--exact-rows", "--json")[1])["graphs"]["model"]
    assert found["attention"]["recognised"] == 0
    assert {x["why"] for x in found["not_recognised"]} == {
        "attention: rows without visible keys would change, and exact rows are requested"
    }
    args = ("optimize", place / "decoder", "-o", tmp_path / "exact", "--exact-rows", "--no-measure", "--json")
    code, out, _ = run(*args)
    assert code == 0
    step = one_object(out)["graphs"]["model"]["steps"][0]
    assert step["spec"] == "canonicalize: {exact_rows: true}"
    plain = ("compress", place / "decoder", "-o", tmp_path / "no", "--pass", "cleanup", "--exact-rows")
    code, _, err = run(*plain)
    assert code == 2
    assert "option of canonicalize" in err
