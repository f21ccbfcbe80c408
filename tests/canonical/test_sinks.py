"""Attention sinks: a logit of each head that no key has, joined to the scores before the softmax and dropped behind."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.canonical.sinks import has_sink
from tests.canonical.test_attention import B, H, N, S, attention_graph, heads, merged, qkv, scores
from tests.hand import LOWEST, RNG, f32, i64, ops, raised, same

LOGITS = f32(np.linspace(-2, 1.5, N).reshape(1, N, 1, 1))


def with_sink(g, s, *, place="last", maximum=True, dropped=None):
    """Attention with a sink of each head, as GPT-OSS writes it."""
    lead = g.op("Shape", g.value("q"), start=0, end=2)
    batch, length = (g.op("Slice", lead, i64(i), i64(i + 1), i64(0)) for i in (0, 1))
    sink = g.op("Expand", LOGITS, g.op("Concat", batch, i64(N), length, i64(1), axis=0))
    joined = g.op("Concat", *((s, sink) if place == "last" else (sink, s)), axis=-1)
    if maximum:
        joined = g.op("Sub", joined, g.op("ReduceMax", joined, i64(-1), keepdims=1))
    p = g.op("Softmax", joined, axis=-1)
    start, end = (0, -1) if (dropped or place) == "last" else (1, 1 << 40)
    kept = g.op("Slice", p, i64(start), i64(end), i64(-1), i64(1))
    return merged(g, g.op("MatMul", kept, heads(g, g.value("v"))))


@pytest.mark.parametrize("place", ["last", "first"])
@pytest.mark.parametrize("mask", ["none", "bool", "finite", "bias"])
def test_a_sink_is_a_key_of_zeros_with_a_bias(mask, place):
    g = attention_graph(seen=["b", 1, "s", "s", bool], bias=[1, N, "s", "s"])
    s, seen = g.op("Mul", scores(g), f32(0.3)), g.value("seen")
    if mask == "bool":
        s = g.op("Where", seen, s, f32(-np.inf))
    elif mask == "finite":
        s = g.op("Add", s, g.op("Where", seen, f32(0), f32(LOWEST)))
    elif mask == "bias":
        s = g.op("Add", s, g.value("bias"))
    source, new = raised(g, with_sink(g, s, place=place, maximum=mask != "none"), "b", "s", N * H)
    node = next(new.nodes("Attention"))
    assert (new.declined, has_sink(node)) == ([], True)
    assert not set(ops(new)) & {"Softmax", "MatMul", "ReduceMax", "Transpose"}
    allowed = RNG.random((B, 1, S, S)) < 0.5
    allowed[0, 0, 0] = False  # a query that only the sink is left to
    same(source, new, **qkv(), seen=allowed, bias=f32(RNG.standard_normal((1, N, S, S))))


def test_where_a_key_is_dropped_in_its_place_it_is_no_sink():
    g = attention_graph()
    source, new = raised(g, with_sink(g, scores(g), dropped="first"), "b", "s", N * H)
    assert [d.why for d in new.declined] == ["attention: no product of queries and keys leads to the softmax"]
    same(source, new, **qkv())


def test_a_maximum_that_is_subtracted_is_dropped():
    g = attention_graph()
    s = scores(g)
    p = g.op("Softmax", g.op("Sub", s, g.op("ReduceMax", s, i64(3), keepdims=1)), axis=-1)
    source, new = raised(g, merged(g, g.op("MatMul", p, heads(g, g.value("v")))), "b", "s", N * H)
    assert set(ops(new)) == {"Attention"}
    same(source, new, **qkv())
