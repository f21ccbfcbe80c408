"""Sliding windows: masks against a reference in float64, widths from measured attention, company of other passes."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.blocks import attentions
from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.methods.windows import WIDTHS, kept_by_width, widest
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.window_attention import WindowAttention
from onnxcomp.runtime.sessions import Session
from tests import hand, tiny

HEADS, WIDTH = 2, 4  # of the model written by hand


def one_attention(mask: ir.DataType | None, past: int = 0, causal: bool = False) -> Graph:
    """`x [b, s, 8]` through one attention; its mask, if any, and cached keys and values are inputs."""
    shapes = {"x": ("b", "s", HEADS * WIDTH)}
    if past:
        shapes |= dict.fromkeys(("past_k", "past_v"), ("b", HEADS, past, WIDTH))
    if mask is not None:
        ending = (bool,) if mask is ir.DataType.BOOL else ()
        shapes["mask"] = ("b", 1, "s", f"{past} + s" if past else "s", *ending)
    g = hand.graph(23, **shapes)
    inputs = {str(v.name): v for v in g.inputs}
    q, k, v = (g.op("MatMul", inputs["x"], hand.weight(8, 8)) for _ in range(3))
    cached = [inputs["past_k"], inputs["past_v"]] if past else []
    args = [q, k, v, inputs.get("mask"), *cached]
    out = g.op("Attention", *args, outputs=3 if past else 1, q_num_heads=HEADS, kv_num_heads=HEADS)
    made = out.producer()
    assert made is not None
    for i, v in enumerate(made.outputs[1:]):
        v.name, v.type, v.shape = f"present_{i}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", HEADS, "t", WIDTH])
        g.model.graph.outputs.append(v)
    return tiny.finish(g, g.op("MatMul", out, hand.weight(8, 8)), "y", ["b", "s", 8])


def reference(q, k, v, heads, kv_heads, allowed, added=0.0):
    """Masked attention in float64, `[b, s, heads d]`; `k` and `v` are `[b, kv_heads, t, d]`."""
    b, s, _ = q.shape
    q4 = q.astype(np.float64).reshape(b, s, heads, -1).swapaxes(1, 2)
    k4, v4 = (np.repeat(x.astype(np.float64), heads // kv_heads, axis=1) for x in (k, v))
    scores = q4 @ k4.swapaxes(2, 3) / np.sqrt(q4.shape[-1]) + added
    scores = np.where(allowed, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
    return p, (p @ v4).swapaxes(1, 2).reshape(b, s, -1)


def near(s: int, t: int, width: int, sinks: int):
    own, among = np.arange(t - s, t)[:, None], np.arange(t)[None, :]
    return (np.abs(own - among) < width) | (among < sinks) | (own < sinks)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def tapped(g: Graph, feeds, values):
    other = g.clone()
    other.model.graph.outputs.extend(other.value(n) for n in values)
    with Session(other) as session:
        found = session.run(feeds)
    return [found[n] for n in values]


def windowed(g: Graph, feeds=(), **options) -> Graph:
    data = as_dataset([Batch(f) for f in feeds], g) if feeds else ()
    return PassManager([WindowAttention(**options)]).run(g, data).model


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(("make", "side"), [(tiny.encoder, "right"), (tiny.decoder, "right"), (tiny.decoder, "left")])
def test_every_layer_is_masked_attention_in_float64(make, side, sinks):
    g = make()
    result = windowed(g, width=3, sinks=sinks)
    for b, s in ((2, 9), (3, 4)):
        feeds = tiny.feeds(g, b, s, seed=s, padding=side)
        keys = feeds.get("attention_mask", np.ones((b, s)))[:, None, None, :] == 1
        allowed = near(s, s, 3, sinks) & keys
        if make is tiny.decoder:
            allowed = allowed & np.tri(s, dtype=bool)
        for a in attentions(result):
            q, k, v, out = tapped(result, feeds, [str(x.name) for x in (*a.node.inputs[:3], a.node.outputs[0])])
            want = reference(q, split(k, a.kv_heads), split(v, a.kv_heads), a.heads, a.kv_heads, allowed)[1]
            rows = np.broadcast_to(allowed.any(-1)[:, 0], out.shape[:2])
            np.testing.assert_allclose(out[rows], want[rows], rtol=0, atol=2e-6)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("mask", [None, ir.DataType.BOOL, ir.DataType.FLOAT])
def test_masks_of_every_kind_and_cached_keys(mask, past):
    rng = np.random.default_rng(1)
    g, b, s = one_attention(mask, past), 2, 6
    result = windowed(g, width=4, sinks=1)
    feeds = {"x": hand.f32(rng.standard_normal((b, s, 8)))}
    if past:
        feeds |= {n: hand.f32(rng.standard_normal((b, HEADS, past, WIDTH))) for n in ("past_k", "past_v")}
    allowed, added = near(s, past + s, 4, 1), 0.0
    if mask is ir.DataType.BOOL:
        feeds["mask"] = rng.random((b, 1, s, past + s)) < 0.8
        allowed = allowed & feeds["mask"]
    elif mask is not None:
        feeds["mask"] = added = hand.f32(rng.standard_normal((b, 1, s, past + s)))
    (a,) = attentions(result)
    q, k, v, out = tapped(result, feeds, [str(x.name) for x in (*a.node.inputs[:3], a.node.outputs[0])])
    k, v = (split(x, HEADS) for x in (k, v))
    if past:
        k, v = (np.concatenate([feeds[f"past_{n}"], x], axis=2) for n, x in (("k", k), ("v", v)))
    want = reference(q, k, v, HEADS, HEADS, allowed, added)[1]
    rows = np.broadcast_to(allowed.any(-1).reshape(-1, s), (b, s))
    np.testing.assert_allclose(out[rows], want[rows], rtol=0, atol=2e-6)


def test_one_band_for_all_layers():
    result = windowed(tiny.decoder(), width=3)
    masks = {a.mask for a in attentions(result)}
    assert len(attentions(result)) > 1
    assert len(masks) == 1
    assert name_masks(result, masks)[masks.pop()].name == "causal window 3+padding"


@pytest.mark.parametrize("width", [7, 100])
def test_a_window_as_long_as_the_sequence_changes_nothing(width):
    g = tiny.encoder(batch=2, sequence=7)
    step = PassManager([WindowAttention(width=width)], allow_unchanged=True).run(g).report.steps[0]
    assert step.edits == 0
    assert {d.why for d in step.declined} == {f"its 7 keys fit into a window of {width}"}


def test_a_second_window_counts_only_where_it_is_narrower():
    g = tiny.encoder()
    once = windowed(g, width=3)
    step = PassManager([WindowAttention(width=5)], allow_unchanged=True).run(once).report.steps[0]
    assert step.edits == 0
    assert {d.why for d in step.declined} == {"its window of 3 is no wider than 5"}
    feeds = tiny.feeds(g, 2, 9, seed=0, padding="right")
    rows = feeds["attention_mask"] == 1
    with Session(windowed(once, width=2)) as a, Session(windowed(g, width=2)) as b:
        x, y = (next(iter(session.run(feeds).values())) for session in (a, b))
    np.testing.assert_array_equal(x[rows], y[rows])


def test_cross_attention_and_skipped_ones_stay():
    g = tiny.decoder()
    names = [a.name for a in attentions(g)]
    result = windowed(g, width=3, skip=(names[0],))
    masks = {a.name: name_masks(result, [a.mask])[a.mask].name for a in attentions(result)}
    assert masks == {n: "causal+padding" if n == names[0] else "causal window 3+padding" for n in names}


# ---- widths from measured attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("make", [tiny.encoder, tiny.decoder])
def test_kept_attention_is_the_sum_of_probabilities_inside(make, sinks):
    g = make()
    feeds = tiny.feeds(g, 2, 9, seed=0, padding="right")
    keys = feeds.get("attention_mask", np.ones((2, 9)))[:, None, None, :] == 1
    allowed = keys & np.tri(9, dtype=bool) if make is tiny.decoder else keys
    copy = g.clone()
    values = [str(v.name) for v in kept_by_width(copy, attentions(copy), sinks)]
    copy.sort()
    for a, kept in zip(attentions(g), tapped(copy, feeds, values), strict=True):
        q, k = tapped(g, feeds, [str(x.name) for x in a.node.inputs[:2]])
        k = split(k, a.kv_heads)
        p, _ = reference(q, k, k, a.heads, a.kv_heads, allowed)
        for i, width in enumerate(WIDTHS):
            want = np.where(near(9, 9, width, sinks), p, 0).sum(-1).mean(1)
            np.testing.assert_allclose(kept[..., i], want, atol=1e-5)
        assert (kept[..., -1] == 9).all()
        assert (np.diff(kept[..., :-1], axis=-1) >= -1e-5).all()


def test_more_mass_needs_wider_windows():
    g = tiny.encoder()
    feeds = [tiny.feeds(g, 2, 24, seed=i, padding="right") for i in range(2)]
    found = []
    for mass in (0.3, 0.6, 0.8, 0.95):
        result = PassManager([WindowAttention(mass=mass)], allow_unchanged=True).run(
            g, as_dataset([Batch(f) for f in feeds], g)
        )
        notes = {n.site: int(n.what.split()[1]) for n in result.report.steps[0].noted}
        found.append([notes.get(a.name, 24) for a in attentions(g)])
    assert (np.diff(np.array(found), axis=0) >= 0).all()
    assert found[0] != found[-1]


def test_widest_takes_no_window_as_long_as_the_sequence():
    kept = [min(1.0, w / 8) for w in WIDTHS]
    assert widest(kept, 0.5, 100) == 4
    assert widest(kept, 1.0, 100) == 8
    assert widest(kept, 1.0, 8) is None
    assert widest(kept, 0.5, 4) is None


# ---- with other passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.encoder, tiny.decoder])
def test_composes_with_quantizing_and_lowering(make):
    g = make()
    data = as_dataset([Batch(tiny.feeds(g, 2, 12, seed=i, padding="right")) for i in range(3)], g)
    alone = PassManager([WindowAttention(width=4), Lower()]).run(g, data)
    both = PassManager([WindowAttention(width=4), Qdq(min_size=1), Lower()]).run(g, data)
    assert both.report.step("qdq").changed > 0
    plain = windowed(g, width=4)
    feeds = tiny.feeds(g, 2, 12, seed=9, padding="right")
    rows = feeds.get("attention_mask", np.ones((2, 12))) == 1
    out = []
    for model in (plain, alone.model, both.model):
        with Session(model) as session:
            out.append(next(iter(session.run(feeds).values()))[rows])
    assert np.abs(out[1] - out[0]).max() <= 2e-5 * np.abs(out[0]).max()
    assert np.linalg.norm(out[2] - out[0]) <= 0.1 * np.linalg.norm(out[0])


def test_the_report_says_that_a_mask_is_not_faster():
    result = PassManager([WindowAttention(width=3)]).run(tiny.decoder())
    assert any("makes nothing faster" in w for w in result.report.warnings)
