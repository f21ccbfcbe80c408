"""Repair on few rows: samples that no fit has read raise the damping, and it is said."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.sequential import _Moments
from onnxcomp.runtime.sessions import Session
from tests import tiny


def repaired(count: int, monkeypatch: pytest.MonkeyPatch, dampings: tuple[int, ...]) -> tuple[list[str], float]:
    """What is noted, and the squared error on other data, with that many calibration samples."""
    monkeypatch.setattr(sequential, "MORE_DAMPING", dampings)
    g, error = tiny.encoder(layers=2, norm="pre"), 0.0
    data = [Batch(tiny.feeds(g, 2, 3, seed=i)) for i in range(count // 2)]
    cut = parse_pass("prune-ffn: {ratio: 0.3, ranking: layer}")
    found = PassManager([cut]).run(g, as_dataset(data, g), data[:1])
    for i in range(4):
        feeds, outputs = tiny.feeds(g, 8, 9, seed=100 + i), []
        for m in (g, found.model):
            with Session(m) as s:
                outputs.append(next(iter(s.run(feeds).values())).astype(np.float64))
        error += float(np.square(outputs[0] - outputs[1]).sum())
    return [n.what for n in found.report.step("prune-ffn").noted], error


def test_few_rows_are_damped_more_where_unseen_samples_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said, error = repaired(24, monkeypatch, (1, 10, 100))
    plain, before = repaired(24, monkeypatch, (1,))
    assert any(s.startswith("damped 10") for s in said)
    assert not any(s.startswith("damped") for s in plain)
    assert error < before


def test_errors_from_moments_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    x, y, w, b = (rng.normal(size=s) for s in ((30, 5), (30, 4), (5, 4), 4))
    moments = _Moments(x.T @ x, x.T @ y, x.sum(axis=0), y.sum(axis=0), 30)
    for bias in (None, b):
        out = x @ w if bias is None else x @ w + bias
        assert moments.error(w, bias) + np.square(y).sum() == pytest.approx(np.square(out - y).sum())
