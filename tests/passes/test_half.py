"""`half` against float32: what becomes half, what stays, and that both are said by name."""

from collections import Counter
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcomp import blocks
from onnxcomp.benchmarking import benchmark
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset, load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import TargetError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.half import Half
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.sessions import Session
from onnxcomp.stats import Stats
from onnxcomp.target import CPU, CUDA
from tests import hand, tiny, zoo

F16 = ir.DataType.FLOAT16


def data(g, count=6):
    return load_data("random", g, None, batch=2, samples=2 * count, sequence=9)


def halved(g, *before, **options):
    return PassManager([*before, Half(**options)], allow_unchanged=True).run(g, data(g), data(g))


def finished(g, out, name, shape):
    return Graph(tiny.finish(g, out, name, shape).model)


def canonical(build, **options):
    g = build(**options)
    canonicalize(g)
    return g


MODELS = {
    "encoder": lambda: canonical(tiny.encoder),
    "encoder-exported": lambda: canonical(tiny.encoder, spelled="dynamo"),
    "encoder-as-exported": lambda: tiny.encoder(spelled="dynamo"),
    "decoder": lambda: canonical(tiny.decoder),
    "decoder-tied": lambda: canonical(tiny.decoder, tied=True),
    "decoder-as-exported": lambda: tiny.decoder(spelled="dynamo"),
    "bert": lambda: Graph(zoo.load_graph("bert.dynamo-sdpa-20")),
    "vit": lambda: Graph(zoo.load_graph("vit.dynamo-sdpa-18")),
    "llama": lambda: Graph(zoo.load_graph("llama.dynamo-sdpa-18")),
}


@pytest.mark.parametrize("name", MODELS)
def test_fp16_stays_close_and_keeps_the_interface(name):
    g = MODELS[name]()
    result = halved(g)
    step, new = result.report.step("half"), result.model
    assert result.report.validation.values()["sqnr"] > 50
    assert step.changed == step.eligible - len(step.declined) > 0.8 * step.eligible
    assert new.interface == g.interface
    assert new.nbytes < 0.65 * g.nbytes
    assert all(x.weight.dtype is F16 for x in blocks.linears(new, tied=True))


@pytest.mark.parametrize("name", MODELS)
def test_casts_are_few_and_never_there_and_back(name):
    new = halved(MODELS[name]()).model
    casts = list(new.nodes("Cast"))
    crossing = [n for n in casts if {n.inputs[0].dtype, n.outputs[0].dtype} == {F16, ir.DataType.FLOAT}]
    assert len({(n.inputs[0], n.outputs[0].dtype) for n in casts}) == len(casts), "a value is cast once"
    for node in crossing:
        source = node.inputs[0].producer()
        assert source is None or source not in casts


def test_a_tied_table_is_converted_once():
    g = canonical(tiny.decoder, tied=True)
    new = halved(g).model
    head = next(x for x in blocks.linears(new, tied=True) if x.transposed)
    assert head.weight.dtype is F16
    assert any(node.inputs[0] is head.weight for node in new.nodes("Gather"))
    assert new.nbytes < 0.55 * g.nbytes


def hot_linear(size=1e5):
    """An encoder in whose feed-forward part one channel reaches about `size`; what reads it undoes that."""
    g = canonical(tiny.encoder)
    found = blocks.linears(g)
    first = next(x for x in found if any(u.op_type == "Gelu" for u in x.users))
    second = found[found.index(first) + 1]
    w, u = g.array(first.weight).copy(), g.array(second.weight).copy()
    w[:, 3] *= size
    u[3] /= size
    g.put(first.weight, w)
    g.put(second.weight, u)
    return g, first, second


def test_a_value_that_would_overflow_stays_float32_by_name():
    g, first, second = hot_linear()
    result = halved(g)
    step = result.report.step("half")
    declined = {d.site: d.why for d in step.declined}
    assert first.name in declined
    assert "overflow" in declined[first.name]
    assert second.name in declined
    assert result.report.validation.values()["sqnr"] > 50
    assert 0 < step.changed + len(declined) == step.eligible


def test_headroom_decides():
    g, first, _ = hot_linear(size=2e3)
    kept = {d.site for d in halved(g, headroom=1024).report.step("half").declined}
    assert first.name in kept
    fewer = {d.site for d in halved(g, headroom=1).report.step("half").declined}
    assert first.name not in fewer


