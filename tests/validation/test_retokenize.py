"""A reduced vocabulary is judged on texts that its tokenizer splits, per original token, and on rows that agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from onnxcomp import compress
from onnxcomp.cli.validate_models import compare
from onnxcomp.data import vocabulary
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.settings import Settings
from onnxcomp.files import storage
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.compare import validate
from onnxcomp.validation.retokenize import RemovedTokens
from tests import tiny

TOKENIZER = Path(__file__).parents[2] / "models" / "weights" / "docs_lm" / "tokenizer.json"
CORPUS = ["Return the sum of a list of numbers.", "Open a file for reading, and close the file."]
KNOWN = ["Return the list of numbers.", "close the file for reading"]
OTHERS = ["Raise an exception when the connection is closed.", "Return a dictionary, the default module"]
ROLES = {"tokens": "input_ids", "mask": "attention_mask"}


def written(folder: Path, g, config: dict) -> Path:
    folder.mkdir()
    tiny.external(g, folder)
    shutil.copy(TOKENIZER, folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 2048, "max_position_embeddings": 64, **config}))
    return folder


def jsonl(path: Path, texts, labels=()) -> Path:
    rows = [{"text": t} | ({"label": labels[i]} if labels else {}) for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def reduced(folder: Path, out: Path, data: Path) -> Path:
    spec = ["prune-vocab: {multiple_of: 1}"]
    compress(folder, out, passes=spec, calibration=str(data), evaluation=str(data), measure=False)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("decoder")
    folder = written(home / "whole", tiny.decoder(vocabulary=2048), {})
    return folder, reduced(folder, home / "small", jsonl(home / "corpus.jsonl", CORPUS))


def split(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def likelihood(folder: Path, ids: list[int]) -> float:
    """Negative log-likelihood of all tokens but the first."""
    with Session(storage.load(folder)) as s:
        x = next(
            iter(s.run({"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}).values())
        )
    x = x[0].astype(np.float64)
    scores = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return float(-scores[np.arange(len(ids) - 1), ids[1:]].sum())


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_perplexity_is_of_texts_split_again_per_original_token(models, tmp_path, kind):
    whole, small = models
    texts = [KNOWN[0], *OTHERS]
    old, new = ([split(f, t) for t in texts] for f in models)
    assert len(old[0]) == len(new[0])
    assert all(len(b) > len(a) for a, b in zip(old[1:], new[1:], strict=True))
    count = sum(len(x) - 1 for x in old)
    want = [np.exp(sum(likelihood(f, x) for x in ids) / count) for f, ids in ((whole, old), (small, new))]
    if kind == "text":
        source = jsonl(tmp_path / "held.jsonl", texts)
    else:  # ids, padded on the left
        width = max(map(len, old))
        ids = np.array([[1] * (width - len(x)) + x for x in old])
        source = tmp_path / "held.npz"
        np.savez(source, input_ids=ids, attention_mask=np.array([[0] * (width - len(x)) + [1] * len(x) for x in old]))
    done = compare(whole, small, Settings(evaluation=str(source)), gates=["perplexity-rise<=1e9"])
    found = done.validation.metrics["perplexity"]
    np.testing.assert_allclose([found.reference, found.candidate], want, rtol=1e-4)
    assert "texts of 2 samples were re-tokenized for perplexity, which counts the original's tokens" in done.headline()
    assert done.json()["notes"] == list(done.validation.notes)
    np.testing.assert_allclose(done.verdicts[0].value, want[1] / want[0] - 1, rtol=1e-4)


def test_drift_is_of_the_rows_before_a_removed_token(models):
    whole, small = models
    data = [
        Batch({"input_ids": np.array([x]), "attention_mask": np.ones((1, len(x)), np.int64)})
        for t in OTHERS
        if (x := split(whole, t))
    ]
    v = validate(storage.load(whole), storage.load(small), as_dataset(data, storage.load(whole)))
    words = vocabulary.renumbering(storage.load(small))
    first = [next(i for i, t in enumerate(split(whole, text)) if t not in words.kept) for text in OTHERS]
    assert v.drift.rows == sum(first)
    assert v.values()["sqnr"] > 120  # the table's rows and the head's columns are the same numbers
    assert "drift is measured on rows before the first of them" in v.notes[0]


def test_where_no_row_agrees_drift_reads_the_unknown_token(models):
    whole, small = models
    gone = np.setdiff1d(np.arange(2048), vocabulary.renumbering(storage.load(small)).kept)[:4]
    feeds = {"input_ids": np.array([[0, *gone]]), "attention_mask": np.array([[0, 1, 1, 1, 1]])}  # padded on the left
    v = validate(storage.load(whole), storage.load(small), as_dataset([Batch(feeds)], storage.load(whole)))
    assert v.drift.rows == 4
    assert "drift reads them as the unknown token" in v.notes[0]


def test_what_is_all_known_needs_no_words(models, tmp_path):
    done = compare(*models, Settings(evaluation=str(jsonl(tmp_path / "known.jsonl", KNOWN))))
    assert done.validation.notes == ()
    assert done.validation.values()["sqnr"] > 120


def test_ids_that_are_no_text_of_the_tokenizer_stay_as_they_are(models):
    whole, small = models
    g, candidate = storage.load(whole), storage.load(small)
    words = vocabulary.renumbering(candidate)
    letters = split(whole, "Return")[1:]
    assert len(letters) == 1
    pieces = [t for c in "Return" for t in split(whole, c)[1:]]  # never split like this
    gone = int(np.setdiff1d(np.arange(300, 2048), words.kept)[0])
    ids = np.array([[0, *pieces, gone]])
    data = as_dataset([Batch({"input_ids": ids, "attention_mask": np.ones_like(ids)})], g)
    v = validate(g, candidate, data)
    assert "1 samples read them as the unknown token" in v.notes[0]
    want = np.exp(likelihood(small, words.ids(ids)[0].tolist()) / (ids.shape[1] - 1))
    np.testing.assert_allclose(v.metrics["perplexity"].candidate, want, rtol=1e-4)


def test_without_a_tokenizer_the_note_says_so(models, tmp_path):
    whole, small = models
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    (bare / "tokenizer.json").unlink()
    ids = np.array([split(whole, OTHERS[0])])
    data = as_dataset([Batch({"input_ids": ids, "attention_mask": np.ones_like(ids)})], storage.load(bare))
    v = validate(storage.load(bare), storage.load(small), data)
    assert "since there is no tokenizer.json beside the model" in v.notes[0]


def test_texts_longer_than_the_model_takes_are_not_split_again(models, tmp_path):
    whole, small = models
    short = tmp_path / "short"
    shutil.copytree(whole, short)
    (short / "config.json").write_text(json.dumps({"max_position_embeddings": len(split(whole, OTHERS[0]))}))
    done = compare(short, small, Settings(evaluation=str(jsonl(tmp_path / "held.jsonl", OTHERS[:1]))))
    assert "too long" in done.validation.notes[0]


def test_accuracy_is_of_texts_split_again(tmp_path):
    folder = written(tmp_path / "whole", tiny.encoder(vocabulary=2048, classes=3, positions=64), {})
    small = reduced(folder, tmp_path / "small", jsonl(tmp_path / "corpus.jsonl", CORPUS, [0, 1]))
    texts = [*OTHERS, *KNOWN] * 2
    answers = []
    for t in texts:
        ids = np.array([split(small, t)])
        with Session(storage.load(small)) as s:
            answers.append(
                int(next(iter(s.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}).values())).argmax())
            )
    done = compare(folder, small, Settings(evaluation=str(jsonl(tmp_path / "held.jsonl", texts, answers))))
    assert done.validation.metrics["accuracy"].candidate == 1
    assert "re-tokenized for accuracy" in done.validation.notes[0]
    assert done.validation.drift.rows == 4  # an encoder's answer agrees where the whole text does


def test_where_tokens_are_gone_is_counted_without_padding():
    words = vocabulary.Renumbering(np.array([0, 1, 2]), 5, 0)
    feeds = {"input_ids": np.array([[1, 4, 2], [3, 3, 1]]), "attention_mask": np.array([[1, 1, 1], [0, 0, 1]])}
    gone = RemovedTokens.of([Batch(feeds), Batch({k: v[:1, :1] for k, v in feeds.items()})], words, ROLES)
    assert gone.share == 1 / 5
    assert gone.samples == [(0, 0)]
    assert (gone.prefixes, gone.complete) == (True, True)
    first = Batch({"input_ids": np.array([[1, 4, 1]]), "attention_mask": np.array([[0, 1, 1]])})
    gone = RemovedTokens.of([first], words, ROLES)
    assert (gone.prefixes, gone.complete) == (False, False)
