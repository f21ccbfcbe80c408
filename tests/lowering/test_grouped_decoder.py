"""Attentions of a decoder that keep their caches in place: equal to what they replace, or declined with the reason."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.graph import Graph
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.runtime.generation import Decoder
from tests import tiny
from tests.hand import f32, graph, i64

HEADS, KV, WIDTH, WORDS, CONTEXT = 4, 2, 32, 11, 32
RNG = np.random.default_rng(0)
WEIGHTS = {n: f32(RNG.standard_normal(s) * 0.4) for n, s in {
    "words": (WORDS, 32), "q": (32, HEADS * WIDTH), "k": (32, KV * WIDTH), "v": (32, KV * WIDTH),
    "o": (HEADS * WIDTH, WORDS),
}.items()}  # fmt: skip


def decoder(window: int = 0, padded: bool = True, rotary: bool = True, partial: int = 0, grows: bool = False) -> Graph:
    """One layer; its angles `grow` with the text where asked, as some long-context embeddings do."""
    shapes = {"input_ids": ("b", "s", int), "attention_mask": ("b", "all", int)}
    shapes |= {"position_ids": ("b", "s", int)} if rotary else {}
    g = graph(23, **shapes, **{f"past_key_values.0.{n}": ("b", KV, "past", WIDTH) for n in ("key", "value")})
    ids, shown, *rest = g.model.graph.inputs
    past = rest[-2:]
    x = g.op("Gather", WEIGHTS["words"], ids)
    q, k, v = (g.op("MatMul", x, WEIGHTS[n]) for n in "qkv")
    if rotary:
        rates = f32(0.7 ** np.arange(1, (partial or WIDTH) // 2 + 1))
        angles = g.op("Mul", g.op("Unsqueeze", g.op("Cast", rest[0], to=1), i64(2)), rates)
        if grows:
            angles = g.op("Mul", angles, g.op("Cast", g.op("ReduceMax", rest[0], keepdims=0), to=1))
        tables = g.op("Cos", angles), g.op("Sin", angles)
        extra = {"rotary_embedding_dim": partial} if partial else {}
        q, k = (g.op("RotaryEmbedding", a, *tables, num_heads=n, **extra) for a, n in ((q, HEADS), (k, KV)))
        q.shape, k.shape = (ir.Shape(["b", "s", n * WIDTH]) for n in (HEADS, KV))
    old = g.op("Shape", past[0], start=2, end=3)
    rows, keys = g.op("Shape", ids, start=1, end=2), g.op("Shape", shown, start=1, end=2)
    scalar = [g.op("Squeeze", a, i64(0)) for a in (old, rows, keys)]
    row = g.op("Add", g.op("Range", np.array(0), scalar[1], np.array(1)), scalar[0])
    column = g.op("Range", np.array(0), scalar[2], np.array(1))
    row, column = g.op("Unsqueeze", row, i64(1)), g.op("Unsqueeze", column, i64(0))
    mask = g.op("LessOrEqual", column, row)
    if window:
        mask = g.op("And", mask, g.op("Less", g.op("Sub", row, column), np.array(window)))
    mask = g.op("Unsqueeze", mask, i64(0, 1))
    if padded:
        mask = g.op("And", mask, g.op("Unsqueeze", g.op("Cast", shown, to=9), i64(1, 2)))
    y = g.op("Attention", q, k, v, mask, *past, q_num_heads=HEADS, kv_num_heads=KV, scale=0.3, outputs=3)
    for value, name in zip(y.producer().outputs[1:], ("key", "value"), strict=True):
        value.name, value.type = f"present.0.{name}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["b", KV, "all", WIDTH])
        g.model.graph.outputs.append(value)
    g = tiny.finish(g, g.op("MatMul", y, WEIGHTS["o"]), "logits", ["b", "s", WORDS])
    g.infer_shapes()
    return g


def scores(g: Graph) -> list[np.ndarray]:
    """Of a prompt of two texts, one padded on the left, and of three tokens behind it, one at a time."""
    tokens = np.random.default_rng(1).integers(0, WORDS, (2, 9))
    mask = np.ones_like(tokens)
    mask[1, :2] = 0
    steps = [slice(0, 6), *(slice(i, i + 1) for i in range(6, 9))]
    with Decoder(g) as d:
        return [d.read(tokens[:, s], mask[:, s])[mask[:, s] > 0] for s in steps]


@pytest.mark.parametrize("changed", [{}, {"window": 3}, {"rotary": False}, {"partial": 16}], ids=str)
def test_grouped_attentions_give_the_same_scores(changed: dict) -> None:
    g = decoder(**changed)
    new = g.clone()
    assert group_attentions(new, CONTEXT) == ""
    assert [n.op_type for n in new.nodes("Attention", "RotaryEmbedding", "GroupQueryAttention")] == [
        "GroupQueryAttention"
    ]
    assert "position_ids" not in [v.name for v in new.inputs]
    for a, b in zip(scores(g), scores(new), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize(
    ("g", "why"),
    [
        (decoder(grows=True), "depend on the length of the text"),
        (decoder(partial=8), "no multiple of 16 channels"),
        (tiny.decoder(), "no input is a mask of all tokens"),
    ],
    ids=["growing angles", "few turned channels", "no caches"],
)
def test_what_does_not_fit_stays_as_it_is(g: Graph, why: str) -> None:
    before = [n.op_type for n in g.nodes()]
    assert why in group_attentions(g, CONTEXT)
    assert [n.op_type for n in g.nodes()] == before
