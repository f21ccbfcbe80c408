"""Passes on decoders with caches: token by token they say what they say of whole texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Dataset, load_data
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.exporter import export
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.runtime.generation import Decoder
from tests import decoders, zoo

PROMPT, NEW = 9, 8
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "group-heads", {"share": 2}),
    ("gpt2", "prune-heads", {"ratio": 0.5}),
    ("gpt2", "prune-ffn", {"ratio": 0.3, "multiple_of": 1}),
    ("gpt2", "drop-layers", {"ratio": 0.5, "protect": 0}),
    ("gpt2", "half", {}),
    ("gpt2", "quantize-weights", {"min_size": 1, "bits": 8, "block": 16}),
    ("qwen3", "slice", {"ratio": 0.2, "multiple": 1}),
    ("qwen3", "prune-hidden", {"ratio": 0.2, "multiple_of": 1}),
    ("qwen3", "low-rank", {"ratio": 0.3, "min_size": 1, "multiple": 1}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Graph, Dataset]]:
    """Tiny decoders, canonical, and data that names their tokens only: no mask, no caches."""
    work, found = tmp_path_factory.mktemp("models"), {}
    ids = np.random.default_rng(1).integers(3, zoo.VOCAB, (24, 16))
    np.savez(work / "data.npz", input_ids=ids)
    for name in ("gpt2", "qwen3"):
        folder = export(decoders.build(decoders.causal()[name], 1), work / name)
        g = storage.load(folder)
        canonicalize(g)
        found[name] = g, load_data(str(work / "data.npz"), g, folder)
    return found


def changed(models: Mapping[str, tuple[Graph, Dataset]], name: str, pass_name: str, options: dict[str, Any]) -> Graph:
    g, data = models[name]
    result = PassManager([catalog.load(pass_name)(**options)]).run(g.clone(), data)
    assert result.report.steps[0].changed
    return result.model


@pytest.mark.parametrize(("name", "pass_name", "options"), CASES, ids=[f"{n}-{p}" for n, p, _ in CASES])
def test_tokens_through_caches_are_those_of_whole_texts(models, name, pass_name, options) -> None:
    g = changed(models, name, pass_name, options)
    ids, mask = np.random.default_rng(0).integers(3, zoo.VOCAB, (3, PROMPT)), np.ones((3, PROMPT), np.int64)
    mask[1, :4] = 0
    with Decoder(g) as behind, Decoder(g) as anew:
        scores = behind.read(ids, mask)[:, -1]
        for _ in range(NEW):
            new = scores.argmax(-1)[:, None]
            ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
            scores = behind.read(new)[:, -1]
            anew.reset()
            whole = anew.read(ids, mask)[:, -1]
            np.testing.assert_allclose(scores, whole, atol=2e-2 * np.abs(whole).max())
            np.testing.assert_array_equal(scores.argmax(-1), whole.argmax(-1))


def test_grouped_heads_have_smaller_caches(models) -> None:
    heads = models["gpt2"][0].inputs[-1].shape[1]
    g = changed(models, "gpt2", "group-heads", {"share": 2})
    ports = [v for v in (*g.inputs, *g.outputs) if str(v.name).startswith(("past", "present"))]
    assert len(ports) == 8
    assert {v.shape[1] for v in ports} == {heads // 2}
    with Decoder(g) as d:
        d.read(np.full((1, 5), 3))
        assert {v.shape()[1] for v in d._caches.values()} == {heads // 2}


def test_caches_that_something_else_reads_keep_their_heads(models) -> None:
    g = models["gpt2"][0].clone()
    cache = next(v for v in g.inputs if str(v.name).startswith("past"))
    read = g.op("ReduceSum", cache, np.array([0, 1, 2, 3], np.int64), keepdims=0, name="sum_of_cache")
    logits = next(v for v in g.outputs if v.name == "logits")
    whole = g.op("Identity", logits, like=logits)
    g.replace(logits, g.op("Add", whole, read, like=logits))
    g.set_input(whole.producer(), 0, logits)
    step = PassManager([catalog.load("group-heads")()]).run(g, models["gpt2"][1]).report.steps[0]
    assert [d.why.partition("'sum")[0] for d in step.declined] == [f"its cache '{cache.name}' is also read by "]
    assert step.changed == 1
