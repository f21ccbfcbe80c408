"""`quantize-weights` against a numpy formula, by its laws, and in the form that the runtime multiplies by."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError, ModelError, TargetError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import tensorrt
from onnxcomp.maths import formats
from onnxcomp.methods.quantize import weight_rounding
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny

SMALL = {"min_size": 1, "block": 16}


def feeds(g: Graph, seeds=range(12)) -> list[dict[str, np.ndarray]]:
    return [tiny.feeds(g, 4, 9, seed=i) for i in seeds]


def quantized(g: Graph, **options):
    data = None if options.get("method") == "nearest" else as_dataset(feeds(g), g)
    return PassManager([QuantizeWeights(**{**SMALL, **options})]).run(g, data, data)


def outputs(g: Graph, batches, **options) -> list[np.ndarray]:
    """Outputs as the graph says; the runtime's own products round their inputs to 8 bits."""
    with Session(g, optimized=False, **options) as s:
        return [s.run(b)[s.outputs[0]].astype(np.float64) for b in batches]


def in_float(g: Graph) -> Graph:
    """The model with every weight replaced by what its codes stand for."""
    plain = g.clone()
    for x in blocks.linears(plain):
        codes, scale, *zeros = (plain.array(v).astype(np.float64) for v in x.dequantize.inputs)
        size = x.dequantize.attributes.get_int("block_size", 0)
        scale, zero = (
            np.repeat(a, size, axis=0)[: len(codes)] if size else a for a in (scale, *(zeros or [0 * scale]))
        )
        plain.set_input(x.node, 1, plain.constant(((codes - zero) * scale).astype(np.float32), "numbers"))
    return plain


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return float(sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)) / sum((y**2).sum() for y in b))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_are_with_what_the_codes_stand_for(bits, symmetric):
    g = tiny.encoder(hidden=48, ffn=80)  # 80 in-channels are no whole number of blocks of 32
    model = quantized(g, bits=bits, symmetric=symmetric, block=32).model
    assert sum(x.quantized for x in blocks.linears(model)) == len(blocks.linears(g)) == 12
    for x in blocks.linears(model):
        codes = model.tensor(x.weight)
        assert codes.dtype.name == f"{'' if symmetric else 'U'}INT{8 if bits == 8 else 4}"
        assert np.ptp(codes.numpy().astype(np.int32)) < 2**bits
        assert tuple(model.tensor(x.dequantize.inputs[1]).shape.numpy()) == (-(-x.sizes[0] // 32), x.sizes[1])
    batches = feeds(g, range(50, 53))
    assert distance(outputs(model, batches), outputs(in_float(model), batches)) < 1e-10


def test_one_linear_is_rounded_to_nearest_without_data():
    g = tiny.linear(64, 48)
    result = quantized(g, method="nearest", bits=4, block=32)
    w = g.array(blocks.linears(g)[0].weight)
    want = formats.fit(w, "uint4", axis=0, block=32, symmetric=False, mse=True)
    [x] = blocks.linears(result.model)
    assert np.array_equal(result.model.array(x.weight), want.codes)
    assert np.array_equal(result.model.array(x.dequantize.inputs[1]), want.scale)


@pytest.mark.parametrize(("bits", "build"), [(4, tiny.encoder), (3, tiny.decoder)])
def test_fitted_codes_come_nearer_to_the_original_on_other_data(build, bits):
    g = build(layers=3, hidden=64, ffn=128)
    batches = feeds(g, range(100, 110))
    want = outputs(g, batches)
    far = {m: distance(outputs(quantized(g, bits=bits, method=m).model, batches), want) for m in ("nearest", "gptq")}
    near = distance(outputs(quantized(g, bits=bits).model, batches), want)
    assert far["gptq"] < 0.9 * far["nearest"]
    assert near < 0.97 * far["gptq"]


def test_biases_take_what_rounding_does_to_the_means():
    g = tiny.encoder(layers=1, hidden=64, ffn=128)
    batches = feeds(g)
    taps = [str(x.output.name) for x in blocks.linears(g)]

    def means(model: Graph) -> list[np.ndarray]:
        with Session(model, taps=taps) as s:  # with the runtime's products, as in calibration
            runs = [s.run(b) for b in batches]
        return [np.concatenate([r[t].reshape(-1, r[t].shape[-1]) for r in runs]).mean(axis=0) for t in taps]

    want = means(g)
    kept, moved = (means(quantized(g, bits=3, bias=b, augment=False).model) for b in (True, False))
    for name, a, b, c in zip(taps, kept, moved, want, strict=True):
        assert np.abs(a - c).max() < 0.15 * np.abs(b - c).max(), name  # inputs are rounded to 8 bits meanwhile


def test_a_shared_weight_has_one_set_of_codes_and_keeps_its_biases():
    g = tiny.encoder(layers=1)
    first, second = [x for x in blocks.linears(g) if x.sizes == (32, 32)][:2]
    g.set_input(second.node, 1, first.weight)
    g.sweep()
    model = quantized(g).model
    found = {x.name: x for x in blocks.linears(model)}
    assert found[first.name].weight is found[second.name].weight
    for x in (first, second):
        assert np.array_equal(model.array(found[x.name].bias), g.array(x.bias))


def test_a_tied_head_goes_with_its_table():
    g = tiny.decoder(hidden=64, ffn=128, tied=True, vocabulary=200)
    [head] = quantized(g).report.step("quantize-weights").declined
    assert head.why == "it shares the embedding table, which stays float without embeddings: true"
    model = quantized(g, embeddings=True).model
    tables = [v for v in model.model.graph.initializers.values() if tuple(v.shape) == (200, 64)]
    assert [v.dtype for v in tables] == [ir.DataType.UINT8]
    batches = feeds(g, range(60, 62))
    assert distance(outputs(model, batches), outputs(g, batches)) < 0.05


@pytest.mark.parametrize(("bits", "limit"), [(8, 2e-4), (4, 2e-2)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_table_is_stored_once_for_look_ups_and_the_head(bits, limit, symmetric):
    g = tiny.decoder(hidden=64, ffn=128, tied=True, vocabulary=200)
    options = {"embeddings": bits, "skip": ("*layers*",), "symmetric": symmetric, "method": "nearest", "block": 32}
    before = quantized(g, **options).model
    after = PassManager([QuantizeWeights(**{**SMALL, **options}), Lower()]).run(g).model
    batches = feeds(g, range(60, 62))
    assert 0 < distance(outputs(before, batches), outputs(g, batches)) < limit
    with Session(before, optimized=False) as a, Session(after) as b:  # which rounds inputs of the head to 8 bits
        x, y = ([s.run(f)[s.outputs[0]] for f in batches] for s in (a, b))
    assert distance(x, y) < 1e-4
    used = [v for v in after.model.graph.initializers.values() if 200 in v.shape[:1] and v.const_value.nbytes > 3200]
    assert [(v.dtype, tuple(v.shape)) for v in used] == [(ir.DataType.UINT8, (200, 64 * bits // 8))]
    [product] = after.nodes("MatMulNBits")
    assert product.attributes["bits"].value == bits


def test_a_head_of_its_own_has_its_own_bits():
    g = tiny.decoder(hidden=64, ffn=128, vocabulary=200)
    head = blocks.head(g)

    def stored(**options) -> str:
        model = quantized(g, method="nearest", **options).model
        return next(model.tensor(x.weight).dtype.name for x in blocks.linears(model) if x.name == head.linear.name)

    assert [stored(head=h) for h in (8, 4, "float", None)] == ["UINT8", "UINT4", "FLOAT", "UINT4"]
    assert stored(head=4, bits=8) == "UINT4"
    tied = tiny.decoder(hidden=64, ffn=128, tied=True, vocabulary=200)
    model = quantized(tied, method="nearest", embeddings=4, head=8).model
    tables = [v.dtype for v in model.model.graph.initializers.values() if tuple(v.shape) == (200, 64)]
    assert tables == [ir.DataType.UINT8]


@pytest.mark.parametrize("count", [60, 200, 1000])
def test_fits_do_not_follow_small_sets_of_texts(count):
    """On other texts no worse than without data, with as few as twice as many tokens (540) as in-channels."""
    g = tiny.encoder(layers=1, hidden=64, ffn=256, vocabulary=500)
    texts = as_dataset([tiny.feeds(g, 60, 9, seed=0), *(tiny.feeds(g, 235, 9, seed=i) for i in range(1, 5))], g)
    texts = texts.head(count)
    assert len(texts) == count
    other = feeds(g, range(1000, 1010))
    want = outputs(g, other)
    options = {"bits": 3, "block": 32, "min_size": 1}
    fitted = PassManager([QuantizeWeights(**options)]).run(g, texts, texts.head(60)).model
    plain = PassManager([QuantizeWeights(**options, method="nearest")]).run(g).model
    assert distance(outputs(fitted, other), want) < distance(outputs(plain, other), want)


@pytest.mark.parametrize(
    ("target", "options", "why"),
    [
        (
            CPU,
            {"overrides": {"*": 2}, "block": 16},
            "on 'cpu' products with 2 bits run in blocks of 32 or 64 or 128, not of 16",
        ),
        (CPU, {"codes": "fp8"}, "'cpu' has no product with fp8 weights and would make them float at every run"),
        (TENSORRT, {"codes": "nvfp4"}, "'tensorrt' has no product with nvfp4 weights .*; it takes fp8"),
        (CUDA, {"block": 64}, "on 'cuda' products with 4 bits run in blocks of 32, not of 64"),
        (
            CUDA,
            {"block": 32, "symmetric": False},
            "on 'cuda' products run only without zero points; say symmetric: true",
        ),
        (TENSORRT, {"block": 32}, "on 'tensorrt' products with 4 bits run in blocks of 64 or 128, not of 32"),
    ],
)
def test_what_a_target_cannot_multiply_by_is_refused_by_name(target, options, why):
    p = QuantizeWeights(**{**SMALL, "method": "nearest", **options})
    with pytest.raises(TargetError, match=why):
        PassManager([p], target=target).run(tiny.encoder())


def test_targets_without_zero_points_get_symmetric_codes_and_floats_are_stored_per_channel():
    g = tiny.encoder(hidden=64, ffn=128)
    p = QuantizeWeights(**{**SMALL, "method": "nearest", "block": 32})
    for x in blocks.linears(PassManager([p], target=CUDA).run(g).model):
        assert x.weight.dtype is ir.DataType.INT4
        assert len(x.dequantize.inputs) == 2
    p = QuantizeWeights(codes="fp8", min_size=1)
    data = as_dataset(feeds(g), g)
    model = PassManager([p], target=TENSORRT).run(g, data, data).model
    for x in blocks.linears(model):
        assert x.weight.dtype is ir.DataType.FLOAT8E4M3FN
        assert model.array(x.dequantize.inputs[1]).shape == (x.sizes[1],)
    batches = feeds(g, range(50, 53))
    assert distance(outputs(model, batches), outputs(in_float(model), batches)) < 1e-10
    assert distance(outputs(model, batches), outputs(g, batches)) < 2e-3
    assert not [v for v in tensorrt.check(model) if v.rule not in ("opset", "direct", "scale-on-q")]


@pytest.mark.parametrize("method", ["weighted", "hqq"])
def test_every_method_comes_near(method):
    g = tiny.encoder(hidden=64, ffn=128)
    batches = feeds(g, range(100, 104))
    want = outputs(g, batches)
    near, plain = (distance(outputs(quantized(g, bits=3, method=m).model, batches), want) for m in (method, "nearest"))
    assert near < (0.95 if method == "weighted" else 2) * plain  # HQQ lets large weights err


def test_skipped_and_small_weights_are_named():
    g = tiny.encoder()
    step = quantized(g, skip=("*layers.0.*",), min_size=1025).report.step("quantize-weights")
    reasons = {d.why for d in step.declined}
    assert "skipped by the pattern '*layers.0.*'" in reasons
    assert "its 32x32 weight is smaller than min_size=1025: nothing to gain" in reasons
    assert step.changed == 2


def test_overrides_set_the_bits_of_sites_and_sites_may_be_rounded_by_name():
    g = tiny.encoder(hidden=64, ffn=128)
    options = {"block": 32, "overrides": {"*layers.0*up*": 8, "*layers.0*": "float", "*nowhere*": 8}}
    result = quantized(g, **options)
    weights = {x.name: str(x.weight.name) for x in blocks.linears(g)}
    for x in blocks.linears(result.model):
        kind, name = result.model.tensor(x.weight).dtype.name, weights[x.name]
        assert kind == ("UINT4" if "layers.0" not in name else "UINT8" if "up" in name else "FLOAT"), name
    reasons = {d.site: d.why for d in result.report.step("quantize-weights").declined}
    assert reasons.pop("overrides: *nowhere*") == "matches no linear that an earlier pattern left"
    assert set(reasons.values()) == {"stays float by the override '*layers.0*'"}


def test_old_operator_sets_and_missing_data_are_refused():
    with pytest.raises(ModelError, match="operator set 18 has no codes in blocks; put canonicalize first"):
        quantized(tiny.encoder(spelled="dynamo"), method="nearest")
    with pytest.raises(DataError, match="'quantize-weights' needs calibration data"):
        PassManager([QuantizeWeights()]).run(tiny.encoder(), None)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_runtime_multiplies_by_the_codes(tmp_path, bits, block):
    g = tiny.mlp(256, 512)
    model = quantized(g, method="nearest", bits=bits, block=block).model
    path = tmp_path / "model.onnx"
    storage.save(model, path)
    found = integer_check(path)
    assert (found.quantized_linears, found.integer_products, found.dequantized_weights, found.ok) == (2, 2, 0, True)
    assert path.stat().st_size < (0.4 if bits == 8 else 0.25) * 4 * 2 * 256 * 512


def test_wide_weights_are_fitted_in_parts(monkeypatch):
    """Out-channels are independent, so a head takes no more memory than a layer."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((32, 72)).astype(np.float32), rng.standard_normal((200, 32))
    then = x + 0.05 * rng.standard_normal(x.shape)
    inputs = weight_rounding.Inputs(x.T @ x, x.T @ then, x.mean(axis=0), then.mean(axis=0), 200.0)
    whole, gain = weight_rounding.rounded(w, inputs, True, weight_rounding.Method())
    monkeypatch.setattr(weight_rounding, "WIDEST", 32)
    parts, gains = weight_rounding.rounded(w, inputs, True, weight_rounding.Method())
    np.testing.assert_array_equal(parts.array(), whole.array())
    np.testing.assert_allclose(gains, gain, atol=1e-9)
    assert np.abs(gain).max() > 0
