"""Laws of first runs: a model that crashes the runtime or does not end is one clear error, and costs one worker."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

import onnxcomp as oc
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.runtime import child, trial
from tests import tiny

CRASH = Path(__file__).parents[1] / "data" / "crashes-the-runtime.onnx.gz"


def endless() -> onnx.ModelProto:
    """A Loop of 2^62 rounds."""
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[n, 2] x) => (float[n, 2] y) <int64 rounds = {4611686018427387904}> {
            y = Loop (rounds, , x) <body = b (int64 i, bool go, float[n, 2] c) => (bool on, float[n, 2] d) {
                on = Identity (go)
                d = Add (c, c)
            }>
        }""")


@pytest.fixture
def bad(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    path = tmp_path / "bad.onnx"
    if request.param == "crash":
        path.write_bytes(gzip.decompress(CRASH.read_bytes()))
        return path, "bad.onnx: crashes the runtime"
    onnx.save(endless(), path)
    monkeypatch.setattr(child, "SECONDS", 0.5)
    return path, "bad.onnx: did not come to an end"


@pytest.mark.parametrize("bad", ["crash", "hang"], indirect=True)
def test_a_model_that_takes_its_process_down_is_refused(bad: tuple[Path, str], tmp_path: Path) -> None:
    """Whatever runs it first: a job, a comparison, a benchmark; and the next model gets another worker."""
    path, message = bad
    with pytest.raises(ModelError, match=message):
        oc.optimize(path, tmp_path / "out", measure=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx"]
    with pytest.raises(ModelError, match=message):
        oc.validate(path, path, "random")
    source = storage.save(tiny.linear(), tmp_path / "good")
    assert trial.run(storage.read(source), {"x": np.ones((1, 2, 8), np.float32)})


def test_one_worker_serves_every_run_and_each_file_is_proven_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = storage.read(tiny.external(tiny.linear(), tmp_path))
    feeds = {"x": np.ones((1, 2, 8), np.float32)}
    trial.prove(source, feeds)
    assert trial._worker is not None
    first = trial._worker[1].process.pid
    trial.run(source, feeds)
    assert trial._worker[1].process.pid == first
    monkeypatch.setattr(trial, "run", None)  # not called again
    trial.prove(source, feeds)
    os.kill(first, 9)
    monkeypatch.undo()
    trial._worker[1].process.wait()
    assert trial.run(source, feeds)  # one that was ended meanwhile is started again


def test_results_are_those_of_a_run_here(tmp_path: Path) -> None:
    """Of every element type that travels: strings and bfloat16 are not numpy's own in a file."""
    with np.errstate(all="ignore"):
        arrays: dict[str, Any] = {
            "text": np.array([["a", "bc"], ["", "d"]], object),
            "half": np.arange(4).astype(ml_dtypes.bfloat16),
            "flag": np.array(True),
            "names": np.zeros((0, 3), np.int64),
        }
    child.write_arrays(tmp_path / "a.npz", arrays | {"sequence": [np.zeros(2)]})
    back = child.read_arrays(tmp_path / "a.npz", {k: a.dtype for k, a in arrays.items()})
    assert {k: (a.dtype, a.shape, a.tolist()) for k, a in back.items()} == {
        k: (a.dtype, a.shape, a.tolist()) for k, a in arrays.items()
    }
    source = storage.read(tiny.external(tiny.linear(), tmp_path))
    with pytest.raises(DataError, match="has shape"):
        trial.run(source, {"x": np.ones((1, 2, 7), np.float32)})
