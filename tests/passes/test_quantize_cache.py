"""`quantize-cache`: codes of keys and values against numpy, texts in pieces, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.exporter import export
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering.coded_caches import as_floats
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.methods.quantize import cache_codes
from onnxcomp.methods.quantize.cache_codes import CacheScales
from onnxcomp.passes.quantize_cache import QuantizeCache
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.compare import validate
from tests import zoo

LLAMA = "llama-cache.legacy-eager-17"  # 2 layers; 4 heads of 4 channels read 2 of keys and values
MODELS = Path(__file__).parents[2] / "models"
BITS = pytest.mark.parametrize("bits", [8, 4])


@functools.cache
def decoder() -> Graph:
    g = Graph(zoo.load_graph(LLAMA))
    canonicalize(g)
    return g


def coded(bits: int, step: float) -> Graph:
    """All caches with one step between codes."""
    g = decoder().clone()
    for a in blocks.attentions(g):
        scales = np.full((a.kv_heads, a.head_dim), step)
        cache_codes.store_codes(g, a, CacheScales(scales, 2 * scales), bits)
    cache_codes.declare(g)
    g.sort()
    g.verify()
    return g


def caches(g: Graph) -> list[str]:
    return [str(v.name) for v in g.inputs if str(v.name).startswith("past")]


def feeds(g: Graph, ids: np.ndarray, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    types = {str(v.name): v for v in g.inputs}
    made = past or {n: np.zeros((len(ids), 2, 0, types[n].shape[-1]), types[n].dtype.numpy()) for n in caches(g)}
    known = next(iter(made.values())).shape[2]
    return {"input_ids": ids, "attention_mask": np.ones((len(ids), known + ids.shape[1]), np.int64), **made}


def run(g: Graph, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with Session(g) as s:
        return list(s.run(fed).values())


def unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[b, h, t, w]`: of 4 bits the first half of the channels is in the low bits."""
    if bits == 8:
        return stored.astype(float)
    return np.concatenate([stored & 15, stored >> 4], axis=-1).astype(float) - 8


@BITS
def test_a_cache_holds_the_rounded_keys_and_values(bits: int) -> None:
    ids = np.random.default_rng(0).integers(0, zoo.VOCAB, (2, 7))
    plain = run(decoder(), feeds(decoder(), ids))[1:]
    step = max(float(np.abs(x).max()) for x in plain) / cache_codes.LARGEST[bits]
    g = coded(bits, step)
    made = run(g, feeds(g, ids))[1:]
    for i in range(2):  # of the first layer, whose inputs no cache has changed
        codes = np.rint(plain[i].astype(float) / (step * (1 + i)))
        assert np.abs(unpacked(made[i], bits) - codes).max() <= 1  # a half is rounded either way
        assert (unpacked(made[i], bits) == codes).mean() > 0.98


@BITS
def test_a_text_in_pieces_gives_what_it_gives_at_once(bits: int) -> None:
    g = coded(bits, 0.02)
    ids = np.random.default_rng(1).integers(0, zoo.VOCAB, (2, 9))
    whole, *kept = run(g, feeds(g, ids))
    first, *past = run(g, feeds(g, ids[:, :5]))
    rest, *again = run(g, feeds(g, ids[:, 5:], dict(zip(caches(g), past, strict=True))))
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=2e-5)
    assert all(np.array_equal(a, b) for a, b in zip(kept, again, strict=True))


def test_fine_steps_give_the_outputs_of_the_model() -> None:
    ids = np.random.default_rng(2).integers(0, zoo.VOCAB, (2, 9))
    plain = run(decoder(), feeds(decoder(), ids))
    most = max(float(np.abs(x).max()) for x in plain[1:])
    fine, coarse = (run(g, feeds(g, ids))[0] for g in (coded(8, most / 127), coded(8, most / 7)))
    errors = [np.linalg.norm(x - plain[0]) / np.linalg.norm(plain[0]) for x in (fine, coarse)]
    assert errors[0] < 0.02 < 8 * errors[0] < 2 * errors[1]


