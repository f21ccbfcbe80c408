"""Fewer tokens: what may go without a trace goes so, and what is averaged agrees with plain numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

from onnxcomp.analysis.facts import Facts
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.methods.tokens import places, removals
from onnxcomp.passes.drop_tokens import DropTokens
from onnxcomp.passes.merge_tokens import MergeTokens
from onnxcomp.runtime.sessions import Session
from tests import tiny


def run(p, g: Graph, feeds: dict) -> Graph:
    data = as_dataset([Batch(feeds)] * 2, g)
    return PassManager([p], allow_unchanged=True).run(g, data).model


def outputs(g: Graph, feeds: dict) -> np.ndarray:
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


def tapped(g: Graph, feeds: dict, *names: str) -> list[np.ndarray]:
    with Session(g, taps=names) as s:
        found = s.run(feeds, names)
    return [found[n] for n in names]


def twins(g: Graph) -> dict:
    """Tokens in equal pairs (2, 3), (4, 5), ... in a model without positions."""
    table = g.value("embeddings.positions")
    g.put(table, np.zeros_like(g.array(table)))
    ids = np.array([[1, 2, 7, 7, 5, 5, 9, 9], [3, 4, 6, 6, 8, 8, 2, 2]], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("classes", [0, 3])
def test_merging_equal_tokens_changes_nothing(norm, classes):
    g = tiny.encoder(norm=norm, classes=classes, batch=2, sequence=8)
    feeds = twins(g)
    merged = run(MergeTokens(ratio=0.25), g, feeds)
    want, got = outputs(g, feeds), outputs(merged, feeds)
    np.testing.assert_allclose(got, want, atol=2e-6)
    counted = run(MergeTokens(ratio=0.25, proportional=False), g, feeds)
    assert np.max(np.abs(outputs(counted, feeds) - want)) > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("p", [MergeTokens(ratio=0.3), DropTokens(keep=0.7, drops=1)], ids=["merge", "drop"])
def test_padding_goes_first_and_leaves_no_trace(side, p):
    g = tiny.encoder(norm="pre")
    feeds = tiny.feeds(g, 2, 12)
    feeds["attention_mask"][:, slice(0, 6) if side == "left" else slice(6, None)] = 0
    shorter = run(p, g, feeds)
    real = feeds["attention_mask"].astype(bool)
    if side == "left":  # the first token is special to both passes, padding or not
        real[:, 0] = False
    np.testing.assert_allclose(outputs(shorter, feeds)[real], outputs(g, feeds)[real], atol=2e-6)
    assert any(str(n.name).startswith("all_tokens") for n in shorter.nodes())


def test_merging_agrees_with_plain_loops():
    g = tiny.encoder(norm="pre", sequence=9)
    feeds = tiny.feeds(g, 2, 9)
    place = places(g)[0][0]
    x, k = tapped(g, feeds, place.x.name, place.attention.node.inputs[1].name)
    merged = run(MergeTokens(ratio=0.5), g, feeds)
    after = next(n.outputs[0].name for n in merged.nodes("Div") if str(n.name).startswith("fewer_tokens"))
    (got,) = tapped(merged, feeds, after)
    for row in range(2):
        mean = k[row].astype(np.float64).reshape(9, place.attention.kv_heads, -1).mean(1)
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        pairs = []
        for i in range(2, 9, 2):
            j = max(range(1, 9, 2), key=lambda j, i=i: unit[i] @ unit[j])
            pairs.append((-(unit[i] @ unit[j]), i, j))
        gone = sorted(pairs)[:2]
        groups = {j: [j] for j in range(9) if j not in {i for _, i, _ in gone}}
        for _, i, j in gone:
            groups[j].append(i)
        want = np.stack([x[row, members].mean(0) for _, members in sorted(groups.items())])
        np.testing.assert_allclose(got[row], want, atol=2e-6)


def test_dropping_agrees_with_plain_loops():
    g = tiny.encoder(layers=3, norm="post", sequence=9, batch=2)
    feeds = tiny.feeds(g, 2, 9)
    feeds["attention_mask"][:] = 1
    place = places(g)[0][1]
    q, k = (v.name for v in place.attention.node.inputs[:2])
    x, q, k = tapped(g, feeds, place.x.name, q, k)
    dropped = run(DropTokens(keep=0.5, drops=1), g, feeds)
    after = next(n.outputs[0].name for n in dropped.nodes("Div") if str(n.name).startswith("fewer_tokens"))
    (got,) = tapped(dropped, feeds, after)
    heads, width = place.attention.heads, place.attention.head_dim
    for row in range(2):
        first = q[row, 0].astype(np.float64).reshape(heads, width)
        keys = k[row].astype(np.float64).reshape(9, heads, width)
        scores = np.einsum("hd,thd->ht", first, keys) * width**-0.5
        p = np.exp(scores - scores.max(1, keepdims=True))
        a = (p / p.sum(1, keepdims=True)).mean(0)
        kept = np.sort(np.append(np.argsort(-a[1:])[:4] + 1, 0))
        rest = np.setdiff1d(np.arange(9), kept)
        fused = (a[rest] @ x[row, rest]) / a[rest].sum()
        np.testing.assert_allclose(got[row], np.vstack([x[row, kept], fused]), atol=5e-6)


@pytest.mark.parametrize("p", [MergeTokens(), DropTokens()], ids=["merge", "drop"])
def test_where_tokens_cannot_move_nothing_is_edited(p):
    g = tiny.decoder()
    before = ir.to_proto(g.model).SerializeToString(deterministic=True)
    feeds = tiny.feeds(g, 2, 7)
    result = PassManager([p], allow_unchanged=True).run(g, as_dataset([Batch(feeds)] * 2, g))
    assert ir.to_proto(result.model.model).SerializeToString(deterministic=True) == before
    assert {d.why for d in result.report.steps[0].declined} == {"layer 0: positions are rotated inside attention"}


def test_each_layer_sees_fewer_tokens_and_the_classifier_reads_the_first():
    g = tiny.encoder(layers=3, norm="pre", classes=3, sequence=13)
    merged = run(MergeTokens(ratio=0.5), g, tiny.feeds(g, 2, 13))
    f = Facts(merged)
    lengths = [f.shape(n.outputs[0]) for n in merged.nodes("Div") if str(n.name).startswith("fewer_tokens")]
    assert [s[1] for s in lengths] == [11, 9, 7]
    assert not any(str(n.name).startswith("all_tokens") for n in merged.nodes())


@given(st.integers(2, 400), st.integers(1, 24), st.floats(0.0, 0.95))
def test_the_plan_removes_the_asked_share_where_pairs_suffice(length, count, ratio):
    class Fake:
        def __init__(self) -> None:
            self.length = length

    plan = removals([Fake()] * count, ratio)
    left = length
    for gone in plan:
        assert 0 <= gone <= (left - 1) // 2
        left -= gone
    assert length - left <= ratio * length + 1e-6
    if ratio < 0.4 and length >= 20:
        assert length - left == int(ratio * length + 1e-9)
