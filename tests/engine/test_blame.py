"""An exception inside a pass names the pass, its file and its line, and is a fault of the pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.cli import main
from onnxcomp.engine import catalog
from onnxcomp.engine.blame import blaming
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.errors import DataError
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.pipeline import PassFault
from tests import tiny

BREAKS = """
from dataclasses import dataclass
from typing import ClassVar
from onnxcomp import Fidelity, Pass, Site, Stage, blocks
from onnxcomp.stats import Stat, Statistic, mean, name_of, Need

class Fragile:
    def update(self, x, extra=None):
        return [][7]  # statistic
    def merge(self, other): ...
    def result(self): ...

class Broken(Statistic):
    kind: ClassVar[str] = "broken"
    per: ClassVar = ()
    @classmethod
    def accumulator(cls, stat):
        return Fragile()

@dataclass(frozen=True)
class BreaksDown(Pass):
    "Raise where it is asked to."
    stage: ClassVar = Stage.WEIGHTS
    fidelity: ClassVar = Fidelity.LOSSY
    where: str = "run"
    "Where."

    def __post_init__(self):
        super().__post_init__()
        if self.where == "options":
            raise ValueError("no such thing")  # options

    def advice(self, target):
        if self.where == "advice":
            raise KeyError("x")  # advice
        return ()

    def sites(self, g, target):
        if self.where == "sites":
            raise TypeError("two\\nlines")  # sites
        return [x.site for x in blocks.linears(g)]

    def needs(self, g, target):
        for x in blocks.linears(g):
            yield Need(name_of(x.source), Stat("broken")) if self.where == "statistic" else mean(x.source)
        if self.where == "needs":
            assert False  # needs

    def planning(self):
        return 1 / 0  # planning

    def companions(self, result):
        raise AttributeError("gone")  # companions

    def run(self, g, env):
        if self.where == "run":
            env.evaluate([lambda g: 1 / 0])  # run
        for x in blocks.linears(g):
            g.put(x.weight, g.array(x.weight) * 0.999)
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A pass in a folder beside the others, for as long as the test runs."""
    path = tmp_path / "passes" / "breaks_down.py"
    path.parent.mkdir()
    path.write_text(BREAKS)
    catalog.passes.__path__.append(str(path.parent))
    yield path
    catalog.passes.__path__.remove(str(path.parent))
    sys.modules.pop("onnxcomp.passes.breaks_down", None)
    from onnxcomp.stats import statistic

    statistic._KINDS.pop("broken", None)
    statistic._FAMILIES.pop("broken", None)


def line(path: Path, where: str) -> int:
    return next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.endswith(f"# {where}"))


@pytest.mark.parametrize("where", ["options", "advice", "sites", "needs", "statistic", "run"])
def test_a_fault_names_pass_file_and_line(file: Path, where: str) -> None:
    data = {"x": np.ones((4, 3, 8), np.float32)}
    with pytest.raises(PassFault, match="pass 'breaks-down' failed at ") as e:
        PassManager([parse_pass(f"breaks-down: {{where: {where}}}")]).run(tiny.mlp(), data, data)
    assert f"{file}:{line(file, where)}: " in str(e.value)
    assert "\n" not in str(e.value)
    assert e.value.__cause__ is not None


@pytest.mark.parametrize("where", ["run", "companions", "planning"])
def test_the_command_line_says_whose_fault_it_is(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "model").mkdir()
    model = tiny.external(tiny.mlp(), tmp_path / "model")
    args = ["compress", str(model), "--pass", f"breaks-down: {{where: {where}}}", "--calibration", "random"]
    args += ["--no-measure", "--samples", "8", *(["--plan"] if where == "planning" else ["-o", str(tmp_path / "out")])]
    assert main(args) == 1
    quiet = capsys.readouterr().err
    assert f"pass 'breaks-down' failed at {file}:{line(file, where)}" in quiet
    assert "Traceback" not in quiet
    assert main([*args, "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_on_purpose_and_faults_of_the_engine_stay_what_they_are() -> None:
    with pytest.raises(DataError, match="no data"), blaming(Cleanup()):
        raise DataError("no data")
    with pytest.raises(ValueError, match="of the engine"), blaming(Cleanup()):
        raise ValueError("of the engine")


CONTRACT = """
from dataclasses import dataclass
from typing import ClassVar
from onnxcomp import Fidelity, Pass, Stage
{decorator}
class Odd(Pass):
    "Does nothing."
    {stage}
    fidelity: ClassVar = Fidelity.EXACT
    {body}
"""
FINE = {"decorator": "@dataclass(frozen=True)", "stage": "stage: ClassVar = Stage.WEIGHTS", "body": ""}
RUN = "def run(self, g, env): ..."


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": "", "body": RUN}, "has no `stage`"),
        ({"decorator": "", "body": RUN}, "is no dataclass"),
        ({"body": "def run(self, g): ..."}, "method 'run' that the engine cannot call"),
        ({"decorator": "raise SystemExit(3)\n", "body": RUN}, "cannot be imported: SystemExit: 3"),
    ],
)
def test_a_class_that_cannot_be_called_is_left_out_by_name(changes, says, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(CONTRACT.format(**FINE | changes))
    monkeypatch.setattr(catalog.passes, "__path__", [*catalog.passes.__path__, str(tmp_path)])
    try:
        with pytest.raises(PassFault, match=says):
            catalog.load("odd")
        listing = catalog.listing()
        assert "odd" not in listing.passes
        assert any(says in p for p in listing.problems)
    finally:
        sys.modules.pop("onnxcomp.passes.odd", None)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def sites(self, g, target): return ['name']", "sites must give values of Site, not 'name'"),
        ("def sites(self, g, target): return None", "sites must give values of Site, not NoneType"),
        (
            "def needs(self, g, target):\n        from onnxcomp.stats import mean\n        return [mean('nowhere')]",
            "nowhere",
        ),
    ],
)
def test_what_a_pass_returns_is_checked(body, says, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(CONTRACT.format(**FINE | {"body": f"{RUN}\n    {body}"}))
    monkeypatch.setattr(catalog.passes, "__path__", [*catalog.passes.__path__, str(tmp_path)])
    g = tiny.mlp()
    try:
        with pytest.raises(PassFault, match=says):
            PassManager([catalog.load("odd")()]).run(g, [tiny.feeds(g, 2, 3)])
    finally:
        sys.modules.pop("onnxcomp.passes.odd", None)
