"""Caches as onnxruntime-genai's model builder declares them: the width of a head is open, the kernel's is not."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.blocks.describe import describe
from onnxcomp.canonical import canonicalize
from onnxcomp.data.arrays import Random
from onnxcomp.data.datasets import specs
from onnxcomp.engine.manager import PassManager
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from tests import tiny
from tests.data.test_data import model_of

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
VOCABULARY, WIDTH, HEADS, GROUPS, HEAD = 30, 32, 4, 2, 8
OPEN = ["batch_size", GROUPS, "past_sequence_length", "kv_cache_dim"]


def decoder(declared: bool = True) -> Graph:
    """One grouped attention behind packed projections, with the interface that the model builder writes."""
    g = model_of(
        ("input_ids", INT, ["batch_size", "sequence_length"]),
        ("attention_mask", INT, ["batch_size", "total_sequence_length"]),
        ("past_key_values.0.key", FLOAT, OPEN),
        ("past_key_values.0.value", FLOAT, OPEN),
    )
    ids, mask, key, value = g.inputs
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> ir.Value:
        return g.constant((rng.standard_normal(shape) / 4).astype(np.float32))

    x = g.op("Gather", weight(VOCABULARY, WIDTH), ids)
    qkv = g.op("MatMul", x, weight(WIDTH, (HEADS + 2 * GROUPS) * HEAD))
    if declared:
        qkv.type, qkv.shape = ir.TensorType(FLOAT), ir.Shape([None, None, (HEADS + 2 * GROUPS) * HEAD])
    lengths = g.op("Sub", g.op("ReduceSum", mask, np.array([1]), keepdims=0), np.array(1))
    total = g.op("Gather", g.op("Shape", mask), np.array(1))
    seen, total = (g.op("Cast", v, to=ir.DataType.INT32) for v in (lengths, total))
    attributes = {"num_heads": HEADS, "kv_num_heads": GROUPS}
    inputs = (qkv, None, None, key, value, seen, total)
    first = g.op("GroupQueryAttention", *inputs, outputs=3, domain="com.microsoft", **attributes)
    outputs = first.producer().outputs
    x = g.op("Add", x, g.op("MatMul", outputs[0], weight(HEADS * HEAD, WIDTH)))
    inner = g.op("Relu", g.op("MatMul", x, weight(WIDTH, 2 * WIDTH)))
    x = g.op("Add", x, g.op("MatMul", inner, weight(2 * WIDTH, WIDTH)))
    tiny.finish(g, g.op("MatMul", x, weight(WIDTH, VOCABULARY)), "logits", ["b", "s", VOCABULARY])
    for v, name in zip(outputs[1:], ("present.0.key", "present.0.value"), strict=True):
        v.name, v.type, v.shape = name, ir.TensorType(FLOAT), ir.Shape(["b", GROUPS, "t", "kv_cache_dim"])
        g.model.graph.outputs.append(v)
    return Graph(g.model)


@pytest.mark.parametrize("declared", [True, False], ids=["shape told", "from the weight"])
def test_open_widths_of_caches_are_settled_at_load(declared, tmp_path):
    g = storage.load(storage.save(decoder(declared), tmp_path))
    shapes = {s.name: s.shape for s in specs(g)}
    assert shapes["past_key_values.0.key"] == ("batch_size", GROUPS, "past_sequence_length", HEAD)
    assert [list(v.shape)[3] for v in g.outputs[1:]] == [HEAD, HEAD]


def test_a_model_of_the_builder_is_compared_without_data(tmp_path):
    path = storage.save(decoder(), tmp_path)
    result = PassManager([Canonicalize(), DynamicQuant(min_size=1)]).run(path)
    assert set(result.report.validation.outputs) == {"logits", "present.0.key", "present.0.value"}
    assert not any("not compared" in w for w in result.report.warnings)


@pytest.mark.parametrize(("samples", "past"), [(1, 4), (3, 0)])
def test_several_tokens_behind_a_cache_are_of_one_sample(samples, past, tmp_path):
    g = storage.load(storage.save(decoder(), tmp_path))
    batch = Random(g, None, samples, 8, 0).rows(range(samples))
    assert batch.feeds["past_key_values.0.key"].shape == (samples, GROUPS, past, HEAD)
    assert batch.feeds["attention_mask"].shape == (samples, past + 8)


def test_layers_whose_attention_stays_fused_are_a_decoder_where_there_are_caches(tmp_path):
    g = storage.load(storage.save(decoder(), tmp_path))
    canonicalize(g)
    assert [(s["kind"], s["layers"]) for s in describe(g)["stacks"]] == [("decoder", 1)]
