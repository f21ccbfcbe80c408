"""What is said when a gate refuses: the sites of this model that lose most, measured, and a recipe that works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp import blocks
from onnxcomp.cli import main
from onnxcomp.engine import remedy
from onnxcomp.engine.recipe import Recipe
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.qdq import Qdq
from onnxcomp.reports import json_report, tables
from onnxcomp.validation.gates import Gate, Verdict
from tests import tiny

PASSES = ["canonicalize", Qdq(min_size=1, clip="minmax", skip=("nothing*",)), "lower"]


def with_an_outlier() -> Graph:
    """An encoder in which one channel of the second layer's MLP is so large that a range over all loses the others."""
    g = tiny.encoder()
    up, down = blocks.mlps(g)[1].up, blocks.mlps(g)[1].down
    for linear, column, factor in ((up, np.s_[:, 0], 3000.0), (down, np.s_[0, :], 1 / 3000)):
        w = g.array(linear.weight).copy()
        w[column] *= factor
        linear.weight.const_value = ir.tensor(w)
    return g


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return storage.save(with_an_outlier(), tmp_path_factory.mktemp("remedy"))


def refused(model: Path, gate: str) -> oc.GateFailed:
    with pytest.raises(oc.GateFailed) as e:
        oc.compress(model, None, passes=PASSES, calibration="random", samples=20, gates=[gate], measure=False)
    return e.value


def test_the_worst_site_is_named_and_the_recipe_works(model: Path, tmp_path: Path) -> None:
    report = refused(model, "sqnr>=25").report
    found = report.remedy
    worst = blocks.mlps(storage.load(model))[1].down
    assert found.shares[0][0] == worst.name
    assert found.shares[0][1] > 0.5
    assert sum(share for _, share in found.shares) <= 1 + 1e-9
    assert found.measured == found.sites == report.step("qdq").eligible
    assert found.skip == (worst.name,)
    assert found.verdicts[0].startswith("sqnr>=25: measured")
    pasted = Recipe.from_yaml(found.recipe)
    assert pasted.passes[1] == Qdq(min_size=1, clip="minmax", skip=("nothing*", worst.name))
    assert pasted.gates == ("sqnr>=25",)
    result = oc.compress(model, tmp_path / "out", recipe=pasted, calibration="random", samples=20, measure=False)
    assert [d.site for d in result.report.step("qdq").declined] == [worst.name, "skip: nothing*"]
    assert json_report.to_json(report)["remedy"]["shares"][0]["site"] == worst.name


def test_where_leaving_half_alone_is_not_enough_that_is_said(model: Path) -> None:
    found = refused(model, "sqnr>=200").report.remedy
    assert (found.skip, found.recipe) == ((), "")
    assert len(found.shares) == remedy.SHOWN
    assert "is not enough: sqnr>=200" in tables.remedy(found)


def test_short_of_time_evenly_spread_sites_are_ranked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedy, "SECONDS", 1e-9)
    found = refused(model, "sqnr>=200").report.remedy
    assert found.measured == 2
    assert f"2 of {found.sites} sites" in tables.remedy(found)


def test_the_command_line_prints_the_recipe(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["compress", str(model), "-o", str(tmp_path / "out"), "--calibration", "random", "--samples", "20"]
    args += ["--pass", "canonicalize", "--pass", "qdq: {min_size: 1, clip: minmax}", "--no-measure"]
    assert main([*args, "--gate", "sqnr>=25"]) == 3
    said = capsys.readouterr().err
    assert "What loses most, the 12 sites of qdq measured one at a time" in said
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(said[said.index("\npasses:") :])
    args = ["compress", str(model), "-o", str(tmp_path / "out"), "--calibration", "random", "--samples", "20"]
    assert main([*args, "--recipe", str(pasted), "--no-measure"]) == 0


@pytest.mark.parametrize(
    ("enough", "tries", "count", "runs"), [(5, 8, 5, [1, 2, 4, 8, 6, 5]), (5, 5, 6, [1, 2, 4, 8, 6])]
)
def test_as_few_sites_as_possible_are_left_alone_within_a_budget_of_runs(
    enough: int, tries: int, count: int, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedy, "TRIES", tries)
    asked = list[int]()
    gate = Gate(["sqnr>=5"])

    def judged(n: int) -> tuple[Verdict, ...]:
        asked.append(n)
        return tuple(gate.judge({"sqnr": 5.0 + n - enough}))

    assert remedy._fewest(10, judged)[::2] == (count, True)
    assert asked == runs
    assert remedy._fewest(4, judged)[::2] == (4, False)


def test_sites_not_measured_rank_as_those_of_their_kind() -> None:
    found = remedy._expected(["l0.up", "l1.up", "l0.down", "l1.down", "head"], {"l0.up": 1.0, "l1.down": 5.0})
    assert found == {"l0.up": 1.0, "l1.up": 1.0, "l0.down": 5.0, "l1.down": 5.0, "head": 3.0}


def test_a_site_that_was_not_measured_is_not_called_one_of_those_listed() -> None:
    r = remedy.Remedy("qdq", (("l1.down", 1.0),), 1, 9, 1, ("l0.down",), ("sqnr>=5: passed",), "passes: []")
    assert "Leaving 1 as before, of which those not measured alone were ranked by their kind" in tables.remedy(r)
    listed = remedy.Remedy("qdq", (("l0.down", 1.0),), 9, 9, 1, ("l0.down",), ("sqnr>=5: passed",), "passes: []")
    assert "Leaving the first of them as it was lets" in tables.remedy(listed)
