"""Logits of the last token alone: equal to the last of all, and what needs the others says so."""

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.generate import generate
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files.storage import save
from onnxcomp.graph import Graph
from onnxcomp.lowering.grouped_decoder import group_attentions
from onnxcomp.lowering.two_forms import add_int8_form
from onnxcomp.passes.last_logits import LastLogits
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.validation.compare import Reference
from tests import tiny
from tests.lowering.test_grouped_decoder import CONTEXT, WORDS, decoder

RNG = np.random.default_rng(2)
TOKENS = RNG.integers(0, WORDS, (2, 9))
MASK = np.ones_like(TOKENS)
MASK[1, :3] = 0


def last(g: Graph, *more, **options) -> Graph:
    return PassManager([LastLogits(), *more], measure=False, **options).run(g).model


def read(g: Graph) -> list[np.ndarray]:
    with Decoder(g) as d:
        return [d.read(TOKENS[:, s], MASK[:, s]) for s in (slice(0, 6), slice(6, 7), slice(7, 9))]


def test_they_are_those_of_the_last_token_behind_padding_and_caches() -> None:
    made = last(decoder())
    for whole, short in zip(read(decoder()), read(made), strict=True):
        assert short.shape == (2, 1, WORDS)
        np.testing.assert_allclose(short, whole[:, -1:], rtol=1e-5, atol=1e-5)
    assert made.value("logits").shape[1] == 1  # declared, as readers with buffers of their own need it


def test_the_same_tokens_are_generated() -> None:
    texts, prompts = [], np.stack([np.arange(WORDS), np.arange(WORDS)[::-1]], axis=1)
    for g in (decoder(), last(decoder())):
        with Decoder(g) as d:
            texts.append(np.stack(list(generated(d, prompts, 12))).T)
    np.testing.assert_array_equal(*texts)
    assert len(np.unique(texts[0])) > 2


def test_the_head_has_no_second_form_and_caches_still_go_in_place() -> None:
    passes = [QuantizeWeights(method="nearest", min_size=1, block=16), LastLogits(), Lower(prefill="int8")]
    made = PassManager(passes, measure=False).run(decoder()).model
    assert [n.op_type for n in made.nodes("If", "MatMulNBits")] == ["If", "MatMulNBits"]
    assert group_attentions(made, CONTEXT) == ""
    made.sort()
    again = made.clone()
    assert add_int8_form(again) == "it has no products with codes of few bits"


def test_what_has_none_is_declined() -> None:
    result = PassManager([LastLogits()], measure=False).run(tiny.encoder())
    (why,) = [d.why for d in result.report.steps[-1].declined]
    assert why == "it takes no tokens, or has no output 'logits' of a score for each token and word"
    twice = PassManager([LastLogits(), LastLogits()], measure=False).run(decoder())
    assert [d.why for d in twice.report.steps[-1].declined] == ["its scores are those of the last token already"]


def test_models_are_compared_on_the_last_token() -> None:
    g, made = decoder(), last(decoder())
    data = as_dataset([{"input_ids": TOKENS, "attention_mask": MASK}], g)
    whole = Reference(g, data)
    found = whole.against(made)
    assert "perplexity" in whole.against(g).metrics
    assert "perplexity" not in found.metrics
    assert any("of the last token alone" in n for n in found.notes)
    assert found.outputs["logits"].decibels > 100
    with pytest.raises(DataError, match=r"metric 'perplexity': it needs the logits of all tokens.*token by token"):
        Reference(g, data, metrics=["perplexity"]).against(made)


def test_token_by_token_all_are_compared() -> None:
    g, made = decoder(), last(decoder())
    data = as_dataset([{"input_ids": TOKENS, "attention_mask": np.ones_like(MASK)}], g)
    found = Reference(g, data, pieces=1).against(made)
    assert found.metrics["perplexity"].candidate == pytest.approx(found.metrics["perplexity"].reference, rel=1e-5)
    with pytest.raises(ModelError, match="is of the last token only: read pieces of one token"):
        Reference(g, data, pieces=2).against(made)


def test_drafts_are_refused(tmp_path) -> None:
    words = json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": "0",
        "vocab": {str(i): i for i in range(WORDS)}}, "pre_tokenizer": {"type": "Whitespace"}})  # fmt: skip
    for name in "ab":
        save(last(decoder()), tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(words)
    assert len(generate(tmp_path / "a", "1 2", max_new=3).tokens) == 3
    with pytest.raises(ModelError, match="gives logits of the last token only"):
        generate(tmp_path / "a", "1 2", max_new=3, draft=tmp_path / "b")
