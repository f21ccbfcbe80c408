"""Bytes of constants by the part that reads them and by element type."""

import numpy as np
import pytest

from onnxcomp.blocks.layers import layers
from onnxcomp.blocks.stored_parts import StoredPart, stored_parts
from onnxcomp.canonical import canonicalize
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from tests import tiny, zoo


def by_part(g):
    found: dict[tuple[str, str], int] = {(p.part, p.dtype): p.nbytes for p in stored_parts(g)}
    return found


def test_every_byte_of_a_constant_is_in_one_part():
    g = tiny.encoder()
    found = by_part(g)
    whole = {id(v.const_value): v.const_value.nbytes for v in g.model.graph.initializers.values()}
    assert sum(found.values()) == sum(whole.values())
    tables = [
        g.array(n.inputs[0]) for n in g.nodes("Gather") if g.is_constant(n.inputs[0]) and g.array(n.inputs[0]).ndim == 2
    ]
    assert found["embeddings", "float32"] == sum(t.nbytes for t in tables) > 0
    assert found["norms", "float32"] > 0


def test_integers_are_apart_from_what_stayed_float():
    g = tiny.encoder()
    result = PassManager([Canonicalize(), DynamicQuant(min_size=1), Lower()]).run(g).model
    before, after = by_part(g), by_part(result)
    for part in ("attention", "feed-forward"):
        assert after[part, "int8"] * 4 == before[part, "float32"] > 0
        assert (part, "float32") not in after
    assert after["embeddings", "float32"] == before["embeddings", "float32"]


def test_scales_of_codes_are_apart_from_what_stayed_float():
    g = tiny.encoder(hidden=64, ffn=128)
    before = by_part(g)
    result = PassManager([QuantizeWeights(method="nearest", min_size=1, block=16)]).run(g).model
    after = by_part(result)
    weights = before["attention", "float32"] + before["feed-forward", "float32"]
    assert after["attention", "uint4"] * 8 == before["attention", "float32"] > 0
    assert after["feed-forward", "uint4"] * 8 == before["feed-forward", "float32"] > 0
    assert after["scales", "float32"] * 16 == weights  # one for 16 weights
    assert after["scales", "uint4"] * 128 == weights
    assert after.get(("other", "float32"), 0) == before.get(("other", "float32"), 0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2", "t5", "vit", "gpt-neox", "falcon", "whisper"])
def test_products_are_told_apart_in_graphs_of_exporters_as_in_the_raised_ones(name):
    raw = Graph(zoo.load_graph(next(x for x in zoo.kept() if x.split(".")[0] == name)))
    raised = raw.clone()
    canonicalize(raised)
    found = by_part(raw)
    for part, views in (("attention", "attentions"), ("feed-forward", "mlps")):
        weights = {x.weight for layer in layers(raised) for p in getattr(layer, views) for x in p.linears}
        assert found[part, "float32"] == sum(v.const_value.nbytes for v in weights) > 0


def test_a_projection_behind_the_stream_is_the_head_and_a_model_without_attention_has_linears():
    decoder = by_part(tiny.decoder())
    assert decoder["head", "float32"] > 0
    assert {part for part, _ in by_part(tiny.mlp())} <= {"linears", "norms", "biases", "other"}


def test_a_table_that_a_head_shares_counts_once_as_embeddings():
    g = tiny.linear()
    x = g.inputs[0]
    table = g.constant(np.ones((50, x.shape[-1]), np.float32), "table")
    ids = g.constant(np.zeros(1, np.int64), "ids")
    row = g.op("Gather", table, ids)
    out = g.op("MatMul", g.op("Add", x, row), g.op("Transpose", table, perm=[1, 0]))
    g.replace(g.outputs[0], out)
    g.sweep()
    assert StoredPart("embeddings", "float32", 200 * x.shape[-1]) in stored_parts(g)
