"""Typed views: what they find on canonical graphs, behind Q/DQ, and on exported ones; the anatomy is stable JSON."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from tests import tiny, zoo


def exported(name: str) -> Graph:
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    return g


def quantize(g: Graph, linear: blocks.Linear) -> None:
    """Put Q/DQ on the input and the weight of a linear."""
    one, zero = np.array(0.1, np.float32), np.array(128, np.uint8)
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", linear.input, one, zero), one, zero)
    columns = linear.sizes[1]
    scale = np.full(columns, 0.01, np.float32)
    w = np.clip(np.round(g.array(linear.weight) / 0.01), -127, 127).astype(np.int8)
    g.set_input(linear.node, 0, x)
    g.set_input(linear.node, 1, g.op("DequantizeLinear", w, scale, np.zeros(columns, np.int8), axis=1))


# ---- linears ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_and_without_bias(bias):
    g = tiny.linear(8, 6, bias=bias)
    (x,) = blocks.linears(g)
    assert x.sizes == (8, 6)
    assert x.input is x.source is g.inputs[0]
    assert x.output is g.outputs[0]
    assert (x.bias is not None) == (x.add is not None) == bias
    assert not x.quantized
    assert x.site.nodes == tuple(n.name for n in g.nodes())


def test_linear_behind_quantization():
    g = tiny.mlp(bias=True)
    for x in blocks.linears(g):
        quantize(g, x)
    up, down = blocks.linears(g)
    assert up.quantized
    assert up.weight.dtype == ir.DataType.INT8
    assert up.source is g.inputs[0]
    assert up.input is not up.source
    assert down.output is g.outputs[0]
    assert up.bias is not None
    (mlp,) = blocks.mlps(g)
    assert (mlp.width, mlp.activation) == (16, "gelu")


def test_gemm_is_a_linear_unless_it_scales():
    g = tiny.linear(8, 6, bias=True, rank=2)
    x, (old,) = g.inputs[0], blocks.linears(g)
    turned = np.ascontiguousarray(g.array(old.weight).T)
    for attrs, found in (({}, 1), ({"alpha": 0.5}, 0), ({"transA": 1}, 0)):
        h = g.clone()
        y = h.op("Gemm", h.value(x.name), turned, h.value(old.bias.name), transB=1, **attrs)
        h.replace(h.outputs[0], y)
        h.sweep()
        linears = blocks.linears(h)
        assert len(linears) == found
        assert all(v.sizes == (8, 6) and v.transposed for v in linears)


def test_a_residual_addition_is_no_bias():
    g = tiny.encoder(layers=1, bias=False)
    assert all(x.bias is None for x in blocks.linears(g))


def test_siblings_read_one_input():
    g = tiny.decoder(layers=1)
    assert [len(s) for s in blocks.siblings(blocks.linears(g))] == [3, 1, 2, 1, 1]


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_of_an_encoder(norm):
    g = tiny.encoder(layers=3, norm=norm)
    layers = blocks.layers(g)
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert [layer.position for layer in layers] == [norm] * 3
    assert [len(layer.norms) for layer in layers] == [2, 2, 2]
    assert [len(layer.linears) for layer in layers] == [6, 6, 6]
    own = [n.name for layer in layers for n in layer.norms]
    assert len(own) == len(set(own)) == len(blocks.norms(g)) - (2 if norm == "pre" else 1)
    first = layers[0].attention
    assert first is not None
    assert (first.heads, first.kv_heads, first.head_dim, first.is_cross) == (4, 4, 8, False)
    assert first.q.source is first.k.source is first.v.source


def test_layers_of_a_decoder():
    g = tiny.decoder(layers=2, heads=4, kv_heads=2)
    for layer in blocks.layers(g):
        a, m = layer.attention, layer.mlp
        assert a is not None
        assert m is not None
        assert (a.heads, a.kv_heads, len(a.rotary)) == (4, 2, 2)
        assert [x.sizes for x in a.linears] == [(32, 32), (32, 16), (32, 16), (32, 32)]
        assert m.gate is not None
        assert (m.activation, m.width) == ("silu", 64)
        assert m.up.weight.name.endswith("up.weight")
        assert m.gate.weight.name.endswith("gate.weight")


def test_qwen3_norms_inside_attention():
    g = exported("qwen3.dynamo-sdpa-18")
    for layer in blocks.layers(g):
        assert layer.attention is not None
        assert len(layer.attention.inner_norms) == 2
        assert len(layer.norms) == 4
        assert layer.position == "pre"


def test_pooler_is_no_feed_forward_part():
    g = tiny.encoder(layers=1, classes=3)
    assert len(blocks.mlps(g)) == 1


def test_ends():
    g = tiny.encoder(classes=3)
    kinds = {e.kind: (e.rows, e.width) for e in blocks.embeddings(g)}
    assert kinds == {"tokens": (50, 32), "positions": (40, 32)}
    end = blocks.head(g)
    assert end is not None
    assert (end.outputs, end.tied) == (3, False)
    assert blocks.head(tiny.encoder()) is None


def test_tied_head_is_one_tensor():
    g = tiny.decoder(tied=True, spelled="dynamo")
    canonicalize(g)
    end = blocks.head(g)
    assert end is not None
    assert end.tied
    assert (end.outputs, end.weight.name) == (50, "embeddings.words")
    assert len(blocks.linears(g)) == 14
    shared = blocks.linears(g, tied=True)[-1]
    assert (shared.node, shared.weight, shared.transposed) == (end.node, end.weight, True)
    assert shared.sizes == (32, 50)


# ---- anatomy ---------------------------------------------------------------------------------------------------------


def test_anatomy_of_a_decoder_counts_everything_once():
    g = tiny.decoder(layers=2, hidden=32, heads=4, kv_heads=2, ffn=64)
    facts = describe(g)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["layers"], facts["hidden"], facts["vocabulary"]) == (2, 32, 50)
    assert facts["attention"]["kv_heads"] == 2
    assert facts["mlp"] == {"kind": "gated silu", "width": 64, "count": 2}
    assert facts["norm"] == {"kind": "rms", "position": "pre", "inside_attention": 0}
    assert facts["positions"] == "rotary"
    assert facts["parameters"]["attention"] == 2 * (2 * 32 * 32 + 2 * 32 * 16)
    assert facts["parameters"]["mlp"] == facts["macs_per_token"]["mlp"] == 2 * 3 * 32 * 64
    assert facts["parameters"]["total"] == sum(v.const_value.size for v in g.model.graph.initializers.values())
    assert facts["macs_per_token"]["attention_per_key"] == 2 * 2 * 32


def test_anatomy_is_the_same_for_every_export_of_a_model():
    found = []
    for name in ("bert.dynamo-sdpa-18", "bert.dynamo-eager-20", "bert.dynamo-sdpa-23", "bert.transformers-sdpa-18"):
        facts = describe(exported(name))
        parameters = facts.pop("parameters")
        del facts["nodes"], parameters["other"], parameters["total"]
        found.append(facts | parameters)
    assert all(f == found[0] for f in found)


def test_anatomy_says_what_was_not_recognised():
    g = tiny.decoder(spelled="dynamo")
    canonicalize(g, exact_rows=True)
    facts = describe(g)
    assert facts["attention"]["not_recognised"] == 2
    assert [set(x) for x in facts["not_recognised"]] == [{"site", "why"}] * 2


def test_a_table_that_fed_positions_index_is_one_of_positions():
    tables = ", ".join(
        f"float[{n}, 1] {k} = {{{','.join('1' * n)}}}" for k, n in [("words", 9), ("places", 8), ("kinds", 2)]
    )
    text = f"""<ir_version: 10, opset_import: ["": 18]>
    g (int64[b, s] input_ids, int64[b, s] position_ids, int64[b, s] token_type_ids) => (float[b, s, 1] y) <{tables}> {{
        w = Gather (words, input_ids)
        p = Gather (places, position_ids)
        k = Gather (kinds, token_type_ids)
        wp = Add (w, p)
        y = Add (wp, k)
    }}"""
    g = Graph(ir.from_proto(onnx.parser.parse_model(text)))
    assert [e.kind for e in blocks.embeddings(g)] == ["tokens", "positions", "types"]


@pytest.mark.parametrize("name", ["llama-cache.legacy-eager-17", "gpt2-cache.dynamo-sdpa-20"])
def test_the_mask_of_a_decoder_with_caches_is_named_by_more_keys_than_queries(name):
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    found = describe(g)
    assert [(s["kind"], s["attention"]["masks"]) for s in found["stacks"]] == [("decoder", "causal+padding")]
