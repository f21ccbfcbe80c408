"""What lies in a cache proves itself: changed, moved or foreign entries count as absent, with a note."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.engine.resume import StepCache
from onnxcomp.files import storage
from onnxcomp.files.seal import seal
from onnxcomp.graph import Graph
from onnxcomp.lowering.choices import Choice, Choices, Header
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.reports.outcome import Step
from onnxcomp.stats import Stats, absmax, disk_cache
from onnxcomp.validation.variants import Variants
from tests import tiny

PASSES = ["canonicalize", "qdq: {min_size: 1}", "lower"]


def run(source, tmp_path, name):
    g = tiny.encoder()
    batches = [tiny.feeds(g, 2, 9, seed=i) for i in range(5)]
    out = tmp_path / name
    report = oc.compress(
        source, out, passes=PASSES, calibration=batches, cache=tmp_path / "cache", measure=False
    ).report
    return [s.cached for s in report.steps], report.warnings, (out / "model.onnx").read_bytes()


def zeroed(path):
    g = Graph(storage.load(path).model)
    linear = next(n for n in g.nodes("MatMul") if g.is_constant(n.inputs[1]))
    g.put(linear.inputs[1], np.zeros_like(g.array(linear.inputs[1])))
    return g


def test_changed_steps_and_statistics_are_made_again_with_a_note(source, tmp_path):
    _, _, want = run(source, tmp_path, "first")
    steps = sorted((tmp_path / "cache" / "steps").iterdir())
    assert len(steps) == 3
    for here in steps:  # other weights, another record, or the files of another step
        record = json.loads((here / "step.json").read_text())
        if record["step"]["name"] == "canonicalize":
            storage.save(zeroed(here / "model.onnx"), here)
        elif record["step"]["name"] == "qdq":
            record["step"]["changed"] += 1
            (here / "step.json").write_text(json.dumps(record))
            moved = here
    stats = next((tmp_path / "cache").glob("*.npz"))
    with np.load(stats) as f:
        arrays = {k: f[k] * 2 if k == "s0" else f[k] for k in f.files}
    np.savez(stats, **arrays)
    cached, notes, got = run(source, tmp_path, "second")
    assert cached == [False, False, True]
    assert got == want
    fit = "the cached step '{}' does not fit and was computed again: its files are not those that were written"
    assert {fit.format("canonicalize"), fit.format("qdq")} <= set(notes)
    assert f"the cached statistics {stats.name} are not those that were written; collected again" in notes
    other = next(s for s in steps if s is not moved)
    shutil.rmtree(moved)
    shutil.copytree(other, moved)
    cached, notes, got = run(source, tmp_path, "third")
    assert cached == [True, False, True]
    assert got == want
    assert run(source, tmp_path, "fourth")[0] == [True] * 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1, "seal": 2}', '{"step": {}, "seal": "x"}', "\x00"])
def test_a_record_that_cannot_be_read_counts_as_absent(tmp_path, text):
    steps, g = StepCache(tmp_path, 1), tiny.linear()
    steps.save(g, Step("cleanup", "cleanup", "exact"))
    [entry] = (tmp_path / "steps").iterdir()
    assert steps.load(Cleanup(), g) is not None
    (entry / "step.json").write_text(text)
    assert steps.load(Cleanup(), g) is None
    assert len(steps.notes) == 1
    assert "was computed again" in steps.notes[0]


def test_a_step_of_another_interface_does_not_fit(tmp_path):
    steps, g = StepCache(tmp_path, 1), tiny.linear()
    steps.save(g, Step("cleanup", "cleanup", "exact"))
    other = tiny.linear()
    other.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    assert steps.load(Cleanup(), Graph(other.model)) is None
    assert "outputs changed" in steps.notes[0]


def test_statistics_prove_themselves(tmp_path):
    need, path, notes = absmax("x"), tmp_path / "a.npz", []
    disk_cache.write(path, [need], Stats({need: np.arange(3.0)}))
    assert disk_cache.read(path, [need], notes)[need].tolist() == [0, 1, 2]
    path.rename(tmp_path / "b.npz")
    assert disk_cache.read(path, [need], notes) is None
    assert notes == []
    assert disk_cache.read(tmp_path / "b.npz", [need], notes) is None
    assert notes == ["the cached statistics b.npz are not those that were written; collected again"]
    path.write_bytes(b"PK\x03\x04 not a zip")
    assert disk_cache.read(path, [need], notes) is None


def test_choices_prove_themselves(tmp_path):
    header = Header("cpu", "this", "runtime 1")
    made = Choices.cached(tmp_path, header)
    made.sites["a"] = Choice("linear", "MatMul", "Sum", "Add", "faster", "measured")
    made.numbers["n"] = 0.1
    made.save()
    again = Choices.cached(tmp_path, header)
    assert (again.sites, again.numbers, again.notes) == (made.sites, made.numbers, [])
    path = made.path
    path.write_text(path.read_text().replace('"form": "Sum"', '"form": "Add"'))
    assert Choices.cached(tmp_path, header).sites == {}
    assert Choices.cached(tmp_path, header).notes == [
        f"the cached choices {path.name} are not those that were written; made again"
    ]
    assert Choices.load(path, header).sites["a"].form == "Add"  # a file that a user names is the user's


def test_scores_of_variants_prove_themselves(tmp_path):
    folder, notes = tmp_path / "key" / "kl-8", []
    variants = Variants(None, None, 1 << 20, tmp_path, folder, notes)
    entry = folder / "abc"
    folder.mkdir(parents=True)
    assert variants._remembered(entry) is None
    number = (0.25).hex()
    entry.write_text(f"{number} {seal(['key', 'kl-8', 'abc', number])}")
    assert variants._remembered(entry) == 0.25
    entry.rename(folder / "abd")
    assert variants._remembered(folder / "abd") is None
    assert notes == ["cached scores of variants are not those that were written; measured again"]
