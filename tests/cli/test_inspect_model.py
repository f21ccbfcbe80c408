"""What `inspect` says of whole models: stacks, positions, masks by probing, parts, what is left and why; its schema."""

import itertools
import json

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.describe import describe
from onnxcomp.blocks.mask_names import Mask, name_masks
from onnxcomp.canonical import canonicalize
from onnxcomp.cli import inspect_model
from onnxcomp.files.storage import save
from onnxcomp.graph import Graph
from onnxcomp.reports import anatomy_tables as tables
from tests import tiny, zoo


def anatomy(name: str) -> dict:
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    return describe(g)


def inspected(g: Graph, folder) -> dict:
    save(g, folder / "model")
    found = inspect_model.inspect(folder / "model")
    jsonschema.validate(found, inspect_model.schema())
    assert json.loads(json.dumps(found)) == found
    return found["graphs"]["model"]


@pytest.mark.parametrize(
    ("name", "stack", "masks", "positions"),
    [
        ("bert.legacy-sdpa-14", "encoder", "padding", "learned"),
        ("vit.dynamo-sdpa-18", "encoder", "none", "learned"),
        ("swin.dynamo-eager-18", "encoder", "none", "relative bias"),
        ("modernbert.dynamo-sdpa-22", "encoder", ["padding", "window 2+padding"], "rotary"),
        ("mpnet.legacy-eager-15", "encoder", "padding", "relative bias and learned"),
        ("gpt2.dynamo-sdpa-18", "decoder", "causal+padding", "learned"),
        ("llama.dynamo-eager-18", "decoder", "causal+padding", "rotary"),
        ("mistral.dynamo-sdpa-19", "decoder", "causal window 4+padding", "rotary"),
        ("gemma2.transformers-eager-18", "decoder", ["causal window 4+padding", "causal+padding"], "rotary"),
        ("opt.legacy-eager-16", "decoder", "causal+padding", "learned"),
    ],
)
def test_stack_masks_and_positions(name, stack, masks, positions):
    facts = anatomy(name)
    assert [s["kind"] for s in facts["stacks"]] == [stack]
    assert facts["stacks"][0]["attention"]["masks"] == masks
    assert facts["positions"] == positions


@pytest.mark.parametrize(
    ("name", "own", "cross", "positions"),
    [
        ("t5.dynamo-eager-19", ["padding", "causal"], "padding", "relative bias"),
        ("bart.dynamo-sdpa-17", ["padding", "causal"], "padding", "learned"),
        ("whisper.dynamo-sdpa-21", ["none", "causal"], "none", "learned"),
    ],
)
def test_encoder_and_decoder_are_listed_apart(name, own, cross, positions):
    facts = anatomy(name)
    encoder, decoder = facts["stacks"]
    assert [s["kind"] for s in facts["stacks"]] == ["encoder", "decoder"]
    assert [s["layers"] for s in facts["stacks"]] == [2, 2]
    assert [s["attention"]["masks"] for s in facts["stacks"]] == own
    assert encoder["cross_attention"] is None
    assert decoder["cross_attention"]["masks"] == cross
    assert facts["positions"] == positions


def test_shared_layers_count_once():
    facts = anatomy("albert.dynamo-sdpa-18-onnxsim")
    assert (facts["stacks"][0]["layers"], facts["stacks"][0]["distinct"]) == (2, 1)
    assert 2 * facts["parameters"]["mlp"] > facts["macs_per_token"]["mlp"] == 2 * 2 * zoo.H * zoo.FF


