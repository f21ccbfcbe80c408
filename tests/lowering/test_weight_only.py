"""Products with codes of few bits against their numpy decoding, and which of them have a kernel."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.engine.manager import PassManager
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering.forms import KINDS, Context, legal
from onnxcomp.lowering.forms.weight_only import bits_in_use, pack
from onnxcomp.maths import formats
from onnxcomp.passes.lower import Lower
from onnxcomp.runtime.integer import dequantized_weights
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import hand, tiny

KIND = KINDS["weight-only"]
MEANT = ("MatMulNBits", "MatMulNBits, bias behind")  # with inputs of 8 bits


def linear(bits=4, block=32, k=80, n=48, symmetric=False, bias=True, **options) -> tuple[Graph, np.ndarray, np.ndarray]:
    """`x W + b` with the weight in codes, the weight that they stand for, and rows of inputs."""
    rng = np.random.default_rng(0)
    g = hand.graph(opset=21, x=("r", k))
    fmt = formats.FORMATS[f"{'' if symmetric else 'u'}int{8 if bits == 8 else 4}"].narrowed(bits)
    w = rng.standard_normal((k, n)).astype(np.float32) + (0 if symmetric else 0.3)
    q = formats.fit(w, fmt, axis=0 if block else 1, block=block, symmetric=symmetric)
    zero = [] if symmetric else [g.constant(q.zero, "zero")]
    args = [g.constant(q.codes, "codes"), g.constant(q.scale, "scale"), *zero]
    d = g.op("DequantizeLinear", *args, axis=q.axis, block_size=block or None)
    d.shape, d.type = ir.Shape([k, n]), ir.TensorType(ir.DataType.FLOAT)
    y = g.op("MatMul", g.inputs[0], d, name="product")
    y = g.op("Add", y, rng.standard_normal(n).astype(np.float32)) if bias else y
    g = tiny.finish(g, y, "y", ["r", n])
    return g, q.array(), rng.standard_normal((7, k)).astype(np.float32)


def run(g: Graph, x: np.ndarray) -> np.ndarray:
    with Session(g) as s:
        return s.run({"x": x})[s.outputs[0]].astype(np.float64)


def names(g: Graph, target=CPU, **options) -> set[str]:
    (spot,) = KIND.find(g)
    return set(legal(Context(g, target, **options), spot, standard=False, approximate=False))


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Inputs in blocks of 8 bits, symmetric, as products of accuracy level 4 round them."""
    blocks_ = np.pad(x, [(0, 0), (0, -x.shape[1] % block)]).reshape(len(x), -1, block)
    s = np.abs(blocks_).max(axis=2, keepdims=True) / 127
    return (np.rint(blocks_ / s) * s).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("form", [f.name for f in KIND.forms if f.name != "Q/DQ"])
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 16), (8, 128), (4, 16), (4, 32), (3, 32), (2, 32), (2, 64)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_product_is_that_with_the_decoded_weight(form, bits, block, symmetric):
    g, w, x = linear(bits, block, symmetric=symmetric)
    if form not in names(g):
        assert (form, bits in (3, 4)) == ("MatMulNBits in float", False)
        return
    (spot,) = KIND.find(g)
    bias = g.array(spot.data.linear.bias)
    KIND.form(form).rewrite(Context(g, CPU), spot)
    g.sweep()
    [node] = g.nodes("MatMulNBits")
    assert node.attributes["bits"].value == (4 if bits == 3 else bits)
    assert len(list(g.nodes())) == (2 if form.endswith("behind") else 1)
    given = x if form == "MatMulNBits in float" else rounded(x, block or 128)
    want = given.astype(np.float64) @ w + bias
    assert np.abs(run(g, x) - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_with_codes_is_what_the_runtime_makes_of_q_dq(bits):
    g, _, x = linear(bits, 32)
    want = run(g, x)
    made = PassManager([Lower()]).run(g).model
    assert [n.op_type for n in made.nodes()] == ["MatMulNBits"]
    assert np.abs(run(made, x) - want).max() <= 3e-6 * np.abs(want).max()


def test_what_has_no_kernel_is_refused_by_name():
    (spot,) = KIND.find(linear(2, 16)[0])
    why = KIND.form("MatMulNBits").why_not(Context(Graph, CPU), spot, standard=False, approximate=False)
    assert why == "'cpu' multiplies 2-bit codes fast in blocks of 32 or 64 or 128, not of 16"
    assert names(linear(4, 32)[0]) == {*MEANT, "MatMulNBits in float", "Q/DQ"}
    assert names(linear(8, 32)[0]) == {*MEANT, "Q/DQ"}
    assert names(linear(2, 32)[0]) == {*MEANT}
    assert names(linear(4, 32)[0], inputs="float") == {"MatMulNBits in float"}
    assert names(linear(8, 32)[0], inputs="float") == set()
    assert names(linear(4, 32)[0], inputs="int8") == {*MEANT, "Q/DQ"}
    assert names(linear(4, 32)[0], CUDA) == set()  # zero points
    assert names(linear(4, 32, symmetric=True)[0], CUDA) == {*MEANT, "MatMulNBits in float", "Q/DQ"}
    assert names(linear(4, 64, symmetric=True)[0], CUDA) == set()
    assert names(linear(4, 64, symmetric=True)[0], TENSORRT) == {"Q/DQ"}
    lacking = dataclasses.replace(CPU, contrib=())
    assert names(linear(4, 32)[0], lacking) == {"Q/DQ"}


def test_bits_in_use_are_those_of_codes_and_zero_points():
    for bits, symmetric in ((2, False), (2, True), (4, False), (8, True)):
        g, _, _ = linear(bits, 32, symmetric=symmetric, k=256)
        (x,) = blocks.linears(g)
        assert bits_in_use(g, x.dequantize) == bits
    g, _, _ = linear(2, 32, k=256)
    (x,) = blocks.linears(g)
    zero = g.array(x.dequantize.inputs[2]).copy()
    zero[-1, -1] = 4
    g.put(x.dequantize.inputs[2], zero)
    assert bits_in_use(g, x.dequantize) == 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_low_bits_first(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 13))
    bytes_ = np.unpackbits(pack(codes, bits), axis=1, bitorder="little")
    values = bytes_[:, : 13 * bits].reshape(3, 13, bits) @ (1 << np.arange(bits))
    assert np.array_equal(values, codes)


def broken(g: Graph, **attrs) -> list[str]:
    """Names of weights that the check without a clock finds, with other attributes."""
    made = PassManager([Lower()]).run(g).model
    for node in made.nodes("MatMulNBits"):
        made.set_attr(node, **attrs)
    return dequantized_weights(made.model)


def test_the_check_without_a_clock_knows_products_without_a_kernel(tmp_path):
    assert broken(linear(4)[0]) == broken(linear(4)[0], accuracy_level=0) == broken(linear(2)[0]) == []
    assert broken(linear(8)[0], accuracy_level=0) == ["codes_packed"]
    assert broken(linear(2)[0], accuracy_level=1) == ["codes_packed"]
    assert broken(linear(2)[0], block_size=16) == ["codes_packed"]
    made = PassManager([Lower()]).run(linear(4)[0]).model
    (node,) = made.nodes("MatMulNBits")
    made.set_input(node, 3, made.constant(np.zeros((48, 3), np.float32), "float_zeros"))
    assert dequantized_weights(made.model) == ["codes_packed"]
    storage.save(PassManager([Lower()]).run(linear(8)[0]).model, tmp_path / "model.onnx")
    found = integer_check(tmp_path / "model.onnx")
    assert (found.quantized_linears, found.integer_products, found.ok) == (1, 1, True)
