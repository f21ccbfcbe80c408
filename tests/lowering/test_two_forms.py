"""Int8 products for many rows beside those with codes for few: against numpy, and where there are none."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.graph import Graph
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.lowering.two_forms import ROWS, add_int8_form
from onnxcomp.machine import size_text
from onnxcomp.maths import formats
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.generation import Decoder
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, CPU_AVX2, CUDA
from tests import tiny
from tests.hand import f32, graph
from tests.lowering.test_grouped_decoder import CONTEXT, WORDS, decoder, scores

RNG = np.random.default_rng(5)
TABLE = f32(RNG.standard_normal((20, 80)) * np.exp(RNG.standard_normal((20, 1))))  # rows of very different size
TABLE[3] = 0


def product(bits: int, symmetric: bool, bias: bool, block: int = 32) -> tuple[Graph, np.ndarray, np.ndarray]:
    """Tokens, looked up and multiplied by codes; with the weight that these stand for, and the bias."""
    k, n = TABLE.shape[1], 24
    g = graph(21, input_ids=("b", "s", int))
    fmt = formats.FORMATS[f"{'' if symmetric else 'u'}int{8 if bits == 8 else 4}"].narrowed(bits)
    w = f32(RNG.standard_normal((k, n)) + 0.3)
    q = formats.fit(w, fmt, axis=0, block=block, symmetric=symmetric)
    zero = [] if symmetric else [g.constant(q.zero, "zero")]
    d = g.op(
        "DequantizeLinear", g.constant(q.codes, "codes"), g.constant(q.scale, "scale"), *zero, axis=0, block_size=block
    )
    d.shape, d.type = ir.Shape([k, n]), ir.TensorType(ir.DataType.FLOAT)
    x = g.op("Gather", TABLE, g.inputs[0])
    x.shape, x.type = ir.Shape(["b", "s", k]), ir.TensorType(ir.DataType.FLOAT)
    b = f32(RNG.standard_normal(n)) if bias else np.zeros(n, np.float32)
    y = g.op("MatMul", x, d, name="product")
    y = g.op("Add", y, b) if bias else y
    return tiny.finish(g, y, "y", ["b", "s", n]), q.array(), b


def lowered(g: Graph, target=CPU, **options) -> Graph:
    return PassManager([Lower(**options)], target=target, measure=False).run(g).model


def run(g: Graph, ids: np.ndarray) -> np.ndarray:
    with Session(g) as s:
        return s.run({"input_ids": ids})["y"]


def rounded(x: np.ndarray, w: np.ndarray, largest: int) -> np.ndarray:
    """The product with rows of `x` and columns of `w` rounded to int8; in float32, as ties are common in codes."""
    a = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    b = np.abs(w).max(0, keepdims=True) / np.float32(largest)
    return (np.rint(x / a).astype(np.float64) @ np.rint(w / b).astype(np.float64)) * a * b


@pytest.mark.parametrize(
    ("bits", "symmetric", "bias"), [(4, True, False), (4, False, True), (8, True, True), (2, False, False)]
)
def test_many_rows_are_int8_and_few_as_before(bits: int, symmetric: bool, bias: bool) -> None:
    g, w, b = product(bits, symmetric, bias)
    plain, both = lowered(g.clone()), lowered(g.clone(), prefill="int8")
    assert [n.op_type for n in both.nodes("If", "MatMulNBits")] == ["If"]
    ids = RNG.integers(0, 20, (2, ROWS // 2))
    np.testing.assert_array_equal(run(both, ids), run(plain, ids))
    ids = np.append(RNG.integers(0, 20, (1, ROWS)), [[3]], axis=1)
    want = rounded(TABLE[ids], w, 127) + b
    np.testing.assert_allclose(run(both, ids), want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - (TABLE[ids] @ w + b)).max() > 1e-3  # it is not the float product


def test_sums_that_saturate_get_half_of_the_codes() -> None:
    g, w, _ = product(4, True, False)
    both = lowered(g, CPU_AVX2, prefill="int8")
    codes = [v.const_value.numpy() for v in both.model.graph.initializers.values() if v.dtype is ir.DataType.INT8]
    assert [int(np.abs(c.astype(int)).max()) for c in codes] == [64]
    ids = RNG.integers(0, 20, (1, 12))
    np.testing.assert_allclose(run(both, ids), rounded(TABLE[ids], w, 64), rtol=1e-3, atol=1e-3)


def quantized(**options) -> Graph:
    """A decoder with caches whose products have codes of 4 bits."""
    passes = [QuantizeWeights(method="nearest", min_size=1, block=16), Lower(**options)]
    return PassManager(passes, measure=False).run(decoder()).model


def test_attentions_and_caches_stay_outside() -> None:
    plain, both = quantized(), quantized(prefill="int8")
    assert len(list(both.nodes("Attention"))) == 1
    assert len(list(both.nodes("If"))) == 2  # before it and behind it
    tokens = RNG.integers(0, WORDS, (1, 12))
    texts = []
    for g in (plain, both):
        with Decoder(g) as d:
            texts.append([d.read(tokens[:, :5]), d.read(tokens[:, 5:6]), d.read(tokens[:, 6:])])
    for a, b in zip(*texts, strict=True):
        np.testing.assert_array_equal(a, b)  # at most 8 rows
    moved = [np.abs(a - b).max() / np.abs(a).max() for a, b in zip(scores(plain), scores(both), strict=True)]
    assert 0 < moved[0] < 0.05  # 12 rows
    grouped = both.clone()
    assert group_attentions(grouped, CONTEXT) == ""
    for a, b in zip(scores(both), scores(grouped), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)


def test_the_bytes_are_said() -> None:
    passes = [QuantizeWeights(method="nearest", min_size=1, block=16), Lower(prefill="int8")]
    result = PassManager(passes, measure=False).run(decoder())
    (said,) = [n.what for n in result.report.steps[-1].noted]
    more = result.model.nbytes - quantized().nbytes
    assert more > 256 * 32
    assert said == f"2 products have an int8 form for more than 8 tokens: {size_text(more)} more"


def test_what_has_no_int8_form_says_why() -> None:
    assert add_int8_form(decoder()) == "it has no products with codes of few bits"
    g = graph(21, x=("r", 32))
    y = g.op(
        "MatMulNBits",
        g.inputs[0],
        np.zeros((8, 1, 16), np.uint8),
        f32(np.ones((8, 1))),
        domain="com.microsoft",
        K=32,
        N=8,
        bits=4,
        block_size=32,
    )
    assert "no input is tokens" in add_int8_form(tiny.finish(g, y, "y", ["r", 8]))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(RecipeError, match="'prefill: int8' has no form of standard operators"):
        Lower(prefill="int8", standard=True).require(CPU)
    with pytest.raises(TargetError, match="'cuda' has no int8 products for 'prefill: int8'"):
        Lower(prefill="int8").require(CUDA)
    assert Lower(prefill="int8").require(dataclasses.replace(CPU, name="mine")) is None


def test_what_only_a_removed_branch_reads_is_removed() -> None:
    g = quantized(prefill="int8")
    g.model.graph.outputs[:] = [v for v in g.outputs if v.name != "logits"][:1]
    g.sweep()
    assert [n.op_type for n in g.nodes("If", "Attention")] == ["If", "Attention"]
    g.model.graph.outputs[:] = [g.inputs[0]]
    g.sweep()
    assert list(g.nodes()) == []