def test_a_weight_out_of_range_or_too_small_stays_float32():
    for factor, why in ((1e6, "beyond 6.55e"), (1e-8, "too small")):
        g = tiny.mlp(hidden=32, ffn=64)
        first = blocks.linears(g)[0]
        g.put(first.weight, g.array(first.weight) * np.float32(factor))
        reasons = [d.why for d in halved(g).report.step("half").declined if d.site == first.name]
        assert reasons
        assert why in reasons[0]


def test_an_epsilon_that_would_vanish_keeps_its_node_in_float32():
    g = hand.graph(x=("b", 8))
    x = g.value("x")
    power = g.op("ReduceMean", g.op("Mul", x, x), hand.i64(-1), keepdims=1)
    y = g.op("Div", x, g.op("Sqrt", g.op("Add", power, hand.f32(1e-12), name="with_epsilon")))
    g = finished(g, g.op("MatMul", y, hand.weight(8, 8)), "y", ["b", 8])
    feeds = [{"x": np.vstack([np.zeros((1, 8)), np.random.default_rng(i).standard_normal((3, 8))])} for i in range(5)]
    feeds = [{"x": f["x"].astype(np.float32)} for f in feeds]
    result = PassManager([Half()]).run(g, as_dataset(feeds, g))
    assert "with_epsilon" in {d.site for d in result.report.step("half").declined}
    with Session(result.model) as s:
        assert np.isfinite(s.run(feeds[0])["y"]).all(), "a row of zeros divided by the root of epsilon"


@pytest.mark.parametrize("fill", [-3.4028234663852886e38, -1e9, -np.inf])
def test_masks_stay_finite_where_they_were(fill):
    g = hand.graph(x=("b", "s", 8), mask=("b", "s"))
    x, mask = g.value("x"), g.value("mask")
    allowed = g.op("Unsqueeze", g.op("Cast", g.op("Greater", mask, hand.f32(0.5)), to=1), hand.i64(1))
    bias = g.op("Where", g.op("Greater", allowed, hand.f32(0)), hand.f32(0), hand.f32(fill))
    scores = g.op("Add", g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1])), bias)
    y = g.op("MatMul", g.op("Softmax", scores, axis=-1), x)
    g = finished(g, g.op("MatMul", y, hand.weight(8, 8)), "y", ["b", "s", 8])
    rng = np.random.default_rng(0)
    mask_rows = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    if np.isfinite(fill):
        mask_rows[0] = 0  # rows that see no key have no defined output, but none may become NaN
    feeds = [{"x": rng.standard_normal((2, 5, 8)).astype(np.float32), "mask": mask_rows} for _ in range(5)]
    new = PassManager([Half()]).run(g, as_dataset(feeds, g)).model
    assert {n.outputs[0].dtype for n in new.nodes("Softmax")} == {F16}
    with Session(g) as a, Session(new) as b:
        want, got = (s.run(feeds[0])["y"] for s in (a, b))
    assert np.isfinite(got).all()
    seen = slice(1, None) if np.isfinite(fill) else slice(None)
    assert np.linalg.norm(got[seen] - want[seen]) < 3e-3 * np.linalg.norm(want[seen])


def test_angles_and_positions_stay_float32():
    new = halved(Graph(zoo.load_graph("llama.dynamo-sdpa-18"))).model
    for node in new.nodes("Sin", "Cos"):
        assert node.inputs[0].dtype is ir.DataType.FLOAT


def test_branches_read_float32():
    g = hand.graph(x=("b", 8))
    x = g.op("MatMul", g.value("x"), hand.weight(8, 8), name="inside")
    x.dtype = ir.DataType.FLOAT
    bodies = []
    for op in ("Neg", "Abs"):
        node = ir.node(op, [x], name=f"branch_{op}")
        node.outputs[0].type, node.outputs[0].name = x.type, f"branch_{op}_out"
        bodies.append(ir.Graph([], [node.outputs[0]], nodes=[node], name=op))
    condition = g.op("Greater", g.op("ReduceSum", g.value("x"), keepdims=0), hand.f32(0))
    both = g.op("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    g = finished(g, g.op("MatMul", both, hand.weight(8, 8)), "y", ["b", 8])
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(5)]
    new = PassManager([Half()], allow_unchanged=True).run(g, as_dataset(feeds, g)).model
    with Session(g) as a, Session(new) as b:
        np.testing.assert_allclose(b.run(feeds[0])["y"], a.run(feeds[0])["y"], atol=2e-2)


