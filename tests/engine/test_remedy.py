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