def test_scales_hold_at_every_position() -> None:
    """Whatever angle a pair of channels is turned by, neither is larger than what its scale allows."""
    rng = np.random.default_rng(3)
    a = blocks.attentions(decoder())[0]
    partner = cache_codes.partners(a, a.head_dim)
    assert sorted(partner) == list(range(a.head_dim))
    assert (partner[partner] == np.arange(a.head_dim)).all()
    keys = rng.standard_normal((64, a.kv_heads, a.head_dim))
    _, most = cache_codes.anywhere(partner, keys, np.abs(keys).max(axis=0))
    angle = rng.uniform(0, 2 * np.pi, (1000, 64, a.kv_heads, a.head_dim // 2))
    low, high = keys[..., : a.head_dim // 2], keys[..., a.head_dim // 2 :]
    turned = np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), low * np.sin(angle) + high * np.cos(angle)], axis=-1
    )
    assert (np.abs(turned) <= most + 1e-9).all()
    np.testing.assert_array_equal(most, most[:, partner])


@pytest.mark.parametrize("per_tensor", [False, True])
def test_ranges_of_4_bits_err_less_than_whole_ones(per_tensor: bool) -> None:
    rng = np.random.default_rng(4)
    rows = rng.standard_t(3, (2000, 2, 4)) * rng.uniform(0.5, 4, (2, 4))
    most = np.abs(rows).max(axis=0)

    def error(step: np.ndarray) -> float:
        return float(((np.clip(np.rint(rows / step), -8, 7) * step - rows) ** 2).sum())

    best = cache_codes.best_scales(rows, most, 4, per_tensor=per_tensor)
    whole = (np.full_like(most, most.max()) if per_tensor else most) / 7
    assert error(best) < error(whole)
    assert (len(set(best.ravel())) == 1) == per_tensor
    np.testing.assert_allclose(cache_codes.best_scales(rows, most, 8, per_tensor=False), most / 127)


def test_docs_lm_says_the_same_with_caches_of_8_bits(tmp_path: Path) -> None:
    data = MODELS / "data" / "docs_lm"
    folder = export(MODELS / "weights" / "docs_lm", tmp_path / "model")
    g = storage.load(folder)
    canonicalize(g)
    texts = load_data(str(data / "calibration.jsonl"), g, folder, batch=8, samples=32)
    result = PassManager([QuantizeCache()]).run(g, texts)
    found = validate(
        folder, result.model, data / "heldout.jsonl", metrics=["perplexity"], samples=16, through_caches=16
    )
    assert abs(found.metrics["perplexity"].change) <= 0.01
    assert found.outputs["logits"].sqnr > 30
    assert any("are not compared: present" in note for note in found.notes)
    written = []
    for m in (g, result.model):
        with Decoder(m) as d:
            written.append([int(x[0]) for x in generated(d, np.array([[5, 9, 40, 7]]), 24)])
            size = d.cache_bytes
        written[-1].append(size)
    assert written[0][:-1] == written[1][:-1]
    assert written[0][-1] == 4 * written[1][-1]
    grouped = result.model.clone()
    assert group_attentions(grouped, 256) == ""
    assert {v.dtype for v in grouped.inputs if str(v.name).startswith("past")} == {ir.DataType.INT8}
    with Decoder(grouped) as d:
        assert written[0][:-1] == [int(x[0]) for x in generated(d, np.array([[5, 9, 40, 7]]), 24)]


@BITS
def test_codes_are_found_again_for_an_operator_that_keeps_them(bits: int) -> None:
    g = coded(bits, 0.02)
    found = as_floats(g)
    g.verify(interface=False)
    assert [str(v.dtype) for v in g.inputs if v.name in caches(g)] == ["FLOAT"] * 4
    assert set(found) == {caches(g)[0], caches(g)[2]}
    for c in found.values():
        assert c.bits == bits
        assert c.keys.shape == c.values.shape == (2, 4)
        np.testing.assert_allclose(c.values, 0.04, rtol=1e-6)
    ids = np.random.default_rng(5).integers(0, zoo.VOCAB, (2, 9))
    for a, b in zip(run(g, feeds(g, ids)), run(decoder(), feeds(decoder(), ids)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_caches_that_cannot_hold_codes_are_declined_with_the_reason() -> None:
    g = coded(8, 0.02)
    again = PassManager([QuantizeCache()], allow_unchanged=True).run(g, None)
    assert not again.report.steps[0].changed
    g = Graph(zoo.load_graph("llama.dynamo-sdpa-18"))
    canonicalize(g)
    declined = PassManager([QuantizeCache()], allow_unchanged=True).run(g, None).report.steps[0].declined
    assert {d.why for d in declined} == {"it has no caches"}