@pytest.mark.parametrize(
    ("name", "mlp", "width", "norm"),
    [
        ("llama.dynamo-sdpa-18", "gated silu", zoo.FF, ("rms", "pre", 0)),
        ("gemma2.transformers-eager-18", "gated gelu-tanh", zoo.FF, ("rms", "pre and post", 0)),
        ("bert.dynamo-eager-18", "gelu", zoo.FF, ("layer", "post", 0)),
        ("clip-text.legacy-sdpa-15", "quick-gelu", zoo.FF, ("layer", "pre", 0)),
        ("qwen3.dynamo-sdpa-18", "gated silu", zoo.FF, ("rms", "pre", 4)),
        ("opt.legacy-eager-16", "relu", zoo.FF, ("layer", "pre", 0)),
    ],
)
def test_kinds_of_mlp_and_norm(name, mlp, width, norm):
    facts = anatomy(name)
    assert (facts["mlp"]["kind"], facts["mlp"]["width"]) == (mlp, width)
    assert (facts["norm"]["kind"], facts["norm"]["position"], facts["norm"]["inside_attention"]) == norm


def test_llama_parts_are_what_the_configuration_says():
    facts = anatomy("llama.dynamo-sdpa-18")
    kv = zoo.H // 2
    attention, mlp = 2 * (2 * zoo.H * zoo.H + 2 * zoo.H * kv), 2 * 3 * zoo.H * zoo.FF
    wanted = {"embeddings": zoo.VOCAB * zoo.H, "attention": attention, "mlp": mlp, "norms": 5 * zoo.H}
    assert {k: facts["parameters"][k] for k in wanted} == wanted
    assert facts["parameters"]["head"] == facts["macs_per_token"]["head"] == zoo.VOCAB * zoo.H
    assert facts["macs_per_token"]["attention_per_key"] == 2 * 2 * zoo.H
    assert facts["parameters"]["total"] == sum(v for k, v in facts["parameters"].items() if k != "total")


@pytest.mark.parametrize("name", ["t5.dynamo-eager-19", "swin.dynamo-eager-18", "albert.dynamo-sdpa-18-onnxsim"])
def test_json_follows_the_schema_and_people_see_a_table(name, tmp_path):
    facts = inspected(Graph(zoo.load_graph(name)), tmp_path)
    shown = tables.anatomy(facts)
    assert [t.title for t in shown][1:3] == ["Layers", "Parts"]
    assert shown[1].row_count == sum(1 + (s["cross_attention"] is not None) for s in facts["stacks"])


def test_a_model_that_is_no_transformer(tmp_path):
    facts = inspected(tiny.linear(8, 6), tmp_path)
    assert (facts["layers"], facts["stacks"], facts["positions"]) == (0, [], "none")
    assert facts["parameters"]["total"] > 0
    assert [t.title for t in tables.anatomy(facts)] == ["model", "Parts", "Linears"]
    assert list(tables.anatomy(facts)[2].columns[1].cells) == ["8 x 6"]


def test_every_softmax_that_stays_is_named_with_its_reason():
    g = tiny.decoder(spelled="dynamo")
    canonicalize(g, exact_rows=True)
    left = {d["site"]: d["why"] for d in describe(g)["not_recognised"]}
    assert {str(n.name) for n in g.nodes("Softmax")} <= set(left)
    g.declined.clear()
    silent = {d["site"]: d["why"] for d in describe(g)["not_recognised"]}
    assert {str(n.name) for n in g.nodes("Softmax")} <= set(silent)
    assert all("no recognizer gives a reason" in why for why in silent.values())


# ---- probing ---------------------------------------------------------------------------------------------------------


