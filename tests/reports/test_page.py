"""report.html: every figure is that of the JSON, nothing from a model is markup, and what the page is made of."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import onnxcomp as oc
from onnxcomp.blocks.stored_parts import StoredPart
from onnxcomp.cli import app, main
from onnxcomp.data.datasets import Batch
from onnxcomp.engine import recipe
from onnxcomp.engine.job import Job
from onnxcomp.engine.repeat import command_of
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.graph import Covered, Declined, Noted
from onnxcomp.lowering.choices import Candidate, Choice
from onnxcomp.reports import json_report
from onnxcomp.reports.outcome import Culprit, LayerMap, Origin, Remedy, Report, Rung, Size, StreamError, Suspect
from onnxcomp.reports.page import files, numbers, plots
from onnxcomp.reports.page.render import page
from onnxcomp.validation.moved import Moved, Similarity
from tests import tiny
from tests.reports.page_reader import Element, Reader
from tests.reports.test_report import full, validation

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7*7 }} $\\frac & \x00\x1b\ud800 é" + "n" * 300
)
drawn = pytest.mark.skipif(not plots.available(), reason="pygal is not installed")


def rich(name: str = "layer/0") -> Report:
    """A report with all parts that a page shows, in which whatever a model or a user can name is called `name`."""
    r = full()
    r.origin = Origin(name, "5a", "4b", f"passes: []\n# {name}", "int8", "4e", f"1. try {name}", "cpu", 3)
    r.command, r.models = f"onnxcomp compress {name}", (f"/models/{name}/model.onnx",)
    parts = (StoredPart("embeddings", "float32", 3000), StoredPart("attention", "int8", 700))
    r.size = Size(
        4000, 3800, parts, (StoredPart("embeddings", "float32", 3000), StoredPart("attention", "float32", 900))
    )
    step = r.steps[0]
    step.covered = [
        Covered(name, "input", name, 8, -0.2, 24.75, -0.18, 23.25, 0.00001, 0.0908),
        Covered(name, "weight", name, 8, -0.5, 0.25, -0.5, 0.5, None, 0.0125),
    ]
    step.declined, step.noted = [Declined(name, f"too small: {name}")], [Noted(name, f"cut {name}")]
    candidates = (Candidate("plain", (1.5, 2.25)), Candidate("fused", (1.0, 1.5), 1.5, 1.4, 1.6, name))
    step.choices = [
        Choice(name, name, "fused", "plain", f"fastest, {name}", "measured", (name,), (name, "b"), candidates)
    ]
    losses = [Noted(f"{name} {i}", "4 bits", {"4 bits": 3.0 - i, "8 bits": 0.5}) for i in range(3)]
    entry = Noted("recipe", f"qdq: {{skip: ['{name}']}}")
    ranking = dataclasses.replace(
        step, name="sensitivity", spec="sensitivity", noted=[*losses, entry], choices=[], covered=[]
    )
    r.steps += [
        ranking,
        dataclasses.replace(step, name="lower", spec=f"lower: {{x: {name}}}", fidelity="exact", covered=[]),
    ]
    r.layers = (
        LayerMap(0, (4, 2), (4, 2), (8, 8), {"int8": 5, "float32": 1}, (StreamError("attention", name, 0.0125),)),
        LayerMap(1, (4, 0), (4, 0), (8, 0), {}, (StreamError("attention", name, None),)),
    )
    drift = next(iter(validation().outputs.values()))
    words = dataclasses.replace(
        drift, sqnr=30.5, kl=0.01, kl_p99=0.125, kl_max=1.75, agreement=0.95,
        moved=(Moved(3, 3, 1, 7), Moved(None, 0, 1, 2)), similarity=Similarity(4, 0.01, 0.07, 0.75),
    )  # fmt: skip
    r.validation = dataclasses.replace(
        validation(),
        outputs={numbers.clean(name): drift, "logits": words},
        data=name,
        notes=(name,),
    )
    r.warnings.append(name)
    r.stream_note = name
    r.remedy = Remedy("qdq", ((name, 0.7), ("b", 0.3)), 2, 3, 1, (name,), (f"sqnr>=30: {name}",), f"passes: [{name}]")
    value = {"layer": 0, "role": name, "original": name, "result": name, "value": name, "outputs": [name]}
    values = [{**value, "error": 0.5, "own": own, "outstanding": 7.5} for own in (0.25, 0.00001)]
    missing = [{"layer": None, "role": name, "node": name}]
    r.by_layer = {
        "samples": 4,
        "noise": 1e-4,
        "unrelated": False,
        "first": None,
        "culprits": values[:1],
        "worst": values[:1],
    }
    r.by_layer |= {"values": values, "missing": missing}
    r.culprit = Culprit("qdq", "qdq", (name,), (Suspect(name, name, 0.5, 7.5, (name,)),), name)
    r.rungs = [Rung(name, name, {"sqnr": 20.5}, 700, 1.5), Rung("b", "lower", {}, None, 0.5, f"refused: {name}")]
    return r


def drawings(found: Reader) -> list[Element]:
    """The pictures, without what is drawn in cells of a table for the eye alone."""
    return [e for e in found.all("svg") if e.parent is not None and e.parent.tag == "figure"]


def read(report: Report) -> tuple[dict[str, Any], Reader]:
    data = json.loads(json_report.text(report))
    return data, Reader(page(data))


@pytest.mark.parametrize("report", [Report(), full(), rich(), rich(HOSTILE)], ids=["empty", "full", "rich", "hostile"])
def test_every_figure_is_that_of_the_json(report: Report) -> None:
    data, found = read(report)
    figures = [e for e in found.all("data") if "data-at" in e.attributes]
    for e in figures:
        value = numbers.at(data, e.attributes["data-at"])
        assert e.attributes["value"] == numbers.exact(value)
        assert e.text == numbers.shown(value, e.attributes["data-as"])
    for e in found.all("data"):
        if where := e.attributes.get("data-count"):
            assert e.text == str(len(numbers.at(data, where)))
    assert len(figures) >= (1 if not report.steps else 30)


def test_every_figure_of_a_decision_is_on_the_page() -> None:
    data, found = read(rich())
    shown = {e.attributes.get("data-at") for e in found.all("data")}
    names = {f["name"] for f in data["figures"]}
    assert names == {"size", "latency", "memory", "accuracy", "sqnr", "kl", "agreement"}
    for i, f in enumerate(data["figures"]):
        for key in ("before", "after", "change"):
            assert f[key] is None or f"/figures/{i}/{key}" in shown
    assert {"/layers/0/heads/1", "/layers/0/weights/int8", "/validation/outputs/logits/kl_max"} <= shown
    assert {"/validation/outputs/logits/moved/0/samples", "/validation/outputs/logits/similarity/neighbours"} <= shown
    assert {"/steps/0/seconds", "/steps/0/changed", "/steps/0/nbytes/1", "/benchmark/noise/0/undisturbed"} <= shown


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (58_558_088, "bytes", "58.6 MB"),
        (0, "bytes", "0 MB"),
        (0.003512, "ms", "0.00351 ms"),
        (1234.4, "ms", "1,234 ms"),
        (1.926, "times", "1.93x"),
        (0.8206, "percent", "82.1%"),
        (-0.0123, "signed", "-1.23%"),
        (17.892, "dB", "17.9 dB"),
        (7.09e-5, "nats", "7.09e-05 nats"),
        (12_000, "count", "12,000"),
        (47.487, "number", "47.49"),
        (None, "dB", "-"),
    ],
)
def test_numbers_are_rounded_for_people(value: float | None, kind: str, says: str) -> None:
    assert numbers.shown(value, kind) == says


def test_pointers_find_names_with_slashes_and_tildes() -> None:
    data = {"a/b~1": [{"": 3}]}
    assert numbers.at(data, numbers.pointer("a/b~1", 0, "")) == 3


def test_nothing_that_a_model_names_is_markup() -> None:
    _, plain = read(rich())
    _, hostile = read(rich(HOSTILE))
    assert [e.tag for e in hostile.elements] == [e.tag for e in plain.elements]
    assert [set(e.attributes) for e in hostile.elements] == [set(e.attributes) for e in plain.elements]
    assert "{{ 7*7 }}" in hostile.elements[0].text
    assert "\ufffd" in hostile.elements[0].text
    assert not {"\x00", "\x1b", "\ud800"} & set(hostile.elements[0].text)


@pytest.mark.parametrize("report", [Report(), rich(), rich(HOSTILE)], ids=["empty", "rich", "hostile"])
def test_the_page_needs_nothing_else(report: Report) -> None:
    _, found = read(report)
    assert len(found.all("script")) == len(found.all("style")) == 1
    assert not found.all("link", "img", "iframe", "object", "embed", "form", "input", "image", "use", "foreignobject")
    linked = [
        v for e in found.elements for k, v in e.attributes.items() if k in ("href", "src", "xlink:href", "action")
    ]
    assert all(v.startswith("#") for v in linked)
    assert not [k for e in found.elements for k in e.attributes if k.startswith("on") or k == "style"]
    [policy] = [e.attributes["content"] for e in found.all("meta") if "http-equiv" in e.attributes]
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import", found.all("style")[0].text)


def test_what_screen_readers_need() -> None:
    _, found = read(rich())
    ids = [e.attributes["id"] for e in found.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert {e.attributes["href"][1:] for e in found.all("a")} <= set(ids)
    assert {e.attributes["aria-labelledby"] for e in found.elements if "aria-labelledby" in e.attributes} <= set(ids)
    assert all(e.attributes.get("aria-label") for e in [*drawings(found), *found.all("button", "pre", "nav")])
    assert all("scope" in e.attributes for e in found.all("th"))
    levels = [int(e.tag[1]) for e in found.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert found.elements[0].attributes["lang"] == "en"


@drawn
def test_pictures_are_svg_with_text_and_the_figures_of_the_json() -> None:
    data, found = read(rich())
    pictures = drawings(found)
    named = [e.attributes["id"] for e in found.all("figure") if e.attributes["id"].startswith("picture-")]
    assert len(pictures) == len(named) == len(set(named)) == 12
    assert {"picture-size", "picture-latency", "picture-layers-error", "picture-forms", "picture-forms-0-0"} < set(
        named
    )
    marked = [e for e in found.elements if "data-at" in e.attributes and e.tag == "rect"]
    assert len(marked) >= 12
    for e in marked:
        assert e.parent is not None
        [title] = [x for x in e.parent.children if x.tag == "title"]
        value = numbers.at(data, e.attributes["data-at"])
        assert any(title.text == numbers.shown(value, kind) for kind in numbers.KINDS)
    legends = [e.text for e in found.all("ul") if e.attributes.get("class") == "legend"]
    assert any("embeddings float32" in e and "attention int8" in e for e in legends)
    assert all(e.text.strip() for e in pictures)


@drawn
def test_sites_by_what_they_cost_come_with_the_entry_that_spares_them() -> None:
    _, found = read(rich("a"))
    [picture] = [e for e in found.all("figure") if e.attributes["id"] == "picture-losses"]
    assert "Sensitivity of sites, 4 bits" in picture.text
    assert "- qdq: {skip: ['a']}" in picture.text


def test_a_picture_without_figures_is_left_out() -> None:
    _, found = read(Report())
    assert not found.all("figure", "svg")
    r = full()
    r.benchmark = None
    _, found = read(r)
    assert not [e for e in found.all("figure") if e.attributes["id"] == "picture-latency"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "Refused"), ({"verdicts": []}, "Not judged"), ({"verdicts": [], "refused": ["integer check"]}, "Refused"),
        ({"kind": "bench"}, "Measured"),
    ],
)  # fmt: skip
def test_the_verdict_is_the_first_word(change: dict[str, Any], word: str) -> None:
    _, found = read(dataclasses.replace(full(), **change))
    assert found.all("strong")[0].text == word
    assert found.all("title")[0].text.startswith(f"{word}: ")


def test_a_slower_result_is_not_simply_accepted() -> None:
    from onnxcomp.validation.gates import Verdict
    from tests.reports.test_report import bench

    r = full()
    r.verdicts, r.benchmark = [Verdict("sqnr>=3", 20.0, True)], bench(0.8)
    _, found = read(r)
    assert "but is slower" in found.all("p")[1].text


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    source = storage.save(tiny.encoder(), folder / "source")
    batches = [Batch(tiny.feeds(storage.load(source), 4, 9, seed=i)) for i in range(4)]
    steps = ["cleanup", "qdq: {min_size: 1}", "lower"]
    passes = [recipe.parse_pass(x) for x in steps]
    oc.compress(source, folder / "out", passes=passes, calibration=batches, gates=["sqnr>=10"], measure=False)
    return folder / "out"


def test_a_job_writes_the_page_and_the_command_makes_it_again(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (result / "report.html").read_text("utf-8")
    (result / "report.html").unlink()
    assert main(["report", str(result)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (result / "report.html").read_text("utf-8") == written
    assert page(json.loads((result / "report.json").read_text())) == written
    assert len(written) < 600_000


def test_without_html_there_is_no_page_also_no_old_one(tmp_path: Path) -> None:
    source = storage.save(tiny.encoder(), tmp_path / "source")
    for html in (True, False):
        oc.optimize(source, tmp_path / "out", measure=False, html=html)
        assert (tmp_path / "out" / "report.html").exists() is html


def test_a_page_never_replaces_a_file_of_another_kind(result: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((result / "report.json").read_bytes())
    (tmp_path / "report.html").write_text("<p>mine</p>")
    assert main(["report", str(tmp_path)]) == 2
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"
    with pytest.raises(OnnxcompError, match="no page of a report"):
        oc.optimize(result, tmp_path / "out", measure=False, report=tmp_path / "report.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no JSON"), ("[]", "is no report"), ('{"schema_version": 1}', "is of report schema 1"),
        ('{"schema_version": 3, "kind": 3}', "kind: Input should be a valid string"), ("[" * 100_000, "is no JSON"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_report_is_one_error(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(OnnxcompError, match=says):
        files.read(tmp_path / "report.json")
    with pytest.raises(OnnxcompError, match=r"there is no report\.json"):
        files.reports_in(tmp_path / "other")


def test_a_page_that_fails_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> str:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr("onnxcomp.engine.report_file.page", broken)
    source = storage.save(tiny.encoder(), tmp_path / "source")
    oc.optimize(source, tmp_path / "out", measure=False)
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert [w for w in warnings if "report.html was not written: ZeroDivisionError: of a test" in w]


def test_validate_writes_a_report(result: Path, tmp_path: Path) -> None:
    command = ["validate", str(result), str(result), "--eval", "random", "--gate", "sqnr>=99", "--samples", "4", "-q"]
    assert main([*command, "--report", str(tmp_path / "v.json")]) == 0
    data = json.loads((tmp_path / "v.json").read_text())
    assert (data["kind"], data["refused"]) == ("validate", [])
    assert shlex.split(data["command"])[1:] == [*command[:-1], "--no-html"][: len(command) - 1]
    assert Reader((tmp_path / "v.html").read_text("utf-8")).all("strong")[0].text == "Accepted"
    assert main([*command, "--no-html", "--report", str(tmp_path / "w.json")]) == 0
    assert not (tmp_path / "w.html").exists()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    chosen = recipe.Recipe.preset("int8")
    chosen = dataclasses.replace(chosen, gates=(*chosen.gates, "sqnr[a b]>=3"))
    settings = Settings(
        calibration="my data.npz", samples=8, shapes=({"batch": 1, "sequence": 4},), measure=False, seed=3, threads=2
    )
    words = shlex.split(command_of(Job(tmp_path / "a model.onnx", chosen, settings)))
    assert words[:3] == ["onnxcomp", "compress", str(tmp_path / "a model.onnx")]
    assert words[words.index("--preset") + 1] == "int8"
    assert words[words.index("--gate") + 1] == "sqnr[a b]>=3"
    context = typer.main.get_command(app).commands["compress"].make_context("compress", words[2:])
    assert context.params["calibration"] == "my data.npz"
    assert (context.params["samples"], context.params["no_measure"], context.params["seed"]) == (8, True, 3)
    assert context.params["shape"] == ["batch=1,sequence=4"]


def test_a_recipe_that_is_no_preset_is_a_file(tmp_path: Path) -> None:
    own = recipe.Recipe(name="int8", passes=(recipe.parse_pass("cleanup"),))
    assert "--recipe recipe.yaml" in command_of(Job(tmp_path / "m.onnx", own))
