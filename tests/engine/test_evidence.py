"""The card and the manifest of a result, and `verify`, which finds whatever is not as it was written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import onnxcomp as oc
from onnxcomp import cli
from onnxcomp.blocks.stored_parts import StoredPart
from onnxcomp.engine.compress import compress_each
from onnxcomp.errors import ModelError
from onnxcomp.files.stored import file_hash
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.reports import manifest
from onnxcomp.reports.card import card
from onnxcomp.reports.outcome import Size
from tests import tiny
from tests.engine.test_job import listing

FEW = ["canonicalize", "quantize-weights: {bits: 8, min_size: 1, method: nearest, block: 16}"]
FRONT = "license: mit\nbase_model: org/thing\nbase_model_relation: quantized\nlanguage: [en]\ntags: [bert, onnx]\n"


def parts(card: str) -> tuple[dict, str]:
    """The front matter of a card, and its text."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def data() -> list:
    g = tiny.encoder()
    return [tiny.feeds(g, 2, 9, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder; tests copy what they change."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "model").mkdir()
    tiny.external(tiny.encoder(spelled="dynamo"), folder / "model")
    (folder / "model" / "config.json").write_text('{"vocab_size": 50, "_name_or_path": "org/other"}')
    (folder / "model" / "README.md").write_text(f"---\n{FRONT}---\n# The original\n\n| says | 1 |\n")
    oc.compress(folder / "model", folder / "out", passes=FEW, evaluation=data(), gates=["sqnr>=10"], measure=False)
    return folder


def test_the_card_says_what_was_made_checked_and_lost(made: Path) -> None:
    front, text = parts((made / "out" / "README.md").read_text())
    assert (front["base_model"], front["base_model_relation"]) == ("org/thing", "quantized")
    assert (front["license"], front["language"], front["library_name"]) == ("mit", ["en"], "onnx")
    assert front["tags"] == ["bert", "onnx", "onnxruntime", "onnxcomp", "8-bit", "int8"]
    report = json.loads((made / "out" / "report.json").read_text())
    sites = f"| {report['steps'][1]['changed']} / {report['steps'][1]['eligible']} |"
    for said in (report["summary"], report["recipe"]["text"].strip(), "gate `sqnr>=10`", sites, "6 held-out samples"):
        assert said in text.replace("0\\.", "0.")  # text that begins with a number and a full stop is escaped
    assert f"| sqnr | {report['validation']['values']['sqnr']:.4g} |" in text
    assert text.endswith("# The original\n\n| says | 1 |\n"), "what the source's card said is there"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"export.json": {"source": "org/tuned"}}, ("org/tuned", "quantized")),
        ({"export.json": {"source": "./org/folder"}, "config.json": {"_name_or_path": "org/base"}}, ("org/base", None)),
        ({}, (None, None)),
    ],
)
def test_a_quantized_form_of_a_base_model_is_one_surely(files: dict, want: tuple, tmp_path: Path) -> None:
    """What a checkpoint was trained from is no name of the checkpoint itself."""
    for name, entries in files.items():
        (tmp_path / name).write_text(json.dumps(entries))
    result = oc.PassManager([Canonicalize()], allow_unchanged=True).run(tiny.linear(8, 8))
    result.report.size = Size(256, 64, (StoredPart("linears", "int8", 64),))
    front, _ = parts(card({"model.onnx": result}, tmp_path, tmp_path, quantized=True))
    assert (front.get("base_model"), front.get("base_model_relation")) == want


