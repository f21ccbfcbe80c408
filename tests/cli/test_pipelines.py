"""What pipelines read: a JUnit case for each gate, a summary in Markdown, progress as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from onnxcomp.reports.junit import junit, summary
from onnxcomp.reports.outcome import Report
from onnxcomp.validation.gates import Verdict
from tests.cli.test_cli import Run, place, run

__all__ = ["place", "run"]  # fixtures

FEW = ("--pass", "canonicalize", "--pass", "quantize-weights: {bits: 8, min_size: 1, method: nearest, block: 16}")


def cases(path: Path) -> dict[str, str]:
    """The cases of a JUnit file: `failure`, `error`, or nothing."""
    root = Xml.parse(path).getroot()
    (suite,) = root
    found = {str(c.get("name")): "".join(x.tag for x in c) for c in suite}
    assert suite.get("tests") == str(len(found))
    for kind in ("failure", "error"):
        assert suite.get(f"{kind}s") == str(list(found.values()).count(kind))
    return found


def test_a_refused_job_tells_which_gate(run: Run, place: Path, tmp_path: Path) -> None:
    xml, md = tmp_path / "gates.xml", tmp_path / "page.md"
    gates = ("--gate", "size<=0.01x", "--gate", "cosine>=0.5")
    code, _, err = run(
        "compress", place / "model", "-o", tmp_path / "out", *FEW, "--eval", place / "data.npz", *gates,
        "--no-measure", "--junit", xml, "--summary", md, "--progress", "json", "-q",
    )  # fmt: skip
    assert code == 3
    assert cases(xml) == {"size<=0.01x": "failure", "cosine>=0.5": "", "compress": ""}
    assert "### onnxcomp compress: refused" in md.read_text()
    assert "| gate `size<=0.01x` |" in md.read_text()
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    steps = [e for e in events if e["event"] == "progress"]
    assert [(e["text"], e["done"], e["total"]) for e in steps] == [("canonicalize", 0, 2), ("quantize-weights", 1, 2)]
    assert all(e["seconds"] >= 0 for e in events)


def test_a_result_passes_and_summaries_add_up(run: Run, place: Path, tmp_path: Path) -> None:
    xml, md = tmp_path / "gates.xml", tmp_path / "page.md"
    md.write_text("# Mine\n")
    code, *_ = run("optimize", place / "linear", "-o", tmp_path / "out", "--no-measure", "--junit", xml, "-q")
    assert code == 0
    assert cases(xml) == {"optimize": ""}
    code, *_ = run(
        "validate", place / "linear", tmp_path / "out", "--eval", place / "floats.npz", "--gate", "sqnr>=20",
        "--gate", "size<=0.01x", "--junit", xml, "--summary", md, "-q",
    )  # fmt: skip
    assert code == 3
    assert cases(xml) == {"sqnr>=20": "", "size<=0.01x": "failure", "validate": ""}
    assert md.read_text().startswith("# Mine\n### onnxcomp validate: refused")


def test_bad_input_is_an_error_and_other_files_stay(run: Run, place: Path, tmp_path: Path) -> None:
    xml = tmp_path / "gates.xml"
    assert run("optimize", place / "text.onnx", "-o", tmp_path / "out", "--junit", xml)[0] == 2
    assert cases(xml) == {"optimize": "error"}
    xml.write_text("<html>mine</html>")
    code, _, err = run("optimize", place / "linear", "-o", tmp_path / "out", "--junit", xml)
    assert (code, xml.read_text()) == (2, "<html>mine</html>")
    assert "is no JUnit file, so it is not replaced" in err
    code, _, err = run("optimize", place / "linear", "-o", tmp_path / "out", "--summary", tmp_path / "no" / "x.md")
    assert code == 2
    assert "is no folder that can be written" in err
    assert run("optimize", place / "linear", "-o", tmp_path / "out", "--progress", "xml")[0] == 2
    assert not (tmp_path / "out").exists()


def test_what_no_xml_or_table_holds_is_written_otherwise() -> None:
    report = Report(verdicts=[Verdict("kl[a|b\x00]<=1", 2.0, passed=False)])
    (suite,) = Xml.fromstring(junit("compress", {"model": report}, "line\x1b\nmore"))
    assert suite[0].get("name") == "kl[a|b?]<=1"
    assert suite[1][0].get("message") == "line?"
    assert "| gate <code>kl&#91;a&#124;b" in summary("compress", {"model": report}, "line")


@pytest.mark.parametrize("trouble", ["", "broken"])
def test_every_suite_has_a_case(trouble: str) -> None:
    (suite,) = Xml.fromstring(junit("compress", {}, trouble))
    assert [len(suite), suite.get("errors")] == [1, "1" if trouble else "0"]
