"""Changes of classes and of similarity, and the tail of the divergence, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.validation.drift import DriftSums
from onnxcomp.validation.moved import Moved
from onnxcomp.validation.rows import OutputRows, row_kl


def rows(y: np.ndarray, x: np.ndarray, labels: np.ndarray | None = None, per_token: bool = False) -> OutputRows:
    sample = np.arange(len(y))
    return OutputRows(y, x, sample, np.zeros_like(sample), len(y), per_token=per_token, labels=labels)


def test_classes_that_changed_are_counted_by_label() -> None:
    x, y = np.eye(4)[[0, 1, 2, 1, 3]], np.eye(4)[[0, 2, 2, 2, 0]]
    sums = DriftSums(logits=True)
    sums.update(rows(y[:3], x[:3], np.array([0, 1, 2])))
    sums.update(rows(y[3:], x[3:], np.array([1, 0])))
    d = sums.result()
    assert d.moved == (Moved(1, 1, 2, 2), Moved(0, 3, 0, 1))
    assert d.agreement == pytest.approx(2 / 5)
    assert d.similarity is None


def test_words_are_no_classes() -> None:
    x, y = np.eye(4)[[0, 1]], np.eye(4)[[1, 0]]
    sums = DriftSums(logits=True)
    sums.update(rows(y, x, per_token=True))
    assert sums.result().moved == ()


def test_the_tail_of_the_divergence() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5))
    y = x + 0.1 * rng.standard_normal(x.shape)
    sums = DriftSums(logits=True)
    for part in np.split(np.arange(200), 4):
        sums.update(rows(y[part], x[part]))
    d, kls = sums.result(), row_kl(x, y)
    assert (d.kl, d.kl_max) == (pytest.approx(kls.mean()), pytest.approx(kls.max()))
    assert d.kl_p99 == pytest.approx(np.quantile(kls, 0.99))


def test_similarity_of_samples() -> None:
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    y = x.copy()
    y[1] = [0.1, 0.8]  # the neighbour of the first becomes one of the last two
    sums = DriftSums(logits=False)
    sums.update(rows(y, x))
    alike = sums.result().similarity
    assert alike is not None
    assert alike.samples == 4
    assert alike.neighbours < 1
    assert alike.max_change == pytest.approx(max(abs(_cosine(x[i], x[1]) - _cosine(y[i], y[1])) for i in (0, 2, 3)))
    same = DriftSums(logits=False)
    same.update(rows(x, x))
    equal = same.result().similarity
    assert equal is not None
    assert (equal.neighbours, equal.mean_change, equal.max_change) == (1, 0, 0)


def test_pooled_rows_are_compared_by_their_means() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4))
    sample = np.array([0, 0, 1, 1, 2, 2])
    batch = OutputRows(x + 0.01, x, sample, np.array([0, 1] * 3), 3, per_token=True)
    sums = DriftSums(logits=False, pooled=True)
    sums.update(batch)
    alike = sums.result().similarity
    assert alike is not None
    assert alike.samples == 3


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