def test_the_cards_lines_run(made: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (made / "out" / "README.md").read_text(), re.M | re.S)
    assert len(code.splitlines()) == 5
    done = subprocess.run(
        [sys.executable, "-c", code + "print(outputs[0].shape)"],
        cwd=made / "out",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(1, 8, " in done.stdout


def test_the_manifest_has_the_hash_of_every_file_and_of_the_source(made: Path) -> None:
    raw = json.loads((made / "out" / "manifest.json").read_text())
    names = {p.name for p in (made / "out").iterdir()}
    assert names == {"model.onnx", "report.json", "report.html", "config.json", "README.md", "manifest.json"}
    assert raw["files"].keys() == names - {"manifest.json"}
    assert all(x["sha256"] == file_hash(made / "out" / k) for k, x in raw["files"].items())
    source = raw["models"]["model.onnx"]["source"]
    assert source.keys() == {"model.onnx", "model.onnx.data"}
    assert all(x == file_hash(made / "model" / k) for k, x in source.items())


def test_card_and_manifest_have_the_same_bytes_again(made: Path, tmp_path: Path) -> None:
    oc.compress(made / "model", tmp_path / "out", passes=FEW, evaluation=data(), gates=["sqnr>=10"], measure=False)
    a, b = listing(made / "out"), listing(tmp_path / "out")
    assert a["model.onnx"] == b["model.onnx"]
    assert a["README.md"] == b["README.md"]
    first, again = (json.loads(x["manifest.json"]) for x in (a, b))
    assert first["models"] == again["models"]
    assert {k for k in first["files"] if first["files"][k] != again["files"][k]} <= {"report.json", "report.html"}, (
        "they have seconds"
    )


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for p in (made / "out").iterdir():
        (folder / p.name).write_bytes(p.read_bytes())
    return folder


def test_verify_finds_any_changed_byte_and_a_missing_file(copy: Path) -> None:
    assert oc.verify(copy).problems == ()
    rng = np.random.default_rng(0)
    for p in sorted(copy.iterdir()):
        right = p.read_bytes()
        for at in (0, len(right) - 1, int(rng.integers(len(right)))):
            p.write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
            (problem,) = oc.verify(copy).problems
            assert p.name in problem
        p.write_bytes(right + b" ")
        assert len(oc.verify(copy).problems) == 1
        p.unlink()
        (problem,) = oc.verify(copy).problems
        assert f"{p.name} is missing" in problem
        p.write_bytes(right)
    (copy / "mine.txt").write_text("not of the result")
    assert oc.verify(copy).ok
    assert oc.verify(copy).unlisted == ("mine.txt",)


def test_verify_runs_the_model(copy: Path) -> None:
    """A manifest that fits a broken model: the runtime decides."""
    (copy / "model.onnx").write_bytes(b"\x08\x0a")
    known = manifest.read(copy)
    assert known is not None
    known.files["model.onnx"] = manifest.Entry.of(copy / "model.onnx")
    (copy / "manifest.json").write_text(known.text())
    (problem,) = oc.verify(copy).problems
    assert "model.onnx does not load" in problem


def test_verify_believes_no_name_outside_the_folder(copy: Path) -> None:
    known = manifest.read(copy)
    assert known is not None
    known.files["../secret"] = known.files["model.onnx"]
    (copy / "manifest.json").write_text(known.text())
    assert "names a file outside the folder" in oc.verify(copy).problems[0]


def test_verify_from_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(copy)]) == 0
    assert "5 files are as they were written" in capsys.readouterr().out
    (copy / "config.json").unlink()
    assert cli.main(["verify", str(copy), "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == ["config.json is missing"]
    assert captured.err == "refused: config.json is missing\n"
    assert cli.main(["verify", str(copy / "nowhere")]) == 2


def test_a_page_that_is_made_again_is_taken_down(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = copy / "report.html"
    page.write_text(page.read_text() + "<!-- of an older version -->\n")
    assert not oc.verify(copy).ok
    assert cli.main(["report", str(copy)]) == 0
    assert "of an older version" not in page.read_text()
    assert oc.verify(copy).ok


def test_a_users_card_stays_and_ours_is_replaced(made: Path, copy: Path) -> None:
    assert not any("README.md" in w for w in oc.optimize(made / "model", copy, measure=False).report.warnings)
    card = (copy / "README.md").read_text()
    assert "recipe `optimize`" in card
    (copy / "README.md").write_text(card + "\nWhat I found.\n")
    result = oc.optimize(made / "model", copy, measure=False)
    assert (copy / "README.md").read_text() == card + "\nWhat I found.\n"
    assert any("README.md is not as onnxcomp wrote it, so it stays" in w for w in result.report.warnings)
    assert oc.verify(copy).ok
    assert oc.verify(copy).unlisted == ("README.md",)


def test_a_manifest_of_somebody_else_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ModelError, match=r"manifest\.json: .* move it away, or choose another folder"):
        oc.optimize(source, tmp_path / "out", measure=False)
    assert listing(tmp_path / "out") == {"manifest.json": b'{"name": "an app"}'}


def test_results_that_share_a_folder_share_its_manifest(source: Path, tmp_path: Path) -> None:
    tiny.external(tiny.decoder(), source, "decoder.onnx")
    out = tmp_path / "out"
    compress_each(source, out, preset="optimize", measure=False)
    assert oc.verify(out).models == ("decoder.onnx", "model.onnx")
    oc.optimize(source, out, graph="decoder", measure=False)
    oc.optimize(source / "model.onnx", out / "more.onnx", measure=False)
    found = oc.verify(out)
    assert (found.problems, found.unlisted) == ((), ())
    assert found.models == ("decoder.onnx", "model.onnx", "more.onnx")
