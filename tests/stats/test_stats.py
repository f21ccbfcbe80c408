"""Statistics as values, and the law of the accumulators: any split, merged in any order, gives the same result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp import stats
from onnxcomp.engine import catalog
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.stats import Stat, Statistic, Stats, histogram
from onnxcomp.stats.kinds.grams import BUFFER
from onnxcomp.stats.row_keys import row_keys
from onnxcomp.stats.rows import Samples, mask_name, rows, token_axis
from onnxcomp.stats.statistic import family, kinds, statistic
from tests import tiny

for name in catalog.names():  # a pass may bring a statistic of its own
    catalog.load(name)
STATS = [stat for kind in kinds().values() for stat in kind.examples()]
FLOATS = [stat for stat in STATS if not statistic(stat).integers]
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 6)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


def second(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1, axis=1) * np.float32(0.5) + 1


def values(stat: Stat, x: np.ndarray) -> np.ndarray:
    """Values that the statistic can be of."""
    return np.abs(x).astype(np.int64) % stat.n if statistic(stat).integers else x


def empty(stat: Stat) -> Any:
    return statistic(stat).accumulator(family(stat))


def finish(stat: Stat, acc: Any) -> np.ndarray:
    return statistic(stat).finish(stat, acc.result())


def feed(acc: Any, stat: Stat, x: np.ndarray) -> Any:
    if statistic(stat).draws:
        acc.update(np.hstack([x, second(x)]) if statistic(stat).pairs else x, row_keys(x))
    else:
        acc.update(values(stat, x), second(x) if statistic(stat).pairs else None)
    return acc


def direct(stat: Stat, x32: np.ndarray) -> np.ndarray:
    """The definition, in float64 over all rows at once."""
    x, y = x32.astype(np.float64), second(x32).astype(np.float64)
    axis = 0 if stat.per == "channel" else None
    match stat.kind:
        case "absmax":
            return np.abs(x).max(axis=axis)
        case "minmax":
            return np.stack([x.min(axis=axis), x.max(axis=axis)])
        case "mean":
            return x.mean(axis=axis)
        case "var":
            return x.var(axis=axis)
        case "norm2":
            return np.sqrt((x**2).sum(axis=axis))
        case "gram":
            return x.T @ x
        case "cross_gram":
            return x.T @ y
        case "histogram":
            return np.bincount((x32.reshape(-1).view(np.uint32) >> 16).astype(np.int64), minlength=65536)
        case "shift":
            exponents = np.frexp((y**2).mean(axis=1))[1]
            median = np.sort(exponents)[(len(x) - 1) // 2]
            by = 2.0 ** -np.maximum(exponents - median, 0)
            return (by[:, None] * (y - x)).sum(axis=0) / by.sum()
        case "cosine":
            norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
            both = (np.abs(x).max(axis=1) == 0) & (np.abs(y).max(axis=1) == 0)
            return np.where(both, 1.0, (x * y).sum(axis=1) / np.where(norms > 0, norms, 1)).mean()
        case "counts":
            return np.bincount(values(stat, x32).reshape(-1), minlength=stat.n)
        case _:
            raise AssertionError(stat.kind)


def name_of(stat: Stat) -> str:
    return f"{stat.kind}-{stat.per}"


@pytest.mark.parametrize("stat", STATS, ids=name_of)
@given(x=matrices, data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_in_any_order_gives_the_same(stat: Stat, x: np.ndarray, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    order = data.draw(st.permutations(range(len(cuts) + 1)))
    parts = [np.split(x, cuts)[i] for i in order]
    whole = finish(stat, feed(empty(stat), stat, x))
    merged, streamed = empty(stat), empty(stat)
    for p in parts:
        merged.merge(feed(empty(stat), stat, p))
        feed(streamed, stat, p)
    for other in (finish(stat, merged), finish(stat, streamed)):
        assert other.shape == whole.shape
        if statistic(stat).exact:
            assert np.array_equal(other, whole)
        else:
            scale = float(np.abs(x).max()) ** statistic(stat).degree * len(x) + 1
            assert np.allclose(other, whole, rtol=1e-6, atol=statistic(stat).noise * scale)


@pytest.mark.parametrize("stat", STATS, ids=name_of)
def test_accumulators_hold_no_more_than_they_say(stat: Stat) -> None:
    kind = statistic(stat)
    widths = [64, 64] if kind.pairs else [64]
    acc = feed(empty(stat), stat, np.abs(np.random.default_rng(0).standard_normal((200, 64))).astype(np.float32))
    held = sum(x.nbytes for x in vars(acc).values() if isinstance(x, np.ndarray))
    held += sum(x.nbytes for xs in vars(acc).values() if isinstance(xs, list) for x in xs)
    keys = 16 * stat.n if kind.draws else 0  # next to nothing beside the rows
    assert held <= kind.nbytes(stat, widths) + keys


OWN = [s for s in STATS if statistic(s).__module__.startswith("onnxcomp.stats") and not statistic(s).draws]


@pytest.mark.parametrize("stat", OWN, ids=name_of)
@given(x=matrices)
@settings(max_examples=40, deadline=None)
def test_results_are_the_definitions(stat: Stat, x: np.ndarray) -> None:
    found = finish(stat, feed(empty(stat), stat, x))
    wanted = direct(stat, x)
    assert found.shape == np.shape(wanted)
    assert np.allclose(
        found, wanted, rtol=1e-5, atol=1e-4 * (1 + float(np.abs(x).max())) if stat.kind != "histogram" else 0
    )


def test_a_kind_has_one_class_and_must_be_known() -> None:
    with pytest.raises(OnnxcompError, match=r"there is a statistic 'gram' already, in onnxcomp\.stats\.kinds\.grams"):
        type("Other", (Statistic,), {"kind": "gram"})
    with pytest.raises(ValueError, match="no statistic 'kurtosis'; there are absmax, "):
        statistic(Stat("kurtosis"))
    base = type("Base", (Statistic,), {})
    assert base not in kinds().values()


@pytest.mark.parametrize("rows_", [1, BUFFER - 1, BUFFER, BUFFER + 3, 5 * BUFFER + 7])
def test_gram_buffers_do_not_change_the_sum(rows_: int) -> None:
    x = np.random.default_rng(0).standard_normal((rows_, 5)).astype(np.float32)
    acc = empty(Stat("gram", "channel"))
    for part in np.array_split(x, 7):
        acc.update(part)
    acc.update(x)
    wanted = 2 * x.astype(np.float64).T @ x.astype(np.float64)
    assert acc.result().dtype == np.float64
    assert np.allclose(acc.result(), wanted, rtol=1e-5, atol=1e-5 * wanted.max())


def test_variance_survives_a_large_mean() -> None:
    x = (np.random.default_rng(0).standard_normal((5000, 3)) + 4096).astype(np.float32)
    acc = empty(Stat("var", "channel"))
    for part in np.array_split(x, 11):
        acc.update(part)
    assert np.allclose(finish(Stat("var", "channel"), acc), x.astype(np.float64).var(axis=0), rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stat", FLOATS, ids=name_of)
def test_nan_and_infinity_are_refused(stat: Stat, bad: float) -> None:
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(DataError, match="NaN or infinity"), np.errstate(invalid="ignore"):
        feed(empty(stat), stat, x).result()


@pytest.mark.parametrize("stat", STATS, ids=name_of)
def test_no_rows_is_no_statistic(stat: Stat) -> None:
    with pytest.raises(DataError, match="no rows"):
        empty(stat).result()


def test_a_sample_is_of_distinct_rows_and_needs_a_size() -> None:
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    acc = empty(Stat("sample", "channel", n=6))
    acc.update(x)
    acc.update(x)
    assert len({tuple(r) for r in acc.result()}) == 6
    with pytest.raises(DataError, match="at least one"):
        empty(Stat("sample", "channel"))


def test_needs_are_keys_and_unasked_statistics_are_errors() -> None:
    found = Stats({stats.absmax("a"): np.array(2.0)})
    assert found[stats.absmax("a")] == 2.0
    assert list(found) == [stats.absmax("a")]
    with pytest.raises(OnnxcompError, match=r"absmax\(b\) of the original was not collected"):
        found[stats.absmax("b", of="original")]
    with pytest.raises(OnnxcompError, match="without a name"):
        stats.gram("")


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_token_rows_are_found_in_every_layout() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]]) != 0
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    wanted = x[mask]
    assert np.array_equal(rows(x, mask, token_axis(x.shape, None, mask)), wanted)
    flat = x.reshape(6, 4)
    assert np.array_equal(rows(flat, mask, token_axis(flat.shape, None, mask)), wanted)
    heads = np.stack([x, x + 100], axis=1)
    assert token_axis(heads.shape, None, mask) == 2
    assert np.array_equal(rows(heads, mask, 2), np.stack([wanted, wanted + 100], axis=1).reshape(-1, 4))
    pooled = x[:, 0]
    assert np.array_equal(rows(pooled, mask, token_axis(pooled.shape, None, mask)), pooled)
    assert np.array_equal(rows(x, None, 1), flat)


def test_as_many_heads_as_tokens_do_not_confuse() -> None:
    mask = np.ones((2, 3), bool)
    assert token_axis((2, 3, 3, 4), ("batch", 3, "sequence", 4), mask) == 2
    assert token_axis((2, 3, 3, 4), ("batch", "sequence", 3, 4), mask) == 1
    assert token_axis((2, 3, 3, 4), None, mask) is None


def test_row_keys_depend_on_the_sample_not_on_its_batch() -> None:
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    together = Samples({"ids": ids, "mask": mask}, "mask").keys(5, 1)
    first = Samples({"ids": ids[:1], "mask": mask[:1]}, "mask").keys(3, 1)
    alone = Samples({"ids": ids[1:, :2], "mask": mask[1:, :2]}, "mask").keys(2, 1)
    assert together is not None
    assert first is not None
    assert alone is not None
    assert np.array_equal(together, np.concatenate([first, alone]))
    assert len(set(together.tolist())) == 5
    assert Samples({"ids": ids}, None).keys(7, None) is None


@pytest.mark.parametrize(
    ("name", "counts"),
    [("attention_mask", True), ("input_mask", True), ("padding_mask", False), ("bool_masked_pos", False)],
)
def test_only_a_mask_of_real_tokens_leaves_rows_out(name: str, counts: bool) -> None:
    g = tiny.encoder()
    g.model.graph.inputs[1].name = name
    assert mask_name(g) == (name if counts else None)
    assert mask_name(tiny.mlp()) is None


@given(x=matrices)
@settings(max_examples=20, deadline=None)
def test_a_histogram_leaves_channels_out(x: np.ndarray) -> None:
    wide = np.hstack([np.full((len(x), 1), 7e4, np.float32), x])
    part = statistic(Stat("histogram", without=(0,))).accumulator(Stat("histogram", without=(0,)))
    part.update(wide)
    whole = feed(empty(Stat("histogram")), Stat("histogram"), x)
    assert np.array_equal(part.result(), whole.result())
    assert histogram("v", without=(3, 1)) == histogram("v", without=(1, 3)) != histogram("v")
