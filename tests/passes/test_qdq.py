"""`qdq` against a numpy formula, and what its options do to the graph."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.maths import saturation
from onnxcomp.methods.quantize import payoff
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.integer import saturating
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU_AVX2, CPU_VNNI
from tests import tiny


def feeds(g, count=6):
    return [tiny.feeds(g, 2, 9, seed=i) for i in range(count)]


def quantized(g, *passes):
    return PassManager(passes).run(g, as_dataset(feeds(g), g)).model


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("passes", [(), (Lower(),), (Lower(standard=True),)])
def test_one_linear_equals_the_formula(weights, passes):
    g = tiny.linear(64, 48)
    model = quantized(g, Qdq(weights=weights), *passes)
    constants = {v.name: model.array(v) for v in model.model.graph.initializers.values()}
    scale, zero = constants["x_scale"], constants["x_zero"]
    codes, steps = (next(a for n, a in constants.items() if n.endswith(e)) for e in ("_int8", "weight_scale"))
    bias = g.array(blocks.linears(g)[0].bias)
    for batch in feeds(g, 3):
        x = batch["x"].astype(np.float64)
        q = np.clip(np.rint(batch["x"] / scale) + zero, 0, 255).astype(np.float64)
        want = ((q - zero) * float(scale)) @ (codes.astype(np.float64) * steps) + bias
        with Session(model) as s:
            got = s.run(batch)["y"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        error = np.abs(want - (x @ g.array(blocks.linears(g)[0].weight) + bias)).max()
        assert error < (0.05 if weights == "channel" else 0.1) * np.abs(want).max()


def test_siblings_share_one_pair():
    g = tiny.encoder(layers=2)
    model = quantized(g, Qdq(min_size=1))
    inputs = {x.source.name for x in blocks.linears(g)}
    assert len(list(model.nodes("QuantizeLinear"))) == len(inputs) == 8
    assert sum(x.quantized for x in blocks.linears(model)) == 12


def test_clip_rules_give_nested_ranges():
    g = tiny.linear(64, 64)
    rng = np.random.default_rng(0)
    data = as_dataset([{"x": rng.standard_t(3, (4, 16, 64)).astype(np.float32)} for _ in range(8)], g)

    def scale(**options):
        model = PassManager([Qdq(**options)]).run(g, data).model
        return float(model.array(model.value("x_scale")))

    widest = scale(clip="minmax")
    assert scale(clip="mse") < widest
    assert scale(clip="entropy") < widest
    assert scale(clip="percentile", percentile=99) < scale(clip="percentile", percentile=99.9) < widest


def test_outputs_are_quantized_on_request_and_still_integer():
    g = tiny.encoder(layers=1)
    plain, both = (quantized(g, Qdq(min_size=1, outputs=o), Lower()) for o in (False, True))
    assert len(list(both.nodes("QuantizeLinear"))) > len(list(plain.nodes("QuantizeLinear")))
    assert integer_check(both).ok


def test_symmetric_activations_have_the_zero_point_in_the_middle():
    model = quantized(tiny.linear(64, 64), Qdq(symmetric=True))
    assert int(model.array(model.value("x_zero"))) == 128


def test_signed_activations_are_refused_on_the_cpu_with_the_reason():
    with pytest.raises(TargetError, match="not fused"):
        quantized(tiny.linear(64, 64), Qdq(activations="s8"))


def test_layers_that_share_a_weight_share_its_codes():
    g = tiny.encoder(layers=2)
    first, second = (a.q for a in blocks.attentions(g))
    g.set_input(second.node, 1, first.weight)
    model = quantized(g, Qdq(min_size=1))
    one, other = (a.q for a in blocks.attentions(model))
    assert one.weight is other.weight
    assert one.weight.dtype == ir.DataType.INT8


# ---- embedding tables ------------------------------------------------------------------------------------------------

QUANTIZERS = [Qdq(min_size=1, embeddings=True), DynamicQuant(min_size=1, embeddings=True)]


def tables(g):
    return {e.kind: g.tensor(e.table).dtype for e in blocks.embeddings(g)}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda p: p.name)
@pytest.mark.parametrize("passes", [(), (Lower(),), (Lower(standard=True),)], ids=["unlowered", "lowered", "standard"])
def test_tables_are_stored_as_int8_and_read_by_row(quantizer, passes):
    g = tiny.encoder(layers=1)
    plain = dataclasses.replace(quantizer, embeddings=False)
    base, model = quantized(g, plain, *passes), quantized(g, quantizer, *passes)
    elements = sum(e.rows * e.width for e in blocks.embeddings(g))
    rows = sum(e.rows for e in blocks.embeddings(g))
    assert base.nbytes - model.nbytes == 3 * elements - 4 * rows
    floats = {v.name for v in model.model.graph.initializers.values() if v.dtype is ir.DataType.FLOAT}
    assert not {str(e.table.name) for e in blocks.embeddings(g)} & floats
    for batch in feeds(g, 3):
        want, got = (Session(m).run(batch)["last_hidden_state"] for m in (base, model))
        assert 20 * np.log10(np.linalg.norm(want) / np.linalg.norm(want - got)) > 35


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda p: p.name)
@pytest.mark.parametrize("passes", [(), (Lower(),)], ids=["unlowered", "lowered"])
def test_a_head_shares_the_codes_of_its_table(quantizer, passes):
    g = tiny.decoder(tied=True)
    model = quantized(g, quantizer, *passes)
    (table,) = (e for e in blocks.embeddings(g) if e.kind == "tokens")
    whole = [
        t for t in map(model.tensor, model.model.graph.initializers.values()) if t.size == table.rows * table.width
    ]
    assert [t.dtype for t in whole] == [ir.DataType.INT8]
    assert tuple(whole[0].shape) == (table.rows, table.width)
    assert integer_check(model).ok or not passes
    assert blocks.head(model) is None or blocks.head(model).tied
    for batch in feeds(g, 3):
        want, got = (Session(m).run(batch)["logits"] for m in (g, model))
        assert 20 * np.log10(np.linalg.norm(want) / np.linalg.norm(want - got)) > 25


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda p: p.name)
def test_a_table_that_its_head_reads_as_float_stays(quantizer):
    g = tiny.decoder(tied=True)
    head = blocks.head(g)
    skipping = dataclasses.replace(quantizer, skip=(str(head.node.name), "nothing*"))
    result = PassManager([skipping]).run(g, as_dataset(feeds(g), g))
    assert tables(result.model)["tokens"] is ir.DataType.FLOAT
    why = {d.site: d.why for d in result.report.steps[0].declined}
    assert any("reads the table as float" in text for text in why.values())
    assert "matches no linear" in why["skip: nothing*"]
    assert [w for w in result.report.warnings if w.startswith(f"{quantizer.name}: skip: nothing*")]


def test_a_pattern_keeps_a_table_in_float():
    g = tiny.encoder(layers=1)
    tokens, *_ = (e for e in blocks.embeddings(g) if e.kind == "tokens")
    pattern = str(tokens.table.name)
    result = PassManager([Qdq(min_size=1, embeddings=True, skip=(pattern,))]).run(g, as_dataset(feeds(g), g))
    assert tables(result.model)["tokens"] is ir.DataType.FLOAT
    assert tables(result.model)["positions"] is ir.DataType.INT8
    assert [d.why for d in result.report.steps[0].declined] == [f"skipped by the pattern '{pattern}'"]


def test_size_first_quantizes_what_gets_slower(monkeypatch):
    monkeypatch.setattr(payoff, "loses", lambda *a, **k: "slower")
    g = tiny.encoder(layers=1)
    for cls in (Qdq, DynamicQuant):
        first, last = (
            PassManager([cls(min_size=1, only_faster=only)], allow_unchanged=True).run(g, as_dataset(feeds(g), g))
            for only in (True, False)
        )
        assert (first.report.steps[0].changed, last.report.steps[0].changed) == (0, len(blocks.linears(g)))


# ---- weights that are codes already ----------------------------------------------------------------------------------


def passed(g, *passes):
    return PassManager(passes, target=CPU_AVX2).run(g, as_dataset(feeds(g), g))


@pytest.mark.parametrize("lowered", [(), (Lower(),)], ids=["unlowered", "lowered"])
def test_codes_that_are_there_are_taken(lowered):
    g = tiny.encoder(layers=1)
    weights = QuantizeWeights(bits=8, block="channel", min_size=1, method="gptq", damp=1.0)
    coded = passed(g, weights).model
    result = passed(coded, Qdq(min_size=1), *lowered)
    assert result.report.step("qdq").changed == 6
    for v in coded.model.graph.initializers.values():
        if v.dtype is ir.DataType.INT8:
            assert not saturation.breaks(coded.array(v)).any()
            assert np.array_equal(result.model.array(result.model.value(v.name)), coded.array(v))
    found = integer_check(result.model)
    assert (found.integer_products, found.dequantized_weights, found.ok) == (6, 0, True)
    assert not saturating(result.model.model)


def test_codes_that_products_cannot_take_are_declined_by_reason():
    g = tiny.encoder(layers=1)
    kept = tuple(x.name for x in blocks.linears(g)[:2])
    half = passed(g, QuantizeWeights(bits=4, min_size=1, skip=kept, method="nearest")).model
    step = passed(half, Qdq(min_size=1)).report.step("qdq")
    assert (step.eligible, step.changed) == (6, 2)
    assert {d.why for d in step.declined} == {
        "integer products take 8-bit codes with one scale for each out-channel (block: channel), not its codes"
    }
    free = PassManager([QuantizeWeights(bits=8, block="channel", min_size=1, method="nearest")], target=CPU_VNNI)
    model = free.run(g, None).model
    why = {
        d.why
        for d in PassManager([Qdq(min_size=1)], target=CPU_AVX2, allow_unchanged=True)
        .run(model, as_dataset(feeds(g), g))
        .report.step("qdq")
        .declined
    }
    assert why == {"pairs of its codes could saturate on this target; make them for it"}


def test_a_scale_per_channel_is_of_eight_bits():
    with pytest.raises(RecipeError, match="with 'block: channel' products run in 8 bits only; say bits: 8"):
        passed(tiny.encoder(layers=1), QuantizeWeights(block="channel"))


def test_channels_without_weights_are_left_out_of_ranges():
    g = tiny.encoder(layers=1)
    source = blocks.linears(g)[0].source
    for x in blocks.linears(g):
        if x.source is source:
            w = g.array(x.weight).copy()
            w[7] = 0
            g.put(x.weight, w)
    norm = next(n for n in blocks.norms(g) if n.output is source)
    base = quantized(g, Qdq(min_size=1))
    g.scale(norm.gain, np.where(np.arange(32) == 7, 500.0, 1.0), -1)
    wide = quantized(g, Qdq(min_size=1))
    name = f"{source.name}_scale"
    assert base.array(base.value(name)) == wide.array(wide.value(name))
