"""The commands about two models, and the refusal that names whom to blame."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from onnxcomp.files import storage
from onnxcomp.reports import json_report
from tests.cli.test_cli import Run, place, run

__all__ = ["place", "run"]  # fixtures


def test_validate_by_layer_says_where_and_writes_node_data(run: Run, place: Path, tmp_path: Path) -> None:
    out, nodes = tmp_path / "out", tmp_path / "nodes.json"
    g = storage.load(place / "linear")
    node = next(g.nodes("MatMul"))
    g.put(node.inputs[1], g.array(node.inputs[1]) * 2)
    storage.save(g, out)
    both = ("validate", place / "linear", out, "--eval", place / "floats.npz")
    code, text, _ = run(*both, "--by-layer")
    assert code == 0
    assert "the first that differs: outside of layers" in text
    assert "Largest errors of their own" in text
    code, text, _ = run(*both, "--by-layer", "--node-data", nodes, "--json")
    assert code == 0
    found = json.loads(text)["by_layer"]
    assert found["first"]["own"] == found["worst"][0]["own"] > 0.5
    (graph,) = json.loads(nodes.read_text()).values()
    assert graph["results"][found["first"]["result"]]["value"] == found["first"]["own"]
    assert [x["stop"] for x in graph["gradient"]] == [0, 1]
    assert graph["results"].keys() <= {str(n.name) for n in storage.load(out).nodes()}
    assert run(*both, "--node-data", nodes, "-q")[0] == 0, "node data is replaced"
    nodes.write_text("{}")
    code, _, err = run(*both, "--node-data", nodes)
    assert (code, nodes.read_text()) == (2, "{}")
    assert "is no node data" in err


def test_a_refusal_names_the_pass_and_its_sites(run: Run, place: Path, tmp_path: Path) -> None:
    passes = ("--pass", "canonicalize", "--pass", "prune-ffn: {ratio: 0.5, score: magnitude, repair: none}")
    gates = ("--gate", "sqnr>=90", "--bisect", "--report", tmp_path / "why.json", "--no-measure")
    data = ("--eval", "random", "--samples", 4, "--sequence", 8)
    code, _, err = run("compress", place / "decoder", "-o", tmp_path / "out", *passes, *data, *gates)
    assert code == 3
    assert "The gates began to fail behind pass 'prune-ffn: " in err
    report = json.loads((tmp_path / "why.json").read_text())
    jsonschema.validate(report, json_report.schema())
    culprit = report["culprit"]
    assert culprit["name"] == "prune-ffn"
    assert "MLP down" in culprit["suspects"][0]["place"]
    assert culprit["suspects"][0]["outputs"] == ["logits"]
