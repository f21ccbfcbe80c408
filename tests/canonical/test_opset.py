"""Operator sets from 7 to 26: older ones are converted and stay right, newer ones stay where they are."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize, sites
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests.hand import RNG, f32, ops

W, BIAS = f32(RNG.standard_normal((8, 6))), f32(RNG.standard_normal(6))
# The softmax of these operator sets runs over all axes from the second on.
OLD = """(float[B,S,8] x) => (float[B,S,6] y) {a=MatMul(x,w) z=Add(a,b) d=Dropout(z)
p=Softmax(d) u=Unsqueeze<axes=[1]>(p) v=Squeeze<axes=[1]>(u) m=ReduceMean<axes=[2],keepdims=1>(v) y=Sub(v,m)}"""
THREE = "float[b,s,32] q, float[b,s,32] k, float[b,s,32] v"


def parse(opset: int, text: str, **constants: np.ndarray) -> Graph:
    m = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["":{opset}]> old {text}')
    m.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    return Graph(ir.from_proto(m))


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_old_operator_sets_keep_their_meaning(opset):
    g = parse(opset, OLD, w=W, b=BIAS)
    canonicalize(g)
    assert g.opset == 23
    assert ops(g)["Dropout"] == ops(g)["Squeeze"] == 0
    x = f32(RNG.standard_normal((2, 3, 8)))
    e = np.exp(x @ W + BIAS)
    p = e / e.sum((1, 2), keepdims=True)
    with Session(g) as s:
        np.testing.assert_allclose(s.run({"x": x})["y"], p - p.mean(-1, keepdims=True), atol=1e-6)


def test_what_cannot_be_converted_is_one_clear_error():
    with pytest.raises(ModelError, match="cannot be converted from opset 5 to 23") as caught:
        canonicalize(parse(5, OLD, w=W, b=BIAS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opset", [24, 25, 26])
def test_newer_operator_sets_stay(opset):
    g = parse(opset, f"({THREE}) => (float[b,s,32] y) {{y=Attention<q_num_heads=4,kv_num_heads=4>(q,k,v)}}")
    canonicalize(g)
    assert (g.opset, next(g.nodes("Attention")).attributes.get_float("scale")) == (opset, pytest.approx(8**-0.5))
    g = parse(opset, "(float[b,8] x) => (float[b,6] y) {y=Gemm(x,w)}", w=W)
    canonicalize(g)
    assert (g.opset, ops(g)) == (opset, {"MatMul": 1})


def test_attention_with_newer_inputs_is_left_with_a_reason():
    body = "y=Attention<q_num_heads=4,kv_num_heads=4,is_causal=1>(q,k,v,,,,n)"
    g = parse(24, f"({THREE}, int64[b] n) => (float[b,s,32] y) {{{body}}}")
    canonicalize(g)
    assert g.edits == 0
    assert [d.why for d in g.declined] == ["attention: it has inputs or attributes of an operator set above 23"]
    assert not list(sites(g))
