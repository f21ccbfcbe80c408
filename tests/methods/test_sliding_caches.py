"""Caches that slide: the text of the same windows over whole caches, and sizes that stay."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import ModelError
from onnxcomp.exporter import export
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.group_heads import GroupHeads
from onnxcomp.passes.quantize_cache import QuantizeCache
from onnxcomp.passes.window_attention import WindowAttention
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.validation.compare import validate
from tests import decoders, zoo

WIDTH, SINKS = 6, 2


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A tiny decoder with caches and positions as inputs, canonical."""
    folder = export(decoders.build(decoders.causal()["qwen3"], 1), tmp_path_factory.mktemp("qwen3") / "model")
    g = storage.load(folder)
    canonicalize(g)
    return g


@functools.cache
def tokens(batch: int, count: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(3, zoo.VOCAB, (batch, count))


def windowed(g: Graph, cache: str, width: int = WIDTH, sinks: int = SINKS) -> Graph:
    p = WindowAttention(width=width, sinks=sinks, cache=cache)
    result = PassManager([p], allow_unchanged=True).run(g.clone(), None)
    assert result.report.steps[0].changed, result.report.steps[0].declined
    return result.model


def text(g: Graph, padded: bool) -> tuple[np.ndarray, list[int]]:
    """Greedy text behind three prompts, and lengths of the caches then."""
    ids, mask = tokens(3, 9).copy(), np.ones((3, 9), np.int64)
    if padded:
        mask[1, :4] = 0
    with Decoder(g) as d:
        made = np.stack(list(generated(d, ids, 20, mask=mask)), 1)
        return made, [v.shape()[2] for v in d._caches.values()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_text_is_that_of_whole_caches_and_sizes_stay(qwen: Graph, padded: bool, sinks: int) -> None:
    whole, lengths = text(windowed(qwen, "whole", sinks=sinks), padded)
    sliding, kept = text(windowed(qwen, "sliding", sinks=sinks), padded)
    np.testing.assert_array_equal(sliding, whole)
    assert set(lengths) == {28}
    assert set(kept) == {sinks + WIDTH - 1}


def test_texts_in_pieces_and_at_once_give_the_same(qwen: Graph) -> None:
    whole, sliding = windowed(qwen, "whole"), windowed(qwen, "sliding")
    ids = tokens(2, 24)
    with Decoder(whole) as d:
        wanted = d.read(ids)
    for size in (1, 5, 24):
        with Decoder(sliding) as d:
            found = np.concatenate([d.read(ids[:, i : i + size]) for i in range(0, 24, size)], axis=1)
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    drift = validate(whole, sliding, [{"input_ids": ids}], through_caches=4)
    assert drift.outputs["logits"].sqnr > 80
    assert any("are not compared: present" in note for note in drift.notes)


def test_a_window_that_is_there_already_slides(qwen: Graph) -> None:
    again = windowed(windowed(qwen, "whole", sinks=0), "sliding", width=40, sinks=0)
    assert set(text(again, padded=False)[1]) == {WIDTH - 1}


def test_tokens_cannot_be_taken_back(qwen: Graph) -> None:
    with Decoder(windowed(qwen, "sliding")) as d:
        d.read(tokens(1, 9))
        d.forget(0)
        with pytest.raises(ModelError, match="its caches slide, so tokens cannot be taken back"):
            d.forget(2)


@pytest.mark.parametrize("bits", [8, 4])
def test_sliding_caches_hold_codes_as_well(qwen: Graph, bits: int) -> None:
    data = as_dataset([{"input_ids": tokens(4, 24)}], qwen)
    options = {"width": WIDTH, "sinks": SINKS}
    coded, made = {}, {}
    for cache in ("whole", "sliding"):
        passes = [WindowAttention(cache=cache, **options), QuantizeCache(bits=bits)]
        coded[cache] = PassManager(passes).run(qwen.clone(), data).model
        made[cache] = text(coded[cache], padded=True)
    np.testing.assert_array_equal(made["sliding"][0], made["whole"][0])
    assert set(made["sliding"][1]) == {SINKS + WIDTH - 1}
    types = {v.dtype.name for v in coded["sliding"].outputs if str(v.name).startswith("present")}
    assert types == {"INT8" if bits == 8 else "UINT8"}


def test_what_cannot_slide_is_declined_with_the_reason(qwen: Graph) -> None:
    def reasons(g: Graph, **options: object) -> set[str]:
        p = WindowAttention(width=WIDTH, cache="sliding", **options)
        step = PassManager([p], allow_unchanged=True).run(g.clone(), None).report.steps[0]
        assert not step.changed
        return {d.why for d in step.declined}

    first = next(qwen.nodes("Attention")).name
    [why] = reasons(qwen, skip=(first,))
    assert why == f"its cache cannot slide: '{first}' keeps all its keys, and one mask is for all caches"
    plain = Graph(zoo.load_graph("llama.dynamo-sdpa-18"))
    canonicalize(plain)
    assert all("has no caches that are inputs of the model" in w for w in reasons(plain))
    counted = Graph(zoo.load_graph("llama-cache.legacy-eager-17"))
    canonicalize(counted)
    assert all("positions are no input" in w for w in reasons(counted))


@pytest.mark.parametrize(("width", "sinks"), [(3, 2), (24, 4), (24, 12), (700, 16), (24, 1)])
@pytest.mark.parametrize("cache", ["whole", "sliding"])
def test_windows_with_sinks_have_a_name(qwen: Graph, width: int, sinks: int, cache: str) -> None:
    """Else they would pass for causal masks, and a package would be written without the window."""
    g = windowed(qwen, cache, width, sinks)
    masks = {n.inputs[3] for n in g.nodes("Attention")}
    assert {m.name for m in name_masks(g, masks).values()} >= {f"causal window {width} sinks {sinks}+padding"}
    assert not any(m.name == "causal+padding" for v, m in name_masks(g, masks).items() if v is not None)


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_merged_heads_have_caches_of_their_own(tmp_path: Path, repair: str) -> None:
    llama = storage.load(export(decoders.build(decoders.causal()["llama"], 1), tmp_path / "model"))
    canonicalize(llama)
    data = as_dataset([{"input_ids": tokens(i + 1, 24)} for i in range(4)], llama)
    result = PassManager([GroupHeads(share=2, repair=repair)]).run(llama, data)
    assert result.report.steps[0].changed, result.report.steps[0].declined
    assert {v.shape[1] for v in result.model.inputs if str(v.name).startswith("past")} == {1}
    ids = tokens(2, 20)
    with Decoder(result.model) as d:
        whole = d.read(ids)
    with Decoder(result.model) as d:
        pieces = np.concatenate([d.read(ids[:, i : i + 4]) for i in range(0, 20, 4)], axis=1)
    np.testing.assert_allclose(pieces, whole, atol=2e-4)
