"""Laws of arguments: whatever is given, from Python or the command line, is accepted or refused in one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp.cli import main
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.recipe import Recipe
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import ModelError, OnnxcompError, RecipeError
from onnxcomp.files import storage
from onnxcomp.validation.gates import Gate
from tests import tiny

ODD: list[Any] = [-1, 0, 1.5, True, "x", "1zib", "", b"x", [], [1], {}, {"a": 1}, ["batch=1"], [{"batch": "1"}]]
ODD += [[{"batch": 0}], [{1: 1}], 1 << 80, math.nan, object(), "a\0b", "n" * 5000, ["sqnr>=20", 3]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    storage.save(tiny.linear(), folder)
    return folder / "model.onnx"


OPTIONS = ["model", "out", "preset", "recipe", "passes", "target", "samples", "batch", "sequence", "gates", "on_fail",
           "shapes", "opset", "budget", "threads", "memory", "choices", "cache", "report", "graph", "seed"]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_odd_values_from_python_are_refused_by_name(
    source: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No raw exception, and no option of the command line in a message; each option takes every other value."""
    monkeypatch.chdir(tmp_path)
    for value in ODD[OPTIONS.index(option) % 2 :: 2]:
        given = {"model": source, "out": None, "measure": False, "plan": True, option: value}
        if option not in ("preset", "recipe", "passes"):
            given["passes"] = ["canonicalize"]
        said = ""
        try:
            compress_each(**given)
        except OnnxcompError as e:
            said = str(e)
        assert "--" not in said
    assert option == "cache" or not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "sqnr>=20"}, r"gates is a list of texts such as \['sqnr>=20'\], not 'sqnr>=20'"),
        ({"memory": "1zib"}, "memory is a whole number of at least 1, not '1zib'"),
        ({"shapes": ["batch=1"]}, "shapes is a list such as .* and holds 'batch=1'"),
        ({"samples": "x"}, "samples is a whole number"),
        ({"samples": 0}, "samples is a whole number of at least 1, not 0"),
        ({"seed": -1}, "seed is a whole number of at least 0, not -1"),
        ({"opset": 3}, "opset is a whole number from 7"),
        ({"preset": "nope", "model": "/nowhere/m.onnx"}, "/nowhere/m.onnx: no such file"),
    ],
)
def test_messages_name_the_option_and_what_it_takes(source: Path, options: dict[str, Any], message: str) -> None:
    given = {"model": source, "preset": "optimize", "out": None, **options}
    with pytest.raises(OnnxcompError, match=message):
        oc.compress(**given)


def test_numbers_of_numpy_are_numbers() -> None:
    assert Settings(batch=np.int64(3), seed=np.uint8(0)).batch == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "args",
    [
        ["--seed", "-1"], ["--batch", "0"], ["--samples", "-3"], ["--opset", "0"], ["--opset", "99999999999999999999"],
        ["--memory", "0"], ["--shape", "batch=0"], ["--target", "n" * 5000], ["--report", "n" * 300],
        ["--choices", "n" * 300], ["--cache", "/dev/null/x"], ["--graph", "../x"], ["--calibration", "n" * 300],
    ],
)  # fmt: skip
def test_odd_values_on_the_command_line_exit_with_2(
    source: Path, tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["compress", str(source), "-o", "out", "--preset", "int8-dynamic", "--no-measure", *args])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "fault of ours" not in error
    assert not list(tmp_path.iterdir())


def test_a_long_name_and_a_missing_model_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("n" * 300, "File name too long"), (str(tmp_path / "none.onnx"), "no such file")):
        assert main(["compress", name, "-o", str(tmp_path / "out"), "--preset", "int8"]) == 2
        assert said in capsys.readouterr().err


# ---- names of recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/abs", "x/../model", "..", ".hidden", "", "a" * 65, "a\nb", "a\\b", "c:d"])
def test_a_recipe_has_no_path_for_a_name(name: str) -> None:
    with pytest.raises(RecipeError, match="'name' becomes a part of file names"):
        Recipe(passes=("canonicalize",), name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["...yaml", "a:b.yaml", f"{'x' * 200}.yaml", "-.yaml", "ünï cödé.yaml"])
def test_a_recipe_file_of_any_name_is_read(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("[canonicalize]")
    assert Recipe.from_yaml(tmp_path / file).passes


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_replaces_reports_only(tmp_path: Path) -> None:
    """Not the source, not any other input, not a file of the result."""
    storage.save(tiny.linear(), tmp_path)
    source, notes = tmp_path / "model.onnx", tmp_path / "notes.json"
    notes.write_text("{}")
    before = source.read_bytes()
    for report in (source, notes, tmp_path, tmp_path / "out" / "model.onnx", source / "x"):
        with pytest.raises(OnnxcompError):
            oc.optimize(source, tmp_path / "out", report=report, measure=False)
    assert (source.read_bytes(), notes.read_text()) == (before, "{}")
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        oc.optimize(source, tmp_path / "out", report=tmp_path / "deep" / "r.json", measure=False)
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["schema_version"] == 3


def test_a_result_beside_its_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.save(tiny.linear(), tmp_path)
    assert main(["optimize", str(tmp_path), "-o", str(tmp_path), "--no-measure"]) == 0
    assert "model-optimize.onnx" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "options",
    [
        {"runs": 0},
        {"runs": "x"},
        {"threads": -1},
        {"threads": 1 << 40},
        {"shapes": ["batch=1"]},
        {"shapes": {"batch": 1}},
    ],
)
def test_a_benchmark_takes_numbers(source: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        oc.bench([source], **options)
    with pytest.raises(ModelError, match="models is a list"):
        oc.bench(str(source))


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    storage.save(tiny.linear(), tmp_path)
    (tmp_path / "model-optimize.onnx").hardlink_to(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="never overwritten"):
        oc.optimize(tmp_path / "model.onnx", tmp_path, measure=False)


def test_other_functions_check_what_they_are_given(source: Path) -> None:
    for call in (
        lambda: oc.validate(source, source, "random", metrics="accuracy"),
        lambda: oc.validate(source, source, "random", samples="x"),  # type: ignore[arg-type]
        lambda: oc.validate(source, source, "random", seed=-1),
        lambda: oc.validate(3, source, "random"),  # type: ignore[arg-type]
        lambda: storage.load("n" * 5000),
        lambda: storage.load(None),  # type: ignore[arg-type]
        lambda: Gate("sqnr>=20"),
    ):
        with pytest.raises(OnnxcompError):
            call()


def test_a_file_larger_than_any_model_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(ModelError, match="no model file has more than"):
        storage.load(tmp_path)
