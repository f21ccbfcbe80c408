"""Without data a result is compared on random inputs, so that what computes something else is never written."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.analysis.facts import Facts
from onnxcomp.engine import probe
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.probe import Probe, fitted
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.pipeline import PassFault, Stage
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.gates import Gate
from tests import tiny
from tests.engine.test_manager import Bend, Liar, data


def test_optimize_is_compared_on_random_inputs_and_says_so(source, tmp_path, monkeypatch):
    ran = []
    run = Reference._run
    monkeypatch.setattr(Reference, "_run", lambda self, model: ran.append(model) or run(self, model))
    report = oc.optimize(source, tmp_path / "out", measure=False).report
    assert report.validation.random
    assert report.validation.samples == 4
    assert report.step("canonicalize").drift["samples"] == 4
    assert "no data was given to judge on" in report.warnings
    assert [str(m) for m in ran] == [str(source / "model.onnx")]  # once, and as the runtime reads the file
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["validation"]["data"] == "random"
    assert written["data"]["evaluation"] == {"name": "random", "samples": 4}


def test_a_pass_that_changes_the_model_is_a_fault_without_data_too(source, tmp_path):
    with pytest.raises(PassFault, match="'liar' promised equal outputs but left"):
        oc.compress(source, tmp_path / "out", passes=[Liar()], measure=False)
    assert not (tmp_path / "out").exists()


def test_gates_still_need_data(source, tmp_path):
    with pytest.raises(DataError, match="gates need evaluation data"):
        oc.compress(source, tmp_path / "out", passes=[Bend()], gates=["sqnr>=1"], measure=False)


def test_a_lossy_pass_without_data_shows_its_drift(source, tmp_path):
    report = oc.compress(source, tmp_path / "out", passes=[Bend()], measure=False).report
    assert report.verdicts == []
    assert 0 < report.validation.values()["sqnr"] < 60


def test_inputs_of_the_original_are_fitted_to_a_result_that_was_cut():
    g = tiny.encoder()
    h = g.clone()
    feeds = next(iter(Probe(g, None))).feeds
    assert fitted(feeds, g, h).keys() == feeds.keys()
    h.inputs[1].shape = ir.Shape(["batch", 5])
    assert fitted(feeds, g, h)["attention_mask"].shape == (1, 5)


# ---- what a step leaves behind ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cutter(Bend):
    """Turns the output on its side."""

    name: ClassVar[str] = "cutter"
    stage: ClassVar[Stage] = Stage.WIDTH

    def run(self, g, env):
        super().run(g, env)
        g.replace(g.outputs[0], g.op("Transpose", g.outputs[0], perm=[0, 2, 1]))


def test_other_shapes_are_the_fault_of_the_pass_that_made_them():
    g = tiny.encoder()
    with pytest.raises(PassFault, match=r"'cutter' left a model that differs .* in the original"):
        PassManager([Cutter()]).run(g, (), data(g))


def test_a_pass_that_was_rolled_back_leaves_no_sizes_and_no_edits_in_the_report():
    g = tiny.encoder()
    step = PassManager([Bend()], gate=Gate(["sqnr>=60"]), on_fail="rollback").run(g, (), data(g)).report.steps[0]
    assert (step.edits, step.changed, step.declined, step.noted) == (0, 0, [], [])
    assert step.nodes[0] == step.nodes[1]
    assert step.nbytes[0] == step.nbytes[1]
    assert step.drift["values"]["sqnr"] < 60


# ---- declarations ----------------------------------------------------------------------------------------------------


def misdeclared() -> Graph:
    """A product, shaped by sizes that only the runtime knows, and an output that is declared as something else."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4, "width"]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="ocr"), ir_version=10))
    turned = g.op("NonZero", x)  # of a size that nobody infers
    back = g.op("Cast", g.op("Transpose", turned, perm=[1, 0]), to=1)
    sizes = g.op("Concat", g.op("Shape", back, end=1), np.array([3, 1], np.int64), axis=0)
    out = g.op("Reshape", g.op("MatMul", back, np.eye(3, dtype=np.float32)), sizes)
    out.name, out.type, out.shape = "ids", ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, "length"])
    g.model.graph.outputs.append(out)
    return Graph(g.model)


def test_a_declared_output_shape_is_checked_and_never_believed(tmp_path):
    g = misdeclared()
    assert Facts(g).shape(g.outputs[0]) != (1, "length")
    folder = tmp_path / "ocr"
    folder.mkdir()
    storage.save(g, folder)
    report = oc.optimize(folder, tmp_path / "out", measure=False).report
    assert report.validation.equal
    assert any(
        w.startswith("output 'ids' is declared as [1,length], but the original gives [") for w in report.warnings
    )


def test_an_output_that_is_an_input_has_the_inputs_type(tmp_path):
    import onnx

    g = tiny.encoder()
    path = storage.save(g, tmp_path)
    proto = onnx.load(path)
    proto.graph.output[0].name = "input_ids"
    onnx.save(proto, path)
    loaded = storage.load(path)
    assert loaded.outputs[0].dtype is ir.DataType.INT64
    assert oc.optimize(path, tmp_path / "out", measure=False).model.outputs[0].dtype is ir.DataType.INT64


def test_a_pass_manager_compares_on_random_inputs_of_its_own() -> None:
    result = PassManager([Canonicalize(), DynamicQuant(min_size=1)]).run(tiny.encoder())
    found = result.report.validation
    assert found is not None
    assert (found.random, found.equal) == (True, False)
    assert "no data was given to judge on" in result.report.warnings


def test_a_large_input_is_compared_in_one_batch(monkeypatch):
    g = tiny.encoder()
    assert [len(b.feeds["input_ids"]) for b in Probe(g, None)] == [1, 3]
    monkeypatch.setattr(probe, "LARGE", 0)
    assert [len(b.feeds["input_ids"]) for b in Probe(g, None)] == [1]
