"""Copies of token sequences with some tokens replaced: what changes, what does not, and when they are used."""

import numpy as np
import pytest

from onnxcomp.data.datasets import as_dataset
from onnxcomp.data.replaced_tokens import replaced, token_count
from onnxcomp.graph import Graph
from onnxcomp.methods.quantize.augmentation import COPIES, augmented
from tests import tiny


def texts(g: Graph, count: int, length: int = 12) -> list[dict[str, np.ndarray]]:
    return [tiny.feeds(g, 1, length, seed=i, padding="right") for i in range(count)]


def test_copies_differ_in_a_share_of_the_tokens_and_in_nothing_else():
    g = tiny.encoder(vocabulary=1000)
    data = as_dataset(texts(g, 40), g)
    more = replaced(data, g, 3, 0.3)
    assert len(more) == 4 * len(data)
    names = list(next(iter(data)).feeds)
    tokens = next(n for n in names if "ids" in n)
    mask = next(n for n in names if "mask" in n)
    whole, copies = ({n: np.concatenate([b.feeds[n] for b in d]) for n in names} for d in (data, more))
    n = len(data)
    for name in names:
        assert np.array_equal(copies[name][:n], whole[name])
        if name != tokens:
            assert np.array_equal(copies[name], np.concatenate([whole[name]] * 4))
    moved = copies[tokens].reshape(4, n, -1) != whole[tokens]
    real = whole[mask] > 0
    assert not moved[:, ~real].any()
    assert not moved[:, :, 0].any()
    assert not moved[:, np.arange(n), real.sum(axis=1) - 1].any()
    assert 0.15 < moved[1:, real].mean() < 0.35
    assert (copies[tokens] >= 0).all()
    assert copies[tokens].max() < 1000


def test_copies_do_not_depend_on_the_batch():
    g = tiny.encoder()
    data = as_dataset(texts(g, 6), g)
    a, b = (replaced(data.rebatch(size), g, 2, 0.3).fingerprint() for size in (2, 5))
    assert a == b


@pytest.mark.parametrize(
    ("count", "asked", "copied"), [(60, None, True), (60, False, False), (1500, None, False), (1500, True, True)]
)
def test_few_texts_are_copied_and_it_is_said(count, asked, copied):
    g = tiny.encoder()
    data = as_dataset(texts(g, count), g)
    found = augmented(data, g, asked, "quantize-weights")
    assert len(found) == (1 + COPIES if copied else 1) * count
    said = f"{token_count(data, g)} tokens of data are few: fitted on {COPIES} copies more with 30% of them replaced"
    assert [n.what for n in g.noted] == ([said] if copied else [])


def test_data_that_is_not_of_tokens_stays_as_it_is():
    g = tiny.linear()
    data = as_dataset(
        [{"x": np.ones((2, *[d if isinstance(d, int) else 3 for d in g.inputs[0].shape][1:]), np.float32)}], g
    )
    assert augmented(data, g, True, "quantize-weights") is data
