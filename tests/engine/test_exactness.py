"""Exact passes are judged output by output, against the original's own rounding noise where that is larger."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.engine.exactness import Exactness
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from onnxcomp.runtime.wide_twin import in_wider
from onnxcomp.validation.compare import Reference
from tests import tiny

FLOAT = ir.DataType.FLOAT
RNG = np.random.default_rng(0)
W, V = RNG.standard_normal((2, 64, 8))
FEEDS = [{"x": RNG.standard_normal((32, 64)).astype(np.float32)}]


def model(dtype: ir.DataType = FLOAT, *, folded: bool = False, sign: float = 1, best: bool = False) -> Graph:
    """`noise` is xW + xV - x(W + V), zero but for rounding, in two orders of operations; `y` is xW."""
    given = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", 64]))
    g = Graph(ir.Model(ir.Graph([given], [], nodes=[], opset_imports={"": 21}, name="noise"), ir_version=10))
    x = g.op("Cast", given, to=dtype.value, name="cast") if dtype is not FLOAT else given
    w, v, both = (a.astype(dtype.numpy()) for a in (W, V, W + V))
    if folded:
        noise = g.op("Sub", g.op("MatMul", x, w), g.op("Sub", g.op("MatMul", x, both), g.op("MatMul", x, v)))
    else:
        noise = g.op("Sub", g.op("Add", g.op("MatMul", x, w), g.op("MatMul", x, v)), g.op("MatMul", x, both))
    y = g.op("MatMul", x, (sign * w).astype(w.dtype))
    if dtype is not FLOAT:  # the runtime has no numpy type for bfloat16
        noise, y = (g.op("Cast", v, to=FLOAT.value) for v in (noise, y))
    named = {"noise": noise, "y": y}
    if best:
        named["best"] = g.op("ArgMax", y, axis=1, keepdims=0)
    for name, out in named.items():
        kind, axes = (ir.DataType.INT64, ["batch"]) if name == "best" else (FLOAT, ["batch", 8])
        out.name, out.type, out.shape = name, ir.TensorType(kind), ir.Shape(axes)
        g.model.graph.outputs.append(out)
    return Graph(g.model)


def judged(original: Graph, candidate: Graph) -> str:
    judge = Exactness(original, Reference(original, FEEDS))
    return judge.moved(judge.few.against(candidate), (), pytest.fail)


def test_an_output_that_is_all_rounding_is_judged_by_the_originals_own_noise():
    original = model()
    judge = Exactness(original, Reference(original, FEEDS))
    now = judge.few.against(model(folded=True))
    assert now.outputs["noise"].sqnr < 20
    assert judge.moved(now, (), pytest.fail) == ""
    assert judge.noise is not None
    assert judge.noise["noise"] < 20  # from the copy in float64
    assert judge.noise["y"] > 100


def test_every_output_is_judged_and_named():
    assert judged(model(), model(sign=-1)).startswith("left 'y' -6.0 dB from the original, 80.0 dB was the floor")
    assert judged(model(), model(sign=1 + 1e-3)).startswith("left 'y' 60.0 dB")


def test_integer_outputs_are_judged():
    assert judged(model(best=True), model(best=True)) == ""
    g = model(best=True)
    g.replace(g.value("best"), g.op("Sub", np.array(7, np.int64), g.value("best")))
    assert judged(model(best=True), g).startswith("left 'best'")


def test_the_own_noise_is_not_measured_unless_it_is_asked_for():
    original = model()
    judge = Exactness(original, Reference(original, FEEDS))
    assert judge.moved(judge.few.against(original.clone()), (), pytest.fail) == ""
    assert judge.noise is None


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_the_noise_of_a_half_type_is_not_a_fault_and_a_change_is(dtype):
    original = model(dtype)
    scaled = model(dtype)
    node = scaled.value("y").producer().inputs[0].producer()
    scaled.set_input(node, 0, scaled.op("Mul", node.inputs[0], np.array(1 / 3, dtype.numpy())))
    scaled.replace(node.outputs[0], scaled.op("Mul", node.outputs[0], np.array(3, dtype.numpy())))
    scaled.sort()
    assert judged(original, scaled) == ""
    assert judged(original, model(dtype, sign=1.1)).startswith("left 'y'")


def test_the_wider_copy_has_the_same_interface_and_less_noise():
    narrow, wide = model(), in_wider(model())
    assert wide is not None
    assert [(v.name, v.dtype) for v in wide.outputs] == [(v.name, v.dtype) for v in narrow.outputs]
    assert {v.dtype for v in wide.model.graph.initializers.values()} == {ir.DataType.DOUBLE}
    with Session(narrow) as a, Session(wide) as b:
        x, y = (s.run(FEEDS[0]) for s in (a, b))
    exact = FEEDS[0]["x"].astype(np.float64) @ W.astype(np.float32).astype(np.float64)
    assert np.abs(y["y"] - exact).max() < 1e-6
    assert np.abs(y["y"] - exact).max() <= np.abs(x["y"] - exact).max()


def test_a_transformer_has_a_wider_copy():
    g = tiny.encoder(classes=3)
    judge = Exactness(g, Reference(g, [tiny.feeds(g, 2, 5)]))
    assert all(d > 80 for d in judge._own_noise().values())
