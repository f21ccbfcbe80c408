"""Lines of a card for other libraries: only where the files of a result say that these load it; run where installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onnxcomp as oc
from onnxcomp.files import storage
from onnxcomp.files.pooling import Pooling, pooling
from onnxcomp.graph import Graph
from onnxcomp.reports.consumer_snippets import PACKAGED, more_snippets
from onnxcomp.reports.outcome import Origin, Report, Result
from tests import tiny

BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 50, "hidden_size": 32}
MEAN = Pooling("mean", True)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def encoder(output: str = "last_hidden_state") -> Graph:
    """An encoder whose output has a name that libraries know."""
    g = tiny.encoder()
    g.outputs[0].name = output
    return g


def words(folder: Path) -> None:
    """A tokenizer of fifty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 50)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[UNK]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))


def said(
    folder: Path, g: Graph, config: dict[str, Any] | None = None, pooled: Pooling | None = None, target: str = "cpu"
) -> str:
    """The lines for a model in a folder."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    report = Report(origin=Origin("", "", "", "", "", "", "", target, 0))
    return "\n".join(more_snippets(Result(g, report), folder / "model.onnx", pooled))


def test_each_class_of_optimum_is_for_its_architecture_and_output(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, output, cls in (
        ("BertModel", "last_hidden_state", "FeatureExtraction"),
        ("BertForSequenceClassification", "logits", "SequenceClassification"),
        ("BertForQuestionAnswering", "start_logits", "QuestionAnswering"),
    ):
        config = {**BERT, "architectures": [name]}
        assert f"import ORTModelFor{cls}\n" in said(tmp_path, encoder(output), config)
        assert said(tmp_path, encoder("other"), config) == ""
        assert said(tmp_path, encoder(output), config, target="cuda") == ""


@pytest.mark.parametrize(
    "change", [{"architectures": ["T5Model"], "is_encoder_decoder": True}, {"architectures": []}, {"model_type": None}]
)
def test_what_no_class_is_known_for_gets_no_lines(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert said(tmp_path, encoder(), {**BERT, **change}) == ""


def test_without_tokenizer_or_configuration_there_are_none(tmp_path: Path) -> None:
    assert said(tmp_path, encoder()) == ""
    assert said(tmp_path, encoder(), BERT) == ""


def test_caches_are_for_packages(tmp_path: Path) -> None:
    g = encoder()
    g.inputs[0].name = "past_key_values.0.key"
    assert said(tmp_path, g) == ""
    assert said(tmp_path, g, BERT) == PACKAGED


def test_sentences_are_pooled_only_as_the_source_says(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "sentence_transformers" not in said(tmp_path, encoder(), BERT)
    assert "sentence_transformers" not in said(tmp_path, encoder(), BERT, Pooling("cls", True))
    assert "normalize_embeddings=True" in said(tmp_path, encoder(), BERT, MEAN)
    assert "normalize_embeddings" not in said(tmp_path, encoder(), BERT, Pooling("mean", False))


@pytest.mark.parametrize(
    ("modules", "config", "want"),
    [
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, MEAN),
        (MODULES[:2], {"pooling_mode_cls_token": True}, Pooling("cls", False)),
        (MODULES[:2], {"pooling_mode": "mean"}, Pooling("mean", False)),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
        (
            [*MODULES[:2], {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            {"pooling_mode": "mean"},
            None,
        ),
        ([MODULES[0], {**MODULES[1], "path": "../1_Pooling"}], {"pooling_mode": "mean"}, None),
        ({"a": 1}, {"pooling_mode": "mean"}, None),
        (["a"], [], None),
    ],
)
def test_pooling_is_read_from_the_files_of_the_checkpoint(
    modules: Any, config: Any, want: Pooling | None, tmp_path: Path
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert pooling(tmp_path) == want
    if want is not None:
        (tmp_path / "export.json").write_text(json.dumps({"pooling": dataclasses.asdict(want)}))
        (tmp_path / "modules.json").unlink()
        assert pooling(tmp_path) == want


@pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="optimum is not installed")
def test_the_lines_run(tmp_path: Path) -> None:
    """Needs optimum-onnx, and sentence-transformers for a part of it."""
    source = tmp_path / "source"
    storage.save(encoder(), source)
    (source / "config.json").write_text(json.dumps(BERT))
    (source / "export.json").write_text(json.dumps({"pooling": dataclasses.asdict(MEAN)}))
    words(source)
    batches = [tiny.feeds(encoder(), 2, 9, seed=i) for i in range(3)]
    oc.compress(
        source,
        tmp_path / "out",
        passes=["canonicalize", "dynamic-quant: {min_size: 1}", "lower"],
        evaluation=batches,
        measure=False,
    )
    parts = re.findall(r"^```python\n(.*?)^```", (tmp_path / "out" / "README.md").read_text(), re.M | re.S)
    assert len(parts) == 3
    shown = ("outputs[0].shape", "outputs.last_hidden_state.shape", "outputs.shape")
    for part, shape, want in zip(parts, shown, ("(1, 4, 32)", "[1, 4, 32]", "(1, 32)"), strict=True):
        if "sentence_transformers" in part and importlib.util.find_spec("sentence_transformers") is None:
            continue
        code = part.replace("A sentence to try.", "w1 w2 w3 w4") + f"print({shape})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False
        )
        assert want in done.stdout, done.stderr[-2000:]
