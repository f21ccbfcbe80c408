"""Attentions with something between them and their projections: linked, cut as the masked model, dropped whole."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks, coupling
from onnxcomp.blocks.attentions import unlinked
from onnxcomp.blocks.branches import layer_branches
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import sites
from onnxcomp.engine import catalog, config_file
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from tests import cuts, hand
from tests.hand import f32, i64, weight

H, N, D, F = 16, 4, 4, 24
KINDS = (
    "gate",
    "packed gate",
    "clip",
    "clipped pack",
    "head norms",
    "batch norm",
    "cosine",
    "output norm",
    "activated",
    "sink",
    "einsum",
    "unbound pairs",
    "unit length",
)


def linear(g, x, n, k=H):
    return g.op("Add", g.op("MatMul", x, weight(k, n)), f32(np.linspace(-0.2, 0.2, n)))


def split(g, x, heads=N):
    return g.op("Transpose", g.op("Reshape", x, i64(0, 0, heads, D)), perm=[0, 2, 1, 3])


def rms(g, x, n, axis=-1):
    root = g.op("Sqrt", g.op("Add", g.op("ReduceMean", g.op("Mul", x, x), i64(axis), keepdims=1), f32(1e-5)))
    return g.op("Mul", g.op("Div", x, root), f32(np.linspace(0.8, 1.2, n)))


def unit_length(g, x, n):
    """`normalize(x) * sqrt(n) * g`, as lucidrains' models write an RMS norm."""
    length = g.op("Clip", g.op("ReduceL2", x, i64(-1), keepdims=1), f32(1e-12))
    unit = g.op("Div", x, g.op("Expand", length, g.op("Shape", x)))
    return g.op("Mul", g.op("Mul", unit, f32(n**0.5)), f32(np.linspace(0.8, 1.2, n)))


