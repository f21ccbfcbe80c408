"""Recipes with rungs: the first that meets the gates is the result; what each gave is told; work is shared."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp import blocks
from onnxcomp.cli import main
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe, parse_pass
from onnxcomp.errors import GateFailed, RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.reports import json_report
from onnxcomp.validation.compare import Reference
from tests import tiny
from tests.engine.test_remedy import with_an_outlier

NEAREST = {"method": "nearest", "min_size": 1, "block": 16}
RUNGS = {
    "small": [{"quantize-weights": {**NEAREST, "bits": 4}}],
    "larger": [{"quantize-weights": {**NEAREST, "bits": 8}}],
    "whole": [{"quantize-weights": {**NEAREST, "skip": ["*"]}}],
}


@pytest.fixture
def batches() -> list:
    g = tiny.encoder()
    return [tiny.feeds(g, 2, 9, seed=i, padding="right") for i in range(6)]


def ladder(**changes) -> Recipe:
    return Recipe(**{"passes": ["canonicalize", "cleanup"], "rungs": RUNGS, "name": "steps", **changes})


def climbed(source: Path, out: Path | None, batches: list, *gates: str, **options) -> oc.Result:
    return oc.compress(source, out, recipe=ladder(), calibration=batches, gates=gates, measure=False, **options)


@pytest.mark.parametrize(("gate", "tried"), [("sqnr>=35", 2), ("sqnr>=150", 3)])
def test_it_stops_at_the_first_rung_that_meets_the_gates(source, batches, tmp_path, gate, tried):
    result = climbed(source, tmp_path / "out", batches, gate)
    names = list(RUNGS)[:tried]
    rungs = result.report.rungs
    assert [r.name for r in rungs] == names
    assert [bool(r.refused) for r in rungs] == [True] * (tried - 1) + [False]
    assert all(v.passed for v in result.report.verdicts)
    assert all(r.seconds > 0 and r.nbytes and (not r.values or "sqnr" in r.values) for r in rungs)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["name"] for r in report["rungs"]] == names
    again = Recipe.from_yaml(report["recipe"]["text"])  # what the result was made by, without the ladder
    assert again == ladder(gates=(gate,)).steps[tried - 1]
    assert storage.load(tmp_path / "out").model.metadata_props["onnxcomp.recipe"] == again.hash()


def test_rungs_share_the_canonical_model_and_the_originals_answers(source, batches, tmp_path, monkeypatch):
    ran = Counter[str]()
    run = Reference._run
    monkeypatch.setattr(Reference, "_run", lambda self, model: ran.update(["original"]) or run(self, model))
    result = climbed(source, None, batches, "sqnr>=35")
    assert ran == {"original": 1}
    assert [s.cached for s in result.report.steps] == [True, True, False]


def test_what_a_refused_rung_wrote_is_gone(source, batches, tmp_path):
    result = oc.compress(
        source,
        tmp_path / "out",
        recipe=ladder(rungs={"large": RUNGS["whole"], "small": RUNGS["small"]}, allow_unchanged=True),
        calibration=batches,
        gates=["size<=0.8x"],
        measure=False,
    )
    assert [r.name for r in result.report.rungs] == ["large", "small"]
    assert "size<=0.8x" in result.report.rungs[0].refused
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["README.md", "config.json", "manifest.json", "model.onnx", "report.html", "report.json"]


def test_where_no_rung_meets_the_gates_the_nearest_is_named(source, batches, tmp_path):
    few = ladder(rungs={k: RUNGS[k] for k in ("larger", "small")})
    with pytest.raises(GateFailed, match="no rung met the gates; 'larger' came nearest") as e:
        oc.compress(
            source, tmp_path / "out", recipe=few, calibration=batches, gates=["sqnr>=90"], measure=False,
            report=tmp_path / "why.json",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "why.json").read_text())
    assert [r["name"] for r in report["rungs"]] == ["larger", "small"]
    assert all("sqnr>=90" in r["refused"] for r in report["rungs"])
    assert not report["verdicts"][0]["passed"]
    assert e.value.report.validation.values()["sqnr"] == report["rungs"][0]["values"]["sqnr"]


def test_a_pass_that_refuses_its_budget_is_a_refused_rung(source, batches, tmp_path):
    budget = {"mixed-precision": {"budget": "rel-l2<=1e-9", "min_size": 1, "method": "nearest", "blocks": [16]}}
    result = oc.compress(
        source, None, recipe=ladder(rungs={"drift": [budget], "larger": RUNGS["larger"]}), calibration=batches,
        gates=["sqnr>=30"], measure=False,
    )  # fmt: skip
    first, second = result.report.rungs
    assert "best that these options reach" in first.refused
    assert first.nbytes is None
    assert not second.refused


def test_a_cache_resumes_every_rung(source, batches, tmp_path):
    for cached in (False, True):
        result = climbed(source, None, batches, "sqnr>=35", cache=tmp_path / "cache")
        assert result.report.steps[-1].cached is cached


def test_a_plan_is_of_the_first_rung_and_says_so(source):
    result = oc.compress(source, None, recipe=ladder(), plan=True)
    assert result.report.plan.nbytes[1] < 0.6 * result.report.plan.nbytes[0]
    assert any("rung 'small'; where gates refuse it: larger, whole" in w for w in result.report.warnings)


def test_what_is_wrong_with_a_later_rung_is_said_at_once(source, batches):
    wrong = ladder(rungs={"small": RUNGS["small"], "wrong": ["lower", "canonicalize"]})
    with pytest.raises(RecipeError, match="canonicalize"):
        oc.compress(source, None, recipe=wrong, calibration=batches, gates=["sqnr>=1"], measure=False)


def test_recipes_with_rungs_are_files_like_others():
    r = ladder(gates=("sqnr>=3",))
    assert Recipe.from_yaml(r.to_yaml()) == r
    assert r.hash() != ladder(rungs={}, gates=("sqnr>=3",)).hash()
    for text, says in (
        ("{passes: [lower], rungs: [qdq]}", "must map names"),
        ("{passes: [lower], rungs: {'a/b': [qdq]}}", "a rung is called"),
        ("{passes: [lower], rungs: {a: []}}", "at least one pass"),
        ("{passes: [lower], rungs: {a: [nope]}}", "nope"),
    ):
        with pytest.raises(RecipeError, match=says):
            Recipe.from_yaml(text)


def with_outliers(g: Graph, by: float) -> Graph:
    """A few channels of the norms are far larger, and smaller in the weights that read them: the same function."""
    for x in blocks.layers(g):
        mlp = [y for y in (x.mlp.up, x.mlp.gate) if y is not None]
        for norm, readers in zip(x.norms, ((x.attention.q, x.attention.k, x.attention.v), mlp), strict=True):
            factor = np.ones(64, np.float32)
            factor[[3, 17, 40]] = by
            for v in norm.node.inputs[1:]:
                g.put(v, g.array(v) * factor)
            for linear in readers:
                g.put(linear.weight, g.array(linear.weight) / factor[:, None])
    return g


@pytest.mark.parametrize("kind", [tiny.encoder, tiny.decoder])
def test_auto_int8_finds_the_smoothed_rung_on_planted_outliers_by_itself(kind, tmp_path):
    g = kind(layers=1, hidden=64, ffn=128, norm="pre")
    data = [tiny.feeds(g, 4, 9, seed=i) for i in range(8)]
    clean = (
        PassManager([parse_pass("canonicalize"), parse_pass("qdq")])
        .run(g, data, data)
        .report.validation.values()["sqnr"]
    )
    path = storage.save(with_outliers(g, 128), tmp_path / "model")
    gates = [f"sqnr>={clean - 2:.2f}", "exact-match>=0?", "perplexity-rise<=9?"]
    result = oc.compress(path, tmp_path / "out", preset="auto-int8", calibration=data, gates=gates, measure=False)
    assert [r.name for r in result.report.rungs] == ["plain", "smoothed"]
    assert result.report.rungs[0].values["sqnr"] < 20


def test_behind_the_last_rung_the_sites_that_lose_most_are_spared_where_that_is_enough(tmp_path):
    path = storage.save(with_an_outlier(), tmp_path / "model")
    last = ladder(rungs={"last": ["qdq: {min_size: 1, clip: minmax}", "correct", "lower"]})
    result = oc.compress(
        path, tmp_path / "out", recipe=last, calibration="random", samples=20, gates=["sqnr>=25"], measure=False
    )
    assert [r.name for r in result.report.rungs] == ["last", "last, sparing"]
    spared = [d.site for d in result.report.step("qdq").declined]
    assert blocks.mlps(storage.load(path))[1].down.name in spared
    assert all(v.passed for v in result.report.verdicts)


def test_the_command_line_tells_what_each_rung_gave(source, batches, tmp_path, capsys):
    file, data = tmp_path / "steps.yaml", tmp_path / "data.npz"
    file.write_text(ladder(rungs={k: RUNGS[k] for k in ("larger", "small")}).to_yaml())
    names = batches[0].keys()
    np.savez(data, **{k: np.concatenate([b[k] for b in batches]) for k in names})
    given = ["compress", str(source), "--recipe", str(file), "--calibration", str(data), "--no-measure"]
    assert main([*given, "-o", str(tmp_path / "out"), "--gate", "sqnr>=90"]) == 3
    shown = capsys.readouterr().err
    assert "no rung met the gates; 'larger' came nearest" in shown
    assert "Rungs" in shown


def test_the_schema_of_reports_knows_rungs():
    assert "rungs" in json_report.schema()["required"]