def test_quantized_graphs_become_half_around_their_integers():
    g = canonical(tiny.encoder)
    result = PassManager([Qdq(min_size=1, symmetric=True), Half()]).run(g, data(g), data(g))
    ops = Counter(n.op_type for n in result.model.nodes())
    assert ops["QuantizeLinear"] > 0
    products = [n for n in result.model.nodes("MatMul") if n.inputs[1].producer() is not None]
    assert {n.outputs[0].dtype for n in products if n.inputs[1].producer().op_type == "DequantizeLinear"} == {F16}
    assert result.report.validation.values()["sqnr"] > 20


def test_external_weights_are_converted_when_they_are_written(tmp_path):
    g = tiny.encoder(layers=1, hidden=512, ffn=2048)
    path = tiny.external(g, tmp_path)
    loaded = storage.load(path)
    new = PassManager([Half()]).run(loaded, data(loaded, 5)).model
    large = [v.const_value for v in new.model.graph.initializers.values() if v.const_value.nbytes > 1 << 20]
    assert large
    assert all(isinstance(t, ir.LazyTensor) for t in large)
    written = storage.load(storage.save(new, tmp_path / "out"))
    for a, b in zip(blocks.linears(g), blocks.linears(written), strict=True):
        np.testing.assert_array_equal(written.array(b.weight), g.array(a.weight).astype(np.float16))


def test_bfloat16_equals_the_reference_evaluator():
    g = tiny.mlp(hidden=32, ffn=64, gated=True)
    work = Graph(g.model.clone())
    Half(dtype="bf16").run(work, SimpleNamespace(stats=Stats()))
    work.verify()
    assert {x.weight.dtype for x in blocks.linears(work)} == {ir.DataType.BFLOAT16}
    feeds = tiny.feeds(g, 2, 5)
    with Session(g) as s:
        want = next(iter(s.run(feeds).values()))
    got = ReferenceEvaluator(onnx.load_from_string(ir.to_proto(work.model).SerializeToString())).run(None, feeds)[0]
    assert got.dtype == np.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 4 * float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)


def test_bfloat16_needs_no_data_and_fp16_does():
    assert Half().wants_data
    assert not Half(dtype="bf16").wants_data


def test_a_cpu_is_told_that_it_gains_no_speed():
    g = tiny.mlp(hidden=32, ffn=64)
    assert any("not faster" in w for w in halved(g).report.warnings)
    assert not list(Half().advice(CUDA))


@pytest.mark.parametrize("name", ["encoder", "decoder-tied", "vit", "llama"])
def test_bfloat16_is_emulated_on_a_cpu_to_be_judged(name, tmp_path):
    g = MODELS[name]()
    result = PassManager([Half(dtype="bf16")], target=CUDA).run(g, (), data(g))
    assert 28 < result.report.validation.values()["sqnr"] < 60
    path = storage.save(result.model, tmp_path)
    for model in (result.model, path):
        with Session(model) as s:
            assert s.emulated
            assert all(np.isfinite(y).all() for y in s.run(next(iter(data(g, 1))).feeds).values())


def test_emulated_bfloat16_is_never_timed(tmp_path):
    g = tiny.mlp(hidden=32, ffn=64)
    result = PassManager([Half(dtype="bf16")], target=CUDA).run(g)
    with pytest.raises(TargetError, match="nothing to time"):
        benchmark.bench([storage.save(result.model, tmp_path)], CPU, [{"batch": 1, "sequence": 9}])


def test_emulated_bfloat16_is_the_reference_evaluators():
    g = tiny.mlp(hidden=32, ffn=64, gated=True)
    work = Graph(g.model.clone())
    Half(dtype="bf16").run(work, SimpleNamespace(stats=Stats()))
    work.verify()
    feeds = tiny.feeds(g, 2, 5)
    want = ReferenceEvaluator(onnx.load_from_string(ir.to_proto(work.model).SerializeToString())).run(None, feeds)[0]
    with Session(work) as s:
        got = next(iter(s.run(feeds).values()))
    assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)


def test_bf16_for_a_cpu_is_refused():
    g = tiny.mlp(hidden=32, ffn=64)
    with pytest.raises(TargetError, match="does not run bf16"):
        PassManager([Half(dtype="bf16")]).run(g)