def turned(g, x):
    """Pairs of channels rotated: `reshape(.., d / 2, 2).unbind(-1)` and `stack(.., dim=-1).flatten(3)`."""
    angles = np.outer(np.arange(6), [1.0, 0.1]).repeat(2, 1)
    pairs = g.op("Reshape", x, i64(0, 0, 0, D // 2, 2))
    one, two = (g.op("Slice", pairs, i64(i), i64(i + 1), i64(-1)) for i in (0, 1))
    two = g.op("Unsqueeze", g.op("Neg", g.op("Squeeze", two, i64(-1))), i64(-1))
    stacked = g.op("Reshape", g.op("Concat", two, one, axis=-1), i64(0, 0, 0, D))
    return g.op("Add", g.op("Mul", x, f32(np.cos(angles))), g.op("Mul", stacked, f32(np.sin(angles))))


def projections(g, x, kind):
    """Queries, keys and values `[b, n, s, d]`, and a gate on the output if there is one."""
    if kind == "einsum":
        products = (g.op("Einsum", x, weight(H, N, D), equation="btd,dhk->bhtk") for _ in range(3))
        return *(g.op("Add", p, f32(np.linspace(-0.2, 0.2, H).reshape(N, 1, D))) for p in products), None
    if kind == "clipped pack":
        packed = g.op("Clip", linear(g, x, 3 * H), f32(-0.7), f32(0.7))
        return *(split(g, v) for v in parts(g, packed, [H] * 3, -1)), None
    q, k, v = (linear(g, x, H) for _ in range(3))
    gate = linear(g, x, H) if kind == "gate" else None
    if kind == "packed gate":
        q, gate = parts(g, g.op("Reshape", linear(g, x, 2 * H), i64(0, 0, N, 2 * D)), [D, D], -1)
        q, gate = (g.op("Reshape", v, i64(0, 0, H)) for v in (q, gate))
    if kind == "clip":
        q, k, v = (g.op("Clip", v, f32(-0.7), f32(0.7)) for v in (q, k, v))
    if kind == "batch norm":
        stats = [f32(np.linspace(a, b, H)) for a, b in ((0.5, 1.5), (-0.3, 0.3), (-0.2, 0.4), (0.6, 1.4))]
        flat = [g.op("Reshape", v, i64(-1, H)) for v in (q, k, v)]
        q, k, v = (g.op("Reshape", g.op("BatchNormalization", v, *stats), i64(-1, 6, H)) for v in flat)
    q, k, v = (split(g, v) for v in (q, k, v))
    if kind == "head norms":
        q, k = (head_norms(g, x) for x in (q, k))
    if kind == "unbound pairs":
        q, k = (turned(g, x) for x in (q, k))
    if kind == "cosine":
        q, k = (g.op("Div", x, g.op("Max", g.op("ReduceL2", x, i64(-1), keepdims=1), f32(1e-6))) for x in (q, k))
    return q, k, v, gate


def parts(g, x, sizes, axis):
    return g.op("Split", x, i64(*sizes), axis=axis, outputs=len(sizes)).producer().outputs


def head_norms(g, x):
    gains = (f32(np.linspace(0.5 + i, 1.5, D)) for i in range(N))
    heads = parts(g, x, [1] * N, 1)
    normed = [g.op("LayerNormalization", p, w, axis=-1) for p, w in zip(heads, gains, strict=True)]
    return g.op("Concat", *normed, axis=1)


def layer(g, x, kind):
    q, k, v, gate = projections(g, unit_length(g, x, H) if kind == "unit length" else rms(g, x, H), kind)
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    factor = f32(np.linspace(1, 4, N).reshape(N, 1, 1)) if kind == "cosine" else f32(0.5)
    scores = g.op("Mul", scores, factor)
    if kind == "sink":
        shape = g.op("Concat", g.op("Shape", q, start=0, end=1), i64(N, 6, 1), axis=0)
        sinks = g.op("Expand", f32(np.linspace(-1, 1, N).reshape(1, N, 1, 1)), shape)
        scores = g.op("Concat", scores, sinks, axis=-1)
    p = g.op("Softmax", scores, axis=-1)
    out = g.op("MatMul", g.op("Slice", p, i64(0), i64(-1), i64(-1)) if kind == "sink" else p, v)
    if kind == "einsum":
        x = g.op("Add", x, g.op("Einsum", out, weight(N, D, H), equation="bhtk,hkd->btd"))
        return g.op("Add", x, linear(g, g.op("Relu", linear(g, rms(g, x, H), F)), H, F))
    y = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), i64(0, 0, H))
    if gate is not None:
        y = g.op("Mul", y, g.op("Sigmoid", gate))
    if kind == "output norm":
        y = rms(g, y, H)
    if kind == "activated":
        y = g.op("HardSwish", y)
    if kind == "unknown":
        y = g.op("Erf", y)
    x = g.op("Add", x, linear(g, y, H))
    return g.op("Add", x, linear(g, g.op("Relu", linear(g, rms(g, x, H), F)), H, F))


def model(kind, layers=2) -> tuple[Graph, Graph]:
    g = hand.graph(x=["b", 6, H])
    x = g.inputs[0]
    for _ in range(layers):
        x = layer(g, x, kind)
    return hand.raised(g, x, "b", 6, H)


