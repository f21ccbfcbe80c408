"""fp16 and bf16 graphs: norms and softmax in fp32 between casts, low fills and constants rounded to the type."""

import math

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests.hand import RNG, i64, ops

F16, BF16, F32 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
EPS = {F16: 2.0**-10, BF16: 2.0**-7}
HALVES = pytest.mark.parametrize("half", [F16, BF16], ids=["fp16", "bf16"])


def graph(half, **inputs) -> Graph:
    """An empty graph with inputs of the half type, or bool where the shape ends so."""
    values = []
    for name, shape in inputs.items():
        kind = ir.DataType.BOOL if shape[-1] is bool else half
        values.append(
            ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([d for d in shape if d is not bool]))
        )
    return Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 18}, name="half"), ir_version=10))


def finish(g: Graph, out: ir.Value, half, *shape) -> Graph:
    """The canonical form, which is settled and of the same types."""
    out.name, out.type, out.shape = "y", ir.TensorType(half), ir.Shape(list(shape))
    g.model.graph.outputs.append(out)
    source = Graph(g.model)
    source.infer_shapes()
    new = source.clone()
    canonicalize(new)
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    assert new.outputs[0].dtype == half
    return new


def number(half, x) -> np.ndarray:
    return np.asarray(x, np.float64).astype(half.numpy())


def near(half, new: Graph, want: np.ndarray, feeds: dict, noise: float = 4) -> None:
    """The canonical graph equals a float64 evaluation within the type's noise; only fp16 runs on the CPU."""
    if half is F16:
        with Session(new) as s:
            got = s.run(feeds)["y"].astype(np.float64)
        assert np.abs(got - want).max() <= noise * EPS[half] * max(1.0, np.abs(want).max())


@HALVES
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("gain_in_half", [False, True])
def test_norms_between_casts(half, centred, gain_in_half):
    g = graph(half, x=("b", "s", 16))
    gain = 1 + 0.1 * RNG.standard_normal(16)
    up = g.op("Cast", g.inputs[0], to=F32)
    c = g.op("Sub", up, g.op("ReduceMean", up, i64(-1))) if centred else up
    power = g.op("ReduceMean", g.op("Pow", c, np.array(2, np.float32)), i64(-1))
    y = g.op("Mul", c, g.op("Reciprocal", g.op("Sqrt", g.op("Add", power, np.array(1e-6, np.float32)))))
    if gain_in_half:
        out = g.op("Mul", number(half, gain), g.op("Cast", y, to=half))
    else:
        out = g.op("Cast", g.op("Mul", y, gain.astype(np.float32)), to=half)
    new = finish(g, out, half, "b", "s", 16)
    kind = "LayerNormalization" if centred else "RMSNormalization"
    assert ops(new)[kind] == 1
    assert ops(new)["Sqrt"] == ops(new)["Pow"] == 0
    node = next(new.nodes(kind))
    assert node.attributes.get_int("stash_type", 1) == F32
    x = number(half, RNG.standard_normal((2, 3, 16)))
    z = x.astype(np.float64)
    z = z - z.mean(-1, keepdims=True) if centred else z
    want = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * number(half, gain).astype(np.float64)
    near(half, new, want, {"x": x})


def heads(g: Graph, name: str) -> ir.Value:
    return g.op("Transpose", g.op("Reshape", g.value(name), i64(0, 0, 4, 8)), perm=[0, 2, 1, 3])


def attention(half, fill: float, wide: bool, selected: bool) -> Graph:
    """Attention on three axes with a bool mask, its softmax in fp32, or cast there and back."""
    g = graph(half, q=("b", "s", 32), k=("b", "s", 32), v=("b", "s", 32), m=("b", 1, "s", "s", bool))
    scores = g.op("MatMul", heads(g, "q"), g.op("Transpose", heads(g, "k"), perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, number(half, 8**-0.5))
    low = number(half, fill)
    if selected:
        scores = g.op("Where", g.value("m"), scores, low)
    else:
        scores = g.op("Add", scores, g.op("Where", g.value("m"), number(half, 0), low))
    p = g.op("Softmax", g.op("Cast", scores, to=F32) if wide else scores, axis=-1)
    p = g.op("Cast", p if wide else g.op("Cast", p, to=F32), to=half)
    y = g.op("Transpose", g.op("MatMul", p, heads(g, "v")), perm=[0, 2, 1, 3])
    return finish(g, g.op("Reshape", y, i64(0, 0, 32)), half, "b", "s", 32)


@HALVES
@pytest.mark.parametrize("fill", ["min", "inf", "-1e4"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("selected", [False, True])
def test_attention_and_its_masks(half, fill, wide, selected):
    lowest = float(np.finfo(np.float16).min) if half is F16 else -3.3895e38
    low = {"min": lowest, "inf": -np.inf, "-1e4": -1e4}[fill]
    new = attention(half, low, wide, selected)
    assert ops(new)["Attention"] == 1
    assert ops(new)["Softmax"] == ops(new)["Cast"] == 0
    node = next(new.nodes("Attention"))
    assert node.attributes.get_int("softmax_precision", 0) == (F32 if wide else 0)
    assert node.inputs[3].dtype == ir.DataType.BOOL
    q, k, v = (number(half, RNG.standard_normal((2, 5, 32))) for _ in range(3))
    m = RNG.random((2, 1, 5, 5)) > 0.4
    m[..., 0] = True
    a, b, c = (x.astype(np.float64).reshape(2, 5, 4, 8).transpose(0, 2, 1, 3) for x in (q, k, v))
    e = np.where(m, np.exp(a @ b.transpose(0, 1, 3, 2) * 8**-0.5), 0)
    want = (e / e.sum(-1, keepdims=True) @ c).transpose(0, 2, 1, 3).reshape(2, 5, 32)
    near(half, new, want, {"q": q, "k": k, "v": v, "m": m})


@HALVES
@pytest.mark.parametrize("tanh", [False, True])
def test_activations_with_rounded_constants(half, tanh):
    g = graph(half, x=("b", "s", 8))
    x = g.inputs[0]
    if tanh:
        cube = g.op("Mul", g.op("Pow", x, number(half, 3)), number(half, 0.044715))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), number(half, math.sqrt(2 / math.pi))))
    else:
        inner = g.op("Erf", g.op("Div", x, number(half, math.sqrt(2))))
    gate = g.op("Add", inner, number(half, 1))
    new = finish(g, g.op("Mul", g.op("Mul", x, number(half, 0.5)), gate), half, "b", "s", 8)
    assert ops(new) == {"Gelu": 1}
    assert next(new.nodes("Gelu")).attributes.get_string("approximate", "none") == ("tanh" if tanh else "none")


def test_only_casts_that_lose_nothing_go():
    g = graph(F16, x=("b", 8))
    there = g.op("Cast", g.op("Cast", g.op("Relu", g.inputs[0]), to=F32), to=F16)
    new = finish(g, g.op("Neg", there), F16, "b", 8)
    assert ops(new) == {"Relu": 1, "Neg": 1}
    g = graph(F32, x=("b", 8))
    there = g.op("Cast", g.op("Cast", g.op("Relu", g.inputs[0]), to=F16), to=F32)
    new = finish(g, g.op("Neg", there), F32, "b", 8)
    assert ops(new)["Cast"] == 2
    g = graph(F16, x=("b", 8))
    there = g.op("Cast", g.op("Cast", g.op("Relu", g.inputs[0]), to=BF16), to=F16)
    new = finish(g, g.op("Neg", there), F16, "b", 8)
    assert ops(new)["Cast"] == 2
