"""Decoders beside the zoo's, as exporters write them: parallel layers, grouped and packed heads, caches."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import torch

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import matrix, zoo
from tests.zoo import EOS, FF, GROUPED, HEADS, LAYERS, SPAN, TEXT, VOCAB, Architecture

pytestmark = [pytest.mark.export, pytest.mark.no_cover]  # raising is counted on smaller graphs

EIGHT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": SPAN, "n_inner": FF}
EIGHT |= {"use_cache": False, **EOS}
PARALLEL = {**TEXT, **EOS, "use_cache": False, "partial_rotary_factor": 0.5}
FALCON = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
FALCON |= {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "ffn_hidden_size": FF}


def decoder(name: str, model: str, options: dict, norms: int) -> Architecture:
    found = {"attentions": LAYERS, "mlps": LAYERS, "norms": norms, "causal": True}
    return Architecture(
        name,
        f"{model}{'LMHeadModel' if model == 'OpenAIGPT' else 'ForCausalLM'}",
        f"{model}Config",
        options,
        ("input_ids", "attention_mask"),
        "logits",
        **found,
    )


OTHERS = (
    decoder("gptj", "GPTJ", {**EIGHT, "rotary_dim": 4}, 3),
    decoder("codegen", "CodeGen", {**EIGHT, "rotary_dim": 4, "n_ctx": SPAN}, 3),
    decoder("bigcode", "GPTBigCode", {**EIGHT, "multi_query": True}, 5),
    decoder("falcon-new", "Falcon", {**FALCON, "use_cache": False}, 5),
    decoder("phi", "Phi", PARALLEL, 3),
    decoder("openai-gpt", "OpenAIGPT", {k: v for k, v in zoo.GPT2.items() if k != "use_cache"}, 4),
    decoder("nemotron", "Nemotron", {**GROUPED, **EOS, "head_dim": 8, "partial_rotary_factor": 0.5}, 5),
)


@pytest.mark.parametrize("a", OTHERS, ids=lambda a: a.name)
def test_decoders_that_the_zoo_does_not_hold(a, tmp_path):
    path = zoo.export(a, zoo.SPELLINGS["legacy-eager-17"], tmp_path)
    assert path is not None
    source, new = Graph(ir.load(path)), Graph(ir.load(path))
    canonicalize(new)
    assert new.declined == []
    assert matrix.counts(new) == (a.attentions, a.mlps, a.norms)
    assert [(len(x.attentions), x.mlp is not None) for x in blocks.layers(new)] == [(1, True)] * LAYERS
    worst, _ = matrix.distance(a, source, new)
    assert worst <= 2e-6
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0


# ---- key-value caches ------------------------------------------------------------------------------------------------


class Cached(torch.nn.Module):
    """A language model with its cache as plain tensors: keys and values of each layer in, the new ones out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for i in range(LAYERS):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def cached_export(name: str, path: Path) -> Graph:
    """The legacy exporter's graph of a model of the zoo with its cache."""
    a = zoo.BY_NAME[name]
    model = dataclasses.replace(a, options={**a.options, "use_cache": True}).build("eager")
    kv = getattr(model.config, "num_key_value_heads", HEADS)
    past = [torch.randn(2, kv, 5, zoo.H // HEADS) for _ in range(2 * LAYERS)]
    args = (torch.randint(3, VOCAB, (2, 3)), torch.ones(2, 8, dtype=torch.int64), *past)
    taken = ["input_ids", "attention_mask", *(f"past_{i}" for i in range(len(past)))]
    given = ["logits", *(f"present_{i}" for i in range(len(past)))]
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {n: {0: "batch", 2: "past"} for n in taken[2:]} | {n: {0: "batch", 2: "total"} for n in given[1:]}
    axes["logits"] = axes["input_ids"]
    named = {"input_names": taken, "output_names": given, "dynamic_axes": axes}
    with zoo._quiet():
        torch.onnx.export(Cached(model).eval(), args, str(path), dynamo=False, opset_version=17, **named)
    return Graph(ir.load(path))


def cache_feeds(g: Graph, batch: int, new: int, past: int, padding: int) -> dict:
    rng = np.random.default_rng(past)
    mask = np.ones((batch, new + past), np.int64)
    mask[1::2, :padding] = 0
    made = {"input_ids": rng.integers(3, VOCAB, (batch, new)), "attention_mask": mask}
    for v in g.inputs[2:]:
        made[v.name] = rng.standard_normal((batch, v.shape[1], past, v.shape[3])).astype(np.float32)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_caches_of_exported_models_go_through_the_operator(name, tmp_path):
    source = cached_export(name, tmp_path / "cached.onnx")
    new = source.clone()
    canonicalize(new)
    assert new.declined == []
    found = blocks.attentions(new)
    assert len(found) == LAYERS
    names = [v.name for a in found for v in (*a.past, *a.present)]
    assert names == ["past_0", "past_1", "present_0", "present_1", "past_2", "past_3", "present_2", "present_3"]
    assert {n.op_type for n in new.nodes()} & {"Softmax", "Transpose", "Split"} == set()
    again = new.clone()
    canonicalize(again)
    assert again.edits == 0
    with Session(source) as a, Session(new) as b:
        for batch, s, past, padding in ((2, 3, 5, 0), (1, 1, 7, 0), (2, 6, 0, 2), (3, 1, 9, 3)):
            x = cache_feeds(source, batch, s, past, padding)
            before, after = a.run(x), b.run(x)
            seen = np.cumsum(x["attention_mask"], 1) > 0
            for key, want in before.items():
                rows = seen[:, past:, None] if key == "logits" else seen[:, None, :, None]
                assert np.max(np.abs(want - after[key]) * rows) <= 2e-6 * np.max(np.abs(want))