def inputs(count=2):
    rng = np.random.default_rng(4)
    return [{"x": f32(rng.standard_normal((2, 6, H)))} for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_linked_and_cut_as_the_masked_model(kind):
    source, g = model(kind)
    hand.same(source, g, **inputs()[0])
    assert (g.declined, unlinked(g)) == ([], [])
    found = blocks.attentions(g)
    assert [(a.heads, a.head_dim, [x.sizes for x in a.linears]) for a in found] == [(N, D, [(H, H)] * 4)] * 2
    assert [(len(x.attentions), len(x.mlps), x.position) for x in blocks.layers(g)] == [(1, 1, "pre")] * 2
    assert all(not b.why for b in layer_branches(g))
    facts = describe(g)
    assert facts["positions"] == ("rotary" if kind == "unbound pairs" else "none")
    assert ("ReduceL2" in hand.ops(g), "Einsum" in hand.ops(g)) == (kind == "cosine", False)
    assert (facts["layers"], facts["attention"]["with_projections"], facts["not_recognised"]) == (2, 2, [])
    group = coupling.Coupling(g).heads(found[0])
    cuts.check(g, group, [1], *inputs())


@pytest.mark.parametrize("kind", ["gate", "clip"])
def test_what_lies_between_holds_shared_heads(kind):
    g = model(kind)[1]
    step = (
        PassManager([catalog.load("group-heads")()], allow_unchanged=True).run(g, inputs(8), inputs()).report.steps[0]
    )
    op = {"gate": "Sigmoid", "clip": "Clip"}[kind]
    assert step.changed == 0
    assert all(("Mul" in d.why or op in d.why or "moved" in d.why) for d in step.declined)


def test_a_window_has_no_place_for_a_sink():
    g = model("sink")[1]
    assert [describe(g)["attention"][k] for k in ("sinks", "masks", "bias")] == [2, "none", None]
    window = catalog.load("window-attention")(width=2)
    step = PassManager([window], allow_unchanged=True).run(g, inputs(8), inputs()).report.steps[0]
    assert (step.changed, {d.why for d in step.declined}) == (0, {"its mask holds a sink, to which no window applies"})


def test_query_heads_with_a_norm_behind_them_go_with_their_values():
    """Grouped keys: the values of a query head that went alone would stay in the mean of the others."""
    g = model("output norm")[1]
    prune = catalog.load("prune-heads")(score="magnitude", repair="none", ranking="layer")
    for a in blocks.attentions(g):
        for x in (a.k, a.v):
            g.put(x.weight, np.ascontiguousarray(g.array(x.weight)[:, : H // 2]))
            g.put(x.bias, g.array(x.bias)[: H // 2])
        g.set_attr(a.node, kv_num_heads=N // 2)
    g.forget_shapes()
    grouped = Graph(g.model)
    c = coupling.Coupling(grouped)
    for a in blocks.attentions(grouped):
        group = prune.group(c, a.node.outputs[0])
        assert group.units == N // 2
        cuts.check(grouped, group, [0], *inputs())


# ---- attentions that nothing links -----------------------------------------------------------------------------------


def test_a_layer_with_an_unlinked_attention_is_dropped_whole():
    g = model("unknown", layers=4)[1]
    why = "its output is not read by one linear alone"
    assert [w for _, w in unlinked(g)] == [why] * 4
    assert [d["why"] for d in describe(g)["not_recognised"]] == [f"attention: not linked to projections: {why}"] * 4
    assert len(blocks.layers(g)) == 4
    result = PassManager([catalog.load("drop-layers")(ratio=0.25, protect=0, repair="none")]).run(
        g, inputs(8), inputs()
    )
    assert hand.ops(result.model)["Attention"] == 3
    assert len(blocks.mlps(result.model)) == len(blocks.layers(result.model)) == 3
    before, after = config_file.sizes(g), config_file.sizes(result.model)
    assert config_file.update({"num_hidden_layers": 4}, before, after)[0] == {"num_hidden_layers": 3}


def test_heads_of_unlinked_attentions_are_told_to_the_configuration():
    g = model("unknown")[1]
    prune = catalog.load("prune-heads")(ratio=0.5, score="magnitude", repair="none", ranking="layer")
    result = PassManager([prune]).run(g, inputs(8), inputs())
    before, after = config_file.sizes(g), config_file.sizes(result.model)
    assert (before.heads, after.heads, after.head_dim) == ((N,), (N // 2,), (D,))
    assert config_file.update({"num_attention_heads": N}, before, after)[0]["num_attention_heads"] == N // 2


def test_a_router_is_no_attention():
    g = hand.graph(x=["t", H])
    scores = g.op("Softmax", g.op("MatMul", g.inputs[0], weight(H, 4)), axis=-1)
    best = g.op("TopK", scores, i64(2), axis=-1, outputs=2).producer().outputs[0]
    _, new = hand.raised(g, best, "t", 2)
    assert (new.declined, list(sites(new))) == ([], [])
