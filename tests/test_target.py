"""Targets as data: built in, or a user's YAML."""

import dataclasses

import pytest

from onnxcomp import target
from onnxcomp.errors import TargetError
from onnxcomp.target import CPU, CPU_AVX2, TARGETS, find, resolved


@pytest.mark.parametrize("name", TARGETS)
def test_built_in_targets_are_whole(name):
    t = TARGETS[name]
    assert t.name == name
    assert t.provider.endswith("ExecutionProvider")
    assert t.description
    assert set(t.quantized.activations) <= {"u8", "s8"}


def test_a_users_target_is_a_built_in_one_with_changes(tmp_path):
    path = tmp_path / "edge.yaml"
    path.write_text("like: cpu\nname: edge\nwidth_multiple: 16\nhere: false\nquantized: {reduce_range: true}\n")
    t = find(str(path))
    assert (t.name, t.providers, t.width_multiple, t.here) == ("edge", CPU.providers, 16, False)
    assert t.quantized.saturates  # reduce_range is its older name
    path.write_text("like: cpu-avx2\nname: edge\nquantized: {saturates: false}\n")
    assert not find(str(path)).quantized.saturates
    assert t.quantized.weights == ("s8",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: gpu\nname: x", "like: gpu"),
        ("like: cpu\ncolour: red", "unknown field 'colour'"),
        ("like: cpu\nwidth_multiple: many", "width_multiple"),
        ("like: cpu\nquantized: {bits: 4}", "unknown field 'bits' of 'quantized'"),
        ("name: [1", "cannot read"),
        ("- cpu", "mapping"),
    ],
)
def test_a_wrong_target_file_is_one_message(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(TargetError, match=message):
        find(str(path))


def test_an_unknown_target_lists_the_known():
    with pytest.raises(TargetError, match="tensorrt"):
        find("tpu")


def test_a_machine_without_vnni_saturates(monkeypatch):
    assert find("cpu") is CPU
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset({"avx2"}))
    found = resolved(CPU)
    assert (found.quantized.saturates, found.gflops) == (True, CPU_AVX2.gflops)
    assert resolved(found) == found
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset({"avx2", "vnni"}))
    assert resolved(CPU) is CPU


def test_weights_of_a_target_that_saturates_obey_the_pair_rule():
    import numpy as np

    from onnxcomp.engine.manager import PassManager
    from onnxcomp.maths.saturation import pair_sums
    from onnxcomp.passes.qdq import Qdq
    from tests import tiny

    g = tiny.linear(64, 64)
    aim = dataclasses.replace(CPU, quantized=dataclasses.replace(CPU.quantized, saturates=True))
    done = PassManager([Qdq()], target=aim).run(g, [tiny.feeds(g, seed=i) for i in range(5)]).model
    [codes] = [v for v in done.model.graph.initializers.values() if v.name.endswith("_int8")]
    assert pair_sums(np.asarray(done.array(codes))).max() in (126, 127, 128)
    assert np.abs(np.asarray(done.array(codes)).astype(int)).max() > 64
