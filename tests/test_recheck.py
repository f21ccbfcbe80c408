"""`tools/recheck` agrees with a true report, and not with one whose figures or whose model were changed."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from tests import tiny

TOOL = Path(__file__).resolve().parent.parent / "tools" / "recheck"


@pytest.fixture(scope="module")
def recheck():
    loader = SourceFileLoader("recheck", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("recheck", loader))
    loader.exec_module(module)
    return module.recheck


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized encoder with hidden states, class scores and the best class, judged on padded data."""
    folder = tmp_path_factory.mktemp("recheck")
    g = tiny.encoder(classes=5)
    scores = g.outputs[0]
    best = g.op("ArgMax", scores, axis=1, keepdims=0)
    best.name, best.type, best.shape = "best", ir.TensorType(ir.DataType.INT64), ir.Shape(["batch"])
    hidden = list(g.nodes("LayerNormalization"))[-1].outputs[0]
    out = g.op("Identity", hidden)
    out.name, out.type, out.shape = "hidden", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 32])
    g.model.graph.outputs.extend([best, out])
    g.sort()
    storage.save(Graph(g.model), folder / "model")
    feeds = tiny.feeds(g, 20, 9, padding="left")
    np.savez(folder / "data.npz", **feeds)
    passes = ["canonicalize", "qdq: {min_size: 1}", "lower"]
    given = {"calibration": str(folder / "data.npz"), "evaluation": str(folder / "data.npz")}
    oc.compress(folder / "model", folder / "out", passes=passes, **given, measure=False)
    return folder


def test_a_true_report_agrees(recheck, made, capsys):
    assert recheck(made / "model", made / "out", made / "data.npz", 8) == []
    shown = capsys.readouterr().out
    assert "3 outputs: all figures agree" in shown
    assert "| best | exact_match |" in shown
    assert "pooled_sqnr" in shown


@pytest.mark.parametrize(("output", "name", "by"), [("hidden", "sqnr", 0.5), ("best", "exact_match", -0.1)])
def test_a_figure_that_was_changed_is_named(recheck, made, tmp_path, output, name, by):
    copy = tmp_path / "out"
    copy.mkdir()
    (copy / "model.onnx").write_bytes((made / "out" / "model.onnx").read_bytes())
    report = json.loads((made / "out" / "report.json").read_text())
    report["validation"]["outputs"][output][name] += by
    (copy / "report.json").write_text(json.dumps(report))
    assert f"{name} of '{output}'" in recheck(made / "model", copy, made / "data.npz", 8)


def test_another_model_does_not_agree(recheck, made, tmp_path):
    copy = tmp_path / "out"
    copy.mkdir()
    (copy / "model.onnx").write_bytes((made / "model" / "model.onnx").read_bytes())
    (copy / "report.json").write_text((made / "out" / "report.json").read_text())
    assert "equal is False" in recheck(made / "model", copy, made / "data.npz", 8)


def test_it_imports_nothing_of_onnxcomp():
    assert "import onnxcomp" not in TOOL.read_text()
    assert "from onnxcomp" not in TOOL.read_text()