def mask_graph(make) -> tuple[Graph, ir.Value]:
    ids, mask = (
        ir.Value(name=n, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
        for n in ("input_ids", "attention_mask")
    )
    out = ir.Value(name="out")
    node = ir.node("Identity", [ids], outputs=[out])
    model = ir.Model(ir.Graph([ids, mask], [out], nodes=[node], opset_imports={"": 23}, name="masks"), ir_version=10)
    g = Graph(model)
    return g, make(g, ids, mask)


def places(g: Graph, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    size = g.op("Squeeze", g.op("Shape", ids, start=1, end=2))
    row = g.op("Range", np.array(0), size, np.array(1))
    return g.op("Unsqueeze", row, np.array([1])), g.op("Unsqueeze", row, np.array([0]))


def window(width: int, padded: bool, causal: bool = True):
    def make(g, ids, mask):
        i, j = places(g, ids)
        near = g.op("Less", g.op("Sub", i, j), np.array(width))
        far = g.op("GreaterOrEqual", i, j) if causal else g.op("Less", g.op("Sub", j, i), np.array(width))
        both = g.op("And", near, far)
        keys = g.op("Unsqueeze", g.op("Cast", mask, to=9), np.array([1, 2]))
        return g.op("And", both, keys) if padded else both

    return make


@pytest.mark.parametrize(("width", "padded"), list(itertools.product([3, 128, 4096], [True, False])))
def test_windows_of_any_width_are_named(width, padded):
    g, mask = mask_graph(window(width, padded))
    name = f"causal window {width}" + ("+padding" if padded else "")
    assert name_masks(g, [mask, None]) == {mask: Mask(name), None: Mask("none")}
    g, mask = mask_graph(window(width, padded, causal=False))
    name = f"window {width - 1}" + ("+padding" if padded else "")
    assert name_masks(g, [mask])[mask] == Mask(name)


def test_padding_of_queries_too_and_prefixes_are_told_apart():
    def square(g, ids, mask):
        kept = g.op("Cast", mask, to=9)
        return g.op("And", g.op("Unsqueeze", kept, np.array([1, 2])), g.op("Unsqueeze", kept, np.array([1, 3])))

    def prefix(g, ids, mask):
        i, j = places(g, ids)
        return g.op("Or", g.op("GreaterOrEqual", i, j), g.op("Less", j, np.array(3)))

    g, mask = mask_graph(square)
    assert name_masks(g, [mask])[mask] == Mask("padding of queries and keys")
    g, mask = mask_graph(prefix)
    assert name_masks(g, [mask])[mask] == Mask("other")


def test_biases_are_told_apart():
    def alibi(g, ids, mask):
        i, j = places(g, ids)
        slopes = np.array([0.5, 0.25], np.float32).reshape(2, 1, 1)
        return g.op("Mul", slopes, g.op("Cast", g.op("Sub", j, i), to=1))

    def table(g, ids, mask):
        i, j = places(g, ids)
        far = g.op("Clip", g.op("Abs", g.op("Sub", j, i)), None, np.array(3))
        return g.op("Gather", np.array([0.0, 0.5, -1.0, 0.25], np.float32), far)

    g, mask = mask_graph(alibi)
    assert name_masks(g, [mask])[mask] == Mask("none", "alibi")
    g, mask = mask_graph(table)
    assert name_masks(g, [mask])[mask] == Mask("none", "relative")


def test_a_mask_from_activations_is_not_probed():
    def content(g, ids, mask):
        x = g.op("Cast", g.op("Unsqueeze", ids, np.array([2])), to=1)
        return g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))

    g, mask = mask_graph(content)
    assert name_masks(g, [mask])[mask] == Mask("other", "content")


def test_products_of_codes_count_and_what_they_hide_is_said(tmp_path):
    g = tiny.linear()
    x = next(iter(blocks.linears(g)))
    k, n = x.sizes
    codes = g.constant(np.zeros((n, -(-k // 16), 8), np.uint8), "codes")
    scales = g.constant(np.ones((n, -(-k // 16)), np.float32), "scales")
    sizes = {"K": k, "N": n, "bits": 4, "block_size": 16}
    g.replace(x.output, g.op("MatMulNBits", x.source, codes, scales, domain="com.microsoft", like=x.output, **sizes))
    g.sweep()
    assert inspected(g, tmp_path)["quantized_linears"] == 1
    said = inspect_model.headline(inspect_model.inspect(tmp_path / "model"))
    assert "1 quantized linears" in said
    assert said.endswith("inspect the source for these")


def test_caches_of_all_layers_are_one_line(tmp_path):
    facts = inspected(Graph(zoo.load_graph("llama-cache.legacy-eager-17")), tmp_path)
    short, long = (str(list(tables.anatomy(facts, verbose=verbose)[0].columns[1].cells)) for verbose in (False, True))
    assert "past_* (4 times): " in short
    assert len(short) < len(long)
    assert all(name in long for name in facts["inputs"])
