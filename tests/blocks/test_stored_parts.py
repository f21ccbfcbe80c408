"""Bytes of constants by the part that reads them and by element type."""

import numpy as np

from onnxcomp.blocks.stored_parts import StoredPart, stored_parts
from onnxcomp.engine.manager import PassManager
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from tests import tiny


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
    assert after["linears", "int8"] * 4 == before["linears", "float32"]
    assert ("linears", "float32") not in after or after["linears", "float32"] < before["linears", "float32"] / 8
    assert after["embeddings", "float32"] == before["embeddings", "float32"]


def test_scales_of_codes_are_apart_from_what_stayed_float():
    g = tiny.encoder(hidden=64, ffn=128)
    before = by_part(g)
    result = PassManager([QuantizeWeights(method="nearest", min_size=1, block=16)]).run(g).model
    after = by_part(result)
    weights = before["linears", "float32"]
    assert after["linears", "uint4"] * 8 == weights
    assert after["scales", "float32"] * 16 == weights  # one for 16 weights
    assert after["scales", "uint4"] * 128 == weights
    assert after.get(("other", "float32"), 0) == before.get(("other", "float32"), 0)


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
