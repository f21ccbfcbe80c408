"""TensorRT's rules: a graph that breaks each of them, and what the presets make for that target."""

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import TargetError
from onnxcomp.files import storage
from onnxcomp.graph import CONTRIB
from onnxcomp.lowering import tensorrt
from onnxcomp.passes.half import Half
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import TENSORRT
from tests import hand, tiny


def data(g, count=6):
    return load_data("random", g, None, batch=2, samples=2 * count, sequence=9)


def legal(g=None):
    """A quantized model that keeps all rules, for the tests to break one."""
    g = g or tiny.mlp(hidden=32, ffn=64)
    return PassManager([Qdq(min_size=1), Lower()], target=TENSORRT).run(g, data(g)).model


def quantizers(g, op="QuantizeLinear", constant=False):
    return [n for n in g.nodes(op) if g.is_constant(n.inputs[0]) == constant]


def contrib(g):
    y = next(g.nodes("MatMul")).outputs[0]
    g.replace(y, g.op("FastGelu", y, domain=CONTRIB, name="bad", like=y))


def dynamic(g):
    x = g.inputs[0]
    g.op("DynamicQuantizeLinear", x, outputs=3, name="bad")


def newer(g):
    g.model.opset_imports[""] = 23


def untyped(g):
    y = next(g.nodes("MatMul")).outputs[0]
    users = [u for u, _ in y.uses()]
    wide = g.op("Cast", y, to=ir.DataType.DOUBLE.value, name="bad")
    g.replace(y, g.op("Cast", wide, to=ir.DataType.FLOAT.value, like=y), users=users)


def unsigned(g):
    node = quantizers(g)[0]
    node.name = "bad"
    zero = g.constant(np.array(0, np.uint8))
    for n in (node, *(u for u, _ in node.outputs[0].uses())):
        g.set_input(n, 2, zero)
    node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)


def shifted(g):
    node = quantizers(g)[0]
    node.name = "bad"
    zero = g.constant(np.array(3, np.int8))
    for n in (node, *(u for u, _ in node.outputs[0].uses())):
        g.set_input(n, 2, zero)


def negative(g):
    node = quantizers(g, "DequantizeLinear", constant=True)[0]
    node.name = "bad"
    scale = g.array(node.inputs[1]).copy()
    scale[1] = 0
    g.set_input(node, 1, g.constant(scale))


def computed(g):
    node = quantizers(g)[0]
    node.name = "bad"
    g.set_input(node, 1, g.op("Abs", node.inputs[1]))
    for u, _ in node.outputs[0].uses():
        g.set_input(u, 1, node.inputs[1])


def per_channel_activation(g):
    node = quantizers(g)[0]
    node.name = "bad"
    scale = g.constant(np.full(32, 0.1, np.float32))
    for n in (node, *(u for u, _ in node.outputs[0].uses())):
        g.set_input(n, 1, scale)
        g.set_input(n, 2, None)
        g.set_attr(n, axis=2)


def wrong_axis(g):
    node = quantizers(g, "DequantizeLinear", constant=True)[0]
    node.name = "bad"
    k = int(node.inputs[0].shape[0])
    g.set_input(node, 1, g.constant(np.full(k, 0.1, np.float32)))
    g.set_attr(node, axis=0)


def wrong_axis_of_a_gemm(g):
    linear = blocks.linears(g)[0]
    k, n = linear.sizes
    x = g.op("Reshape", linear.node.inputs[0], hand.i64(-1, k))
    codes = g.constant(np.ones((n, k), np.int8))
    weight = g.op("DequantizeLinear", codes, g.constant(np.full(k, 0.1, np.float32)), axis=1, name="bad")
    g.replace(linear.node.outputs[0], g.op("Gemm", x, weight, transB=1, like=linear.node.outputs[0]))


def lone_quantize(g):
    node = quantizers(g)[0]
    node.name = "bad"
    g.op("Cast", node.outputs[0], to=ir.DataType.FLOAT.value, name="reader")


def two_scales(g):
    node = quantizers(g)[0]
    node.name = "bad"
    g.set_input(next(u for u, _ in node.outputs[0].uses()), 1, g.constant(np.array(0.7, np.float32)))


def lone_dequantize(g):
    codes = g.op("Cast", g.inputs[0], to=ir.DataType.INT8.value)
    g.op("DequantizeLinear", codes, np.array(0.1, np.float32), name="bad")


def quantized_bias(g):
    linear = blocks.linears(g)[0]
    n = linear.sizes[1]
    bias = g.op("DequantizeLinear", np.ones(n, np.int8), np.full(n, 0.1, np.float32), axis=0, name="bad")
    g.set_input(linear.add, 1 if linear.add.inputs[0] is linear.node.outputs[0] else 0, bias)


def int32_bias(g):
    linear = blocks.linears(g)[0]
    n = linear.sizes[1]
    bias = g.op("DequantizeLinear", np.ones(n, np.int32), np.full(n, 0.1, np.float32), axis=0, name="bad")
    g.set_input(linear.add, 1 if linear.add.inputs[0] is linear.node.outputs[0] else 0, bias)


def turned(g):
    linear = blocks.linears(g)[0]
    linear.node.name = "bad"
    there = g.op("Transpose", linear.node.inputs[1], perm=[1, 0])
    g.set_input(linear.node, 1, g.op("Transpose", there, perm=[1, 0]))


