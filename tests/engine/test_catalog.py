"""The catalogue: names without imports, one module per load, third parties, documentation of options."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from onnxcomp.cli import main
from onnxcomp.engine import catalog
from onnxcomp.errors import RecipeError, UnknownPass
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Env, Fidelity, Pass, PassFault, Stage


@dataclass(frozen=True)
class Corner:
    """An option that is a record."""

    x: float = 0.0


@dataclass(frozen=True)
class Sample(Pass):
    """Do something.

    At length.
    """

    name: ClassVar[str] = "sample"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Annotated[int, Field(ge=2, le=8)]
    """Bits per weight."""
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How much."""
    rule: Literal["a", "b"] = "a"
    only: Literal["this"] = "this"
    names: tuple[str, ...] = ()
    ratios: dict[str, float] = field(default_factory=dict)
    corner: Corner = Corner()
    anything: Any = None

    def run(self, g: Graph, env: Env) -> None: ...


def test_names_come_from_the_files() -> None:
    folder = Path(next(iter(catalog.passes.__path__)))
    files = {p.stem.replace("_", "-") for p in folder.glob("*.py") if not p.name.startswith("_")}
    assert set(catalog.names()) == files
    assert {"cleanup", "lower", "qdq", "dynamic-quant", "canonicalize"} <= files
    assert catalog.names() == sorted(files)


@pytest.mark.parametrize("name", catalog.names())
def test_every_pass_loads_and_is_documented(name: str) -> None:
    cls = catalog.load(name)
    assert (cls.name, cls.__module__) == (name, f"onnxcomp.passes.{name.replace('-', '_')}")
    info = catalog.describe(name)
    assert info.doc
    assert info.stage.upper() in (*Stage.__members__, "ANY")
    for option in info.options:
        assert option.doc, f"{name}: say in a docstring what '{option.name}' does"
        assert option.type != "any", f"{name}.{option.name}"


def test_loading_imports_one_module() -> None:
    code = (
        "import sys; from onnxcomp.engine import catalog; catalog.names(); "
        "before = {m for m in sys.modules if m.startswith('onnxcomp.passes.')}; catalog.load('cleanup'); "
        "after = {m for m in sys.modules if m.startswith('onnxcomp.passes.')}; print(sorted(before), sorted(after))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[] ['onnxcomp.passes.cleanup']", run.stderr


@pytest.mark.parametrize("name", ["qddq", "", "../qdq", "qdq.py", "__init__", "onnxcomp.passes.qdq"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownPass, match="unknown pass"):
        catalog.load(name)


def test_options_as_text() -> None:
    options = {o.name: o for o in catalog._options(Sample)}
    assert options["bits"] == catalog.Option("bits", "integer", None, ">=2, <=8", "Bits per weight.", required=True)
    assert options["alpha"] == catalog.Option("alpha", "number | none", None, ">0, <1", "How much.")
    texts = {name: o.type for name, o in options.items()}
    assert texts["rule"] == "a | b"
    assert texts["only"] == "this"
    assert texts["names"] == "list of string"
    assert texts["ratios"] == "mapping to number"
    assert texts["corner"] == "mapping"
    assert texts["anything"] == "any"
    assert "sample.Corner" in catalog.options_schema(Sample)["$defs"]


# ---- third parties ---------------------------------------------------------------------------------------------------


class Dist:
    name = "somebody-else"


class Point(importlib.metadata.EntryPoint):
    """An entry point of an installed distribution."""

    dist = Dist()  # type: ignore[assignment]


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [Point(name, value, catalog.GROUP) for name, value in points]
    monkeypatch.setattr(catalog, "entry_points", lambda group: found if group == catalog.GROUP else [])


def test_a_third_party_adds_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("sample", f"{__name__}:Sample"))
    assert "sample" in catalog.names()
    assert catalog.load("sample") is Sample
    assert catalog.describe("sample").origin == "the package 'somebody-else'"


@pytest.mark.parametrize(
    ("points", "error", "says"),
    [
        ([("new", "x:Y"), ("new", "z:Y")], RecipeError, "both provide a pass 'new'"),
        ([("new", "no_such_module:Y")], PassFault, "cannot be imported"),
        ([("new", f"{__name__}:nothing")], PassFault, "cannot be imported"),
        ([("new", f"{__name__}:Dist")], PassFault, "not a subclass"),
        ([("new", f"{__name__}:Sample")], PassFault, "called 'sample'"),
    ],
)
def test_a_third_party_s_mistakes_name_it(
    monkeypatch: pytest.MonkeyPatch, points: list[tuple[str, str]], error: type[Exception], says: str
) -> None:
    install(monkeypatch, *points)
    with pytest.raises(error, match=says):
        catalog.load("new")


BROKEN = [
    ("new", "no_such_module:Y"),
    ("qdq", "x:Y"),
    ("twice", f"{__name__}:Sample"),
    ("twice", f"{__name__}:Dist"),
    ("other", f"{__name__}:Dist"),
    ("wrong", f"{__name__}:Sample"),
]


def test_a_broken_package_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *BROKEN, ("sample", f"{__name__}:Sample"))
    found = catalog.listing()
    assert {*found.passes} == {*catalog._built_in(), "sample"}
    assert len(found.problems) == 5
    for name, _ in BROKEN:
        (said,) = (p for p in found.problems if f"'{name}'" in p)
        assert "the package 'somebody-else'" in said
    assert catalog.load("qdq").__module__ == "onnxcomp.passes.qdq"


@pytest.mark.parametrize("command", ["passes", "schema", "doctor"])
def test_commands_work_beside_a_broken_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    install(monkeypatch, *BROKEN)
    assert main([command, "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    said = [c["detail"] for c in shown["checks"]] if command == "doctor" else err.splitlines()
    assert sum("the package 'somebody-else'" in line for line in said) == 5
    assert command != "passes" or len(shown["left_out"]) == 5


def test_a_file_defines_exactly_one_pass() -> None:
    with pytest.raises(PassFault, match="exactly one pass, not 0"):
        catalog._only_pass("onnxcomp.pipeline")
