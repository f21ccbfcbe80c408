"""Experts as int8: tables with a scale per expert and output channel, loops as linears, what no token reaches."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.blocks.stored_parts import stored_parts
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.methods.quantize import batched, payoff
from onnxcomp.target import CPU
from tests import cuts, hand, tiny
from tests.mixtures import EXPERTS, FFN, WIDTH, mixture

TABLE = EXPERTS * WIDTH * FFN
PASSES = ("qdq", "dynamic-quant")


def quantized(g: Graph, name: str, rows: int = 32, **options):
    rng = np.random.default_rng(1)
    data = as_dataset([{"x": rng.standard_normal((rows, WIDTH)).astype(np.float32)}], g)
    return PassManager([catalog.load(name)(**options)], allow_unchanged=True).run(g, data, data)


def dequantized(g: Graph, int8: Graph) -> Graph:
    """A copy of the float model with the weights that the codes and scales of the quantized one stand for."""
    copy = g.clone()
    for x in blocks.batched_linears(g):
        codes, scale = (int8.array(int8.value(f"{x.table.name}_{part}")) for part in ("int8", "scale"))
        assert codes.dtype == np.int8
        assert scale.shape == tuple(1 if i == x.fan_in else n for i, n in enumerate(codes.shape))
        assert np.abs(codes).max(axis=x.fan_in).min() == 127
        copy.put(copy.value(x.table.name), codes * scale)
    return copy


def on_the_right() -> Graph:
    """`[experts, in, out]` behind GatherND, with a bias of each expert: GPT-OSS."""
    rng = np.random.default_rng(5)
    g = hand.graph(x=["tokens", WIDTH])
    x = g.inputs[0]
    best = g.op("ArgMax", g.op("MatMul", x, hand.f32(rng.standard_normal((WIDTH, EXPERTS)))), axis=-1, keepdims=1)
    w, b = hand.f32(rng.standard_normal((EXPERTS, WIDTH, FFN))), hand.f32(rng.standard_normal((EXPERTS, FFN)))
    y = g.op("MatMul", g.op("Unsqueeze", x, hand.i64(1)), g.op("GatherND", w, best))
    return tiny.finish(g, g.op("Add", g.op("Squeeze", y, hand.i64(1)), g.op("GatherND", b, best)), "y", ["tokens", FFN])


def all_experts() -> Graph:
    """Every expert on every token: a product with the whole table."""
    g = hand.graph(x=["tokens", WIDTH])
    w = hand.f32(
        np.random.default_rng(5).standard_normal((EXPERTS, WIDTH, FFN)) * np.arange(1, EXPERTS + 1)[:, None, None]
    )
    return tiny.finish(g, g.op("MatMul", g.inputs[0], w), "y", [EXPERTS, "tokens", FFN])


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("make", [lambda: mixture("batched"), on_the_right], ids=["left", "right"])
def test_gathered_weights_are_codes_and_the_products_what_codes_and_scales_say(make, name):
    g = make()
    canonicalize(g)
    result = quantized(g, name, min_size=TABLE)
    step, tables = result.report.steps[0], len(blocks.batched_linears(g))
    assert step.changed == tables == len(step.noted)
    assert all("int8 weights, float products" in n.what and " > " in n.what for n in step.noted)
    x = {"x": np.random.default_rng(2).standard_normal((7, WIDTH)).astype(np.float32)}
    cuts.assert_same(dequantized(g, result.model), result.model, x, tolerance=1e-5)
    parts = {(p.part, p.dtype): p.nbytes for p in stored_parts(result.model)}
    assert parts["linears", "int8"] == tables * TABLE
    assert parts["linears", "float32"] == 4 * WIDTH * EXPERTS  # the router


def test_int8_experts_are_still_experts_and_can_be_pruned():
    g = mixture("batched")
    canonicalize(g)
    int8 = quantized(g, "qdq", min_size=TABLE).model
    (before,), (e,) = blocks.experts(g), blocks.experts(int8)
    assert (e.count, e.chosen, e.width, e.form) == (before.count, before.chosen, before.width, "batched")
    cut = quantized(int8, "prune-experts", ratio=0.25).model
    (left,) = blocks.experts(cut)
    gone = cuts.removed_experts(int8, e, cut, left)
    mask = int8.clone()
    cuts.never_choose(mask, blocks.experts(mask)[0], gone)
    cuts.assert_same(mask, cut, {"x": np.random.default_rng(2).standard_normal((7, WIDTH)).astype(np.float32)})


@pytest.mark.parametrize("name", PASSES)
def test_products_with_every_expert_run_in_integers(name):
    g = all_experts()
    result = quantized(g, name, min_size=TABLE)
    assert [n.what.split(",")[0] for n in result.report.steps[0].noted] == [
        "integer products with the weights of every expert"
    ]
    m = result.model
    (product,) = m.nodes("MatMulInteger")
    probed = m.clone()
    probed.model.graph.outputs.extend(probed.value(v.name) for v in (*product.inputs[::2], product.outputs[0]))
    probed.infer_shapes()
    rows = np.random.default_rng(2).standard_normal((7, WIDTH)).astype(np.float32)
    y, q, z, total = cuts.run(probed, {"x": rows}).values()
    codes = m.array(product.inputs[1]).astype(np.int64)
    np.testing.assert_array_equal(total, (q.astype(np.int64) - z.astype(np.int64)) @ codes)
    want = cuts.run(g, {"x": rows})["y"]
    errors = np.linalg.norm(y - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    assert errors.max() < 0.03  # of every expert, though one has weights four times as large as another's


@pytest.mark.parametrize("name", PASSES)
def test_lowering_takes_products_with_every_expert(name):
    g = all_experts()
    data = as_dataset([{"x": np.ones((7, WIDTH), np.float32)}], g)
    passes = [catalog.load(name)(min_size=TABLE), catalog.load("lower")()]
    result = PassManager(passes, allow_unchanged=True).run(g, data, data)
    rows = {"x": np.random.default_rng(2).uniform(-1, 1, (7, WIDTH)).astype(np.float32)}
    assert np.isfinite(cuts.run(result.model, rows)["y"]).all()


def test_an_expert_that_no_token_reaches_stays_float_and_is_named():
    g = mixture("looped")
    canonicalize(g)
    result = quantized(g, "qdq", rows=1, min_size=1)
    step = result.report.steps[0]
    reached = 2 * blocks.experts(g)[0].chosen + 1
    assert (step.eligible, step.changed) == (2 * EXPERTS + 1, reached)
    assert len(step.declined) == 2 * EXPERTS + 1 - reached
    assert all(d.why.startswith("no sample of the data reaches it") for d in step.declined)
    cuts.run(result.model, {"x": np.random.default_rng(2).standard_normal((9, WIDTH)).astype(np.float32)})


def test_channels_of_an_expert_that_no_token_reaches_stay():
    g = mixture("looped")
    canonicalize(g)
    options = {"ratio": 0.25, "multiple_of": 1, "ranking": "layer"}
    step = quantized(g, "prune-ffn", rows=1, **options, sequential=False).report.steps[0]
    assert (step.eligible, step.changed) == (EXPERTS, blocks.experts(g)[0].chosen)
    assert all(d.why.startswith("no sample of the data reaches it") for d in step.declined)
    nothing = {"score": "magnitude", "repair": "none"}
    assert quantized(g, "prune-ffn", rows=1, **options, **nothing).report.steps[0].changed == EXPERTS


def test_an_expert_without_tokens_runs_with_a_range_of_run_time():
    g = mixture("looped")
    canonicalize(g)
    int8 = quantized(g, "dynamic-quant", min_size=1).model
    one = {"x": np.random.default_rng(2).standard_normal((1, WIDTH)).astype(np.float32)}
    want, got = cuts.run(g, one)["y"], cuts.run(int8, one)["y"]
    assert np.linalg.norm(want - got) < 0.05 * np.linalg.norm(want)


def test_small_and_skipped_tables_stay_and_are_named():
    g = mixture("batched")
    canonicalize(g)
    up, down = blocks.batched_linears(g)
    step = quantized(g, "dynamic-quant", min_size=1, skip=(up.name,)).report.steps[0]
    assert [(d.site, d.why) for d in step.declined] == [(up.name, f"skipped by the pattern '{up.name}'")]
    step = quantized(g, "dynamic-quant", min_size=TABLE + 1).report.steps[0]
    assert [d.why for d in step.declined if d.site == down.name] == [
        f"its {EXPERTS}x{FFN}x{WIDTH} weights are smaller than min_size={TABLE + 1}: nothing to gain"
    ]


def test_half_precision_tables_keep_sums_in_range():
    """Sums of codes leave the range of fp16, so scales come before the product."""
    g = on_the_right()
    x = blocks.batched_linears(g)[0]
    half = ir.DataType.FLOAT16
    g.put(x.table, g.array(x.table).astype(np.float16))
    narrow = g.op("Cast", x.input, to=half.value)
    g.set_input(x.node, 0, narrow)
    for v in (x.gather.outputs[0], narrow, x.node.outputs[0]):
        v.type = ir.TensorType(half)
    out = x.node.outputs[0]
    g.replace(out, g.op("Cast", out, to=ir.DataType.FLOAT.value), users=[u for u, _ in out.uses()])
    g.sort()
    work = g.clone()
    (site,) = blocks.batched_linears(work)
    batched.store(work, site, batched.TableCodes(work, CPU, batched.run_time))
    work.sort()
    rows = {"x": 40 * np.ones((3, WIDTH), np.float32)}
    want, got = cuts.run(g, rows)["y"], cuts.run(work, rows)["y"]
    assert np.linalg.norm(want - got) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("make", [lambda: mixture("batched"), on_the_right, all_experts], ids=["left", "right", "all"])
def test_what_is_timed_computes_the_same_in_both_forms(make):
    g = make()
    canonicalize(g)
    x = blocks.batched_linears(g)[0]
    forms = payoff.experts_models(x, CPU)
    shape = (5, WIDTH, 1) if x.left else (EXPERTS, 5, WIDTH) if x.gather is None else (5, 1, WIDTH)
    rows = {"x": np.random.default_rng(2).standard_normal(shape).astype(np.float32)}
    cuts.assert_same(forms["float"], forms["int8"], rows, tolerance=0.02)
    assert any(n.op_type == "MatMulInteger" for n in forms["int8"].nodes()) == (x.gather is None)
