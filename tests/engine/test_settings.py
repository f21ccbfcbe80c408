"""What a user can say has one name: on the command line, in Python, and in the settings that go down to the manager."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import onnxcomp as oc
from onnxcomp.cli import app
from onnxcomp.engine import compress as calls
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import DataError, RecipeError
from onnxcomp.lowering import planner
from tests import tiny

# How the command line prints, and how a caller watches; neither changes a result.
PRESENTATION = {"json", "quiet", "verbose", "watch", "progress", "junit", "summary"}
# Options that may be given several times have a singular name there; a negation is a flag.
PLURAL = {"gate": "gates", "shape": "shapes", "pass": "passes", "metric": "metrics"}
NEGATED = {"no-measure": "measure", "no-html": "html", "no-past": "past"}
# What only one of the two offers: the command line judges and picks a graph of a folder, callers of Python do it by
# `Gate(...).judge(...)` and by path; it writes reports of what those calls return; a plan's blocks, data of its own and
# scratch space are for callers of Python.
ONLY_COMMAND = {
    "validate": {"gates", "graph", "report", "html", "by_layer", "node_data", "generate"},
    "bench": {"report", "html", "generate"},  # what times decoders token by token is a function of its own
}
ONLY_PYTHON = {"validate": {"scratch"}, "bench": {"data", "window"}}


def of_command(name: str) -> set[str]:
    """The options and arguments of a command by the name of their parameter in Python."""
    command = typer.main.get_command(app).commands[name]
    longest = {max((o.lstrip("-") for o in p.opts), key=len) for p in command.params}
    return {NEGATED.get(o, PLURAL.get(o, o)).replace("-", "_") for o in longest} - PRESENTATION - {"help"}


def parameters(call: Callable[..., object]) -> set[str]:
    return set(inspect.signature(call).parameters) - PRESENTATION


@pytest.mark.parametrize("name", ["compress", "optimize", "validate", "bench", "export"])
def test_the_command_line_and_python_have_the_same_names(name: str) -> None:
    command, python = of_command(name), parameters(getattr(oc, name))
    assert command - python == ONLY_COMMAND.get(name, set())
    assert python - command == ONLY_PYTHON.get(name, set())


def test_evaluation_data_may_be_called_eval_for_short() -> None:
    for name in ("compress", "validate"):
        (found,) = (p for p in typer.main.get_command(app).commands[name].params if p.name == "evaluation")
        assert found.opts == ["--evaluation", "--eval"]


@pytest.mark.parametrize("call", [oc.compress, calls.compress_each, oc.optimize, oc.validate, oc.bench])
def test_every_parameter_is_named_and_has_a_type(call: Callable[..., object]) -> None:
    found = inspect.signature(call).parameters.values()
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.annotation is not p.empty for p in found)


def test_one_model_and_each_model_of_a_folder_take_the_same_options() -> None:
    one, each = (list(inspect.signature(f).parameters.values()) for f in (oc.compress, calls.compress_each))
    assert one == each
    assert parameters(oc.optimize) < parameters(oc.compress)


def test_settings_are_among_the_options_of_compress() -> None:
    assert {f.name for f in dataclasses.fields(Settings)} < parameters(oc.compress)


def test_settings_cannot_be_changed() -> None:
    settings = Settings(shapes=({"batch": 1},))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]
    assert settings.shapes == ({"batch": 1},)


def test_the_manager_takes_settings_or_their_fields() -> None:
    by_value, by_name = oc.PassManager([], Settings(seed=3, memory=1 << 20)), oc.PassManager([], seed=3, memory=1 << 20)
    assert (by_value.seed, by_value.memory) == (by_name.seed, by_name.memory) == (3, 1 << 20)
    assert (by_value.measure, by_name.measure) == (True, False)
    with pytest.raises(TypeError, match="sede"):
        oc.PassManager([], sede=3)
    with pytest.raises(RecipeError, match="on_fail"):
        oc.PassManager([], on_fail="never")


def test_choosing_forms_gets_half_of_the_time_for_measuring_and_the_threads() -> None:
    manager = oc.PassManager([], budget=10.0, threads=1)
    assert (manager.budget, manager.threads, manager.choices.header.threads) == (5.0, 1, 1)
    assert oc.PassManager([]).budget == planner.BUDGET
    for wrong, said in (({"budget": 0.0}, "more than 0 s"), ({"threads": -1}, "threads")):
        with pytest.raises(RecipeError, match=said):
            Settings(**wrong)


def test_data_is_opened_as_the_settings_say(tmp_path: Path) -> None:
    g = tiny.encoder()
    settings = Settings(samples=6, batch=4, sequence=5)
    data = settings.dataset("random", g, tmp_path)
    assert [b.feeds["input_ids"].shape for b in data] == [(4, 5), (2, 5)]
    assert settings.dataset(None, g, tmp_path) is settings.dataset((), g, tmp_path) is None
    assert len(settings.dataset([tiny.feeds(g, 3, 5)], g, tmp_path)) == 3
    with pytest.raises(DataError, match="allow"):
        settings.dataset("some.module:function", g, tmp_path)


def test_validate_reads_a_source_as_the_command_line_does(tmp_path: Path) -> None:
    path = tiny.external(tiny.encoder(), tmp_path)
    found = oc.validate(path, path, "random", "cpu", samples=3, sequence=5)
    assert (found.samples, found.random) == (3, True)