def one_sided(g):
    linear = blocks.linears(g)[0]
    linear.node.name = "bad"
    g.set_input(linear.node, 0, linear.source)


def scaled_scores(g):
    x = g.inputs[0]
    scores = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    scaled = g.op("Div", scores, np.array(5.6, np.float32), name="bad")
    g.op("Softmax", g.op("Add", scaled, np.zeros((1, 1, 1), np.float32)), axis=-1)


BROKEN = [
    ("standard-operators", contrib, "bad"),
    ("standard-operators", dynamic, "bad"),
    ("opset", newer, "the model"),
    ("explicit-types", untyped, "bad"),
    ("symmetric-int8", unsigned, "bad"),
    ("symmetric-int8", shifted, "bad"),
    ("symmetric-int8", int32_bias, "bad"),
    ("scales", negative, "bad"),
    ("scales", computed, "bad"),
    ("per-tensor-activations", per_channel_activation, "bad"),
    ("per-channel-axis", wrong_axis, "bad"),
    ("per-channel-axis", wrong_axis_of_a_gemm, "bad"),
    ("pairs", lone_quantize, "bad"),
    ("pairs", two_scales, "bad"),
    ("pairs", lone_dequantize, "bad"),
    ("float-bias", quantized_bias, "bad"),
    ("direct", turned, "bad"),
    ("both-sides", one_sided, "bad"),
    ("scale-on-q", scaled_scores, "bad"),
]


def test_every_rule_has_a_graph_that_breaks_it():
    assert {rule for rule, _, _ in BROKEN} == set(tensorrt.RULES)
    assert set(tensorrt.RULES) >= tensorrt.LAYOUT


@pytest.mark.parametrize(("rule", "breaks", "node"), BROKEN, ids=[b.__name__ for _, b, _ in BROKEN])
def test_a_broken_rule_is_named_with_the_node(rule, breaks, node):
    g = legal()
    assert not tensorrt.check(g)
    breaks(g)
    g.sort()
    assert (rule, node) in {(v.rule, v.node) for v in tensorrt.check(g)}
    if rule in tensorrt.LAYOUT:
        assert any(f"rule '{rule}' at '{node}'" in note for note in tensorrt.require(g, TENSORRT))
    else:
        with pytest.raises(TargetError, match=f"rule '{rule}'"):
            tensorrt.require(g, TENSORRT)


def test_other_targets_are_not_asked():
    g = legal()
    contrib(g)
    assert tensorrt.require(g, oc.CPU) == []


def test_a_soft_cap_is_no_scale_on_the_scores():
    g = hand.graph(x=("b", "s", 8))
    x = g.value("x")
    scores = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    capped = g.op("Mul", g.op("Tanh", g.op("Div", scores, hand.f32(30))), hand.f32(30))
    g = tiny.finish(g, g.op("MatMul", g.op("Softmax", capped, axis=-1), x), "y", ["b", "s", 8])
    assert not tensorrt.check(g)


KINDS = {
    "encoder": lambda: tiny.encoder(spelled="dynamo"),
    "decoder": lambda: tiny.decoder(spelled="dynamo"),
    "decoder-tied": lambda: tiny.decoder(tied=True),
    "gated": lambda: tiny.mlp(hidden=32, ffn=64, gated=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [(Qdq(min_size=1),), (Half(),), (Qdq(min_size=1), Half())], ids=str)
def test_what_the_passes_make_for_tensorrt_is_legal_and_agrees(kind, passes):
    g = KINDS[kind]()
    canonicalize(g)
    result = PassManager([*passes, Lower()], target=TENSORRT).run(g, data(g), data(g))
    assert tensorrt.check(result.model) == []
    assert result.model.opset <= TENSORRT.max_opset
    assert result.report.validation.values()["sqnr"] > (20 if isinstance(passes[0], Qdq) else 50)


@pytest.mark.parametrize("preset", ["int8", "fp16"])
def test_a_preset_for_tensorrt_runs_and_is_checked_before_writing(preset, tmp_path):
    g = tiny.encoder(hidden=32, ffn=64)
    storage.save(g, tmp_path / "in")
    batches = [b.feeds for b in data(g, 8)]
    options = {"preset": preset, "target": "tensorrt", "calibration": batches, "measure": False}
    oc.compress(tmp_path / "in", tmp_path / "out", **options)
    written = storage.load(tmp_path / "out")
    assert tensorrt.check(written) == []
    assert not list(written.nodes("Attention"))
    with Session(g) as a, Session(written) as b:
        want, got = (next(iter(s.run(batches[0]).values())) for s in (a, b))
    assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


def test_a_result_that_is_not_legal_is_refused_and_not_written(tmp_path):
    g = tiny.encoder(hidden=32, ffn=64)
    storage.save(g, tmp_path / "in")
    batches = [b.feeds for b in data(g, 8)]
    recipe = Recipe(passes=("canonicalize", {"qdq": {"min_size": 1}}), target="tensorrt")
    with pytest.raises(TargetError, match=r"rule 'opset'.*end the recipe with a pass of the last stage"):
        oc.compress(tmp_path / "in", tmp_path / "out", recipe=recipe, calibration=batches, measure=False)
    assert not list((tmp_path / "out").glob("*.onnx"))
