"""A reduced vocabulary: the corpus is split into the same tokens, the model scores them as before, files agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

from onnxcomp import compress
from onnxcomp.data import vocabulary
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.data.vocabulary import Renumbering
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.prune_vocab import PruneVocab
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.sessions import Session
from tests import tiny

TOKENIZER = Path(__file__).parents[2] / "models" / "weights" / "docs_lm"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "a", "##b", "##c", "abc", "unused", "##bc", "never"]


def wordpiece(size: int) -> dict:
    vocab = {w: i for i, w in enumerate([*WORDS, *(f"word{i}" for i in range(size - len(WORDS)))])}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": WORDS[i], **plain, "special": True} for i in range(3)]
    template = {"single": [], "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}}
    post = {"type": "TemplateProcessing", **template}
    return {"version": "1.0", "added_tokens": added, "post_processor": post, "model": model}


@pytest.fixture(params=["encoder", "decoder", "tied"])
def folder(request, tmp_path: Path) -> Path:
    g = tiny.encoder() if request.param == "encoder" else tiny.decoder(tied=request.param == "tied")
    tiny.external(g, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(wordpiece(50)))
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 50, "pad_token_id": 0, "text": {"eos_token_id": 9}})
    )
    (tmp_path / "vocab.txt").write_text("\n".join(wordpiece(50)["model"]["vocab"]) + "\n")
    return tmp_path


def feeds(g: Graph) -> dict:
    x = tiny.feeds(g, 2, 8)
    x["input_ids"] = np.array([[2, 6, 12, 12, 13, 8, 6, 40], [2, 40, 41, 6, 6, 6, 12, 2]])
    return x


def test_the_corpus_is_scored_as_before(folder):
    g = storage.load(folder)
    x = feeds(g)
    data = as_dataset([Batch(x)] * 2, g)
    result = PassManager([PruneVocab(multiple_of=1)]).run(g, data, data)
    words = vocabulary.renumbering(result.model)
    assert words.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 40, 41]  # used, special, single letters, named
    with Session(g) as a, Session(result.model) as b:
        want = next(iter(a.run(x).values()))
        got = next(iter(b.run(words.feeds(x, ["input_ids"])).values()))
    np.testing.assert_array_equal(got, words.columns(want))
    assert result.report.validation.values()["sqnr"] == np.inf
    assert g.model.metadata_props == {}


def test_the_written_files_agree_with_the_model(folder, tmp_path_factory):
    g, out = storage.load(folder), tmp_path_factory.mktemp("out") / "small"
    compress(folder, out, passes=["prune-vocab: {multiple_of: 1}"], calibration=[Batch(feeds(g))] * 2, measure=False)
    small = storage.load(out)
    config, tokenizer = (json.loads((out / n).read_text()) for n in ("config.json", "tokenizer.json"))
    rows = next(v for v in small.model.graph.initializers.values() if "embeddings.words" in v.name).shape[0]
    assert rows == config["vocab_size"] == len(tokenizer["model"]["vocab"]) == 13
    assert config["text"]["eos_token_id"] == 8
    assert (out / "vocab.txt").read_text().split() == list(tokenizer["model"]["vocab"])
    assert list(tokenizer["model"]["vocab"].values()) == list(range(13))
    assert "unused" not in tokenizer["model"]["vocab"]
    assert (folder / "config.json").read_text().startswith('{"vocab_size": 50')


def test_a_tokenizer_is_renumbered_once(folder, tmp_path_factory):
    g, outs = storage.load(folder), [tmp_path_factory.mktemp("out") / "small" for _ in range(2)]
    data = {"calibration": [Batch(feeds(g))] * 2, "measure": False}
    compress(folder, outs[0], passes=["prune-vocab: {multiple_of: 1}"], **data)
    compress(outs[0], outs[1], passes=["cleanup"], measure=False)
    first, second = ((out / "tokenizer.json").read_text() for out in outs)
    assert first == second != (folder / "tokenizer.json").read_text()


def test_a_reduced_vocabulary_is_reduced_and_compressed_again(folder, tmp_path_factory):
    """Data of a model that is reduced already comes in its ids, so that only what was renumbered since counts."""
    given = {"evaluation": [feeds(storage.load(folder))], "measure": False}
    passes = ["canonicalize", {"prune-vocab": {"multiple_of": 1}}]
    once = tmp_path_factory.mktemp("once")
    compress(folder, once, passes=passes, calibration=given["evaluation"], **given)
    words = vocabulary.renumbering(storage.load(once))
    fewer = {"input_ids": words.ids(np.array([[2, 6, 12, 12, 6, 2]]))}
    fewer["attention_mask"] = np.ones_like(fewer["input_ids"])
    given["evaluation"] = [fewer]
    same = compress(once, None, passes=["canonicalize", "dynamic-quant: {min_size: 1}"], **given)
    assert same.report.validation.drift.sqnr > 15
    twice = tmp_path_factory.mktemp("twice")
    again = compress(once, twice, passes=passes, calibration=[fewer], **given)
    assert again.report.validation.drift.sqnr > 100
    old, new = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (folder, twice))
    kept = vocabulary.renumbering(storage.load(twice)).kept  # in ids of the first model
    assert len(kept) < len(words.kept)
    assert {t: old[t] for t in new} == {t: int(kept[i]) for t, i in new.items()}
    assert json.loads((twice / "config.json").read_text())["vocab_size"] == len(kept)


def test_a_single_file_has_no_place_for_the_tokenizer(folder, tmp_path):
    g = storage.load(folder)
    with pytest.raises(RecipeError, match="tokenizer of its own"):
        compress(folder, tmp_path / "x.onnx", passes=["prune-vocab"], calibration=[Batch(feeds(g))] * 2, measure=False)
    assert not (tmp_path / "x.onnx").exists()


def test_without_a_tokenizer_nothing_is_cut():
    g = tiny.decoder()
    before = ir.to_proto(g.model).SerializeToString(deterministic=True)
    result = PassManager([PruneVocab()], allow_unchanged=True).run(g, as_dataset([Batch(feeds(g))] * 2, g))
    assert ir.to_proto(result.model.model).SerializeToString(deterministic=True) == before
    assert "no tokenizer.json" in result.report.steps[0].declined[0].why


def test_behind_quantization_the_head_and_its_scales_go_together(folder):
    g = storage.load(folder)
    x = feeds(g)
    data = as_dataset([Batch(x)] * 2, g)
    whole = PassManager([Qdq(min_size=1)]).run(g, data).model
    both = PassManager([Qdq(min_size=1), PruneVocab()]).run(g, data).model
    words = vocabulary.renumbering(both)
    with Session(whole) as a, Session(both) as b:
        want = next(iter(a.run(x).values()))
        got = next(iter(b.run(words.feeds(x, ["input_ids"])).values()))
    np.testing.assert_array_equal(got, words.columns(want))
    assert len(words.kept) % 8 == 0


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_reduced_tokenizer_splits_the_corpus_into_the_same_tokens(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    corpus = ["Return the sum of a list of numbers.", "Open a file for reading, abc abcb bc acc abbc"]
    if kind == "bpe":
        shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    elif kind == "wordpiece":
        made = {**wordpiece(50), "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None}
        made["model"] |= {"max_input_chars_per_word": 100}
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    else:
        pieces = [["<unk>", 0.0], ["▁", -3.0], ["never", -1.0], ["▁a", -2.0], ["bc", -2.5], ["b", -4.0], ["c", -4.0]]
        model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
        spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": spaces, "model": model}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    before = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = before.get_vocab_size()
    used = np.zeros(size, bool)
    ids = [before.encode(text).ids for text in corpus]
    used[np.concatenate(ids).astype(int)] = True
    keep, unknown = vocabulary.closure(tmp_path, used, size)
    assert not keep.all()
    words = Renumbering(np.flatnonzero(keep), size, int(keep[:unknown].sum()))
    vocabulary.rewrite(tmp_path, words)
    after = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert after.get_vocab_size() == keep.sum()
    for text, old in zip(corpus, ids, strict=True):
        assert after.encode(text).ids == words.ids(np.array(old)).tolist()
        assert after.encode(text).tokens == before.encode(text).tokens


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(201, 300))
def test_metadata_says_the_same_again(kept, size):
    words = Renumbering(np.array(sorted(kept)), size, 0)
    again = Renumbering.parse(words.text())
    assert (again.kept.tolist(), again.size, again.unknown) == (sorted(kept), size, 0)
    inner = Renumbering(np.arange(0, len(kept), 2), len(kept), 0).after(words)
    assert inner.kept.tolist() == sorted(kept)[::2]
    assert inner.size == size
