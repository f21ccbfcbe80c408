"""Encoder-decoders exported as two graphs: the encoder fills the cross caches, the decoder goes on from its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.cli import main
from onnxcomp.data.datasets import specs
from onnxcomp.engine.generate import generate
from onnxcomp.errors import ExportError
from onnxcomp.files import storage

pytestmark = [pytest.mark.export]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")

from onnxcomp.exporter import export  # noqa: E402
from tests import decoders  # noqa: E402

SOURCE, PAST, NEW = "encoder_sequence_length", "past_decoder_sequence_length", "decoder_sequence_length"
FAMILIES = {"t5": 7, "mbart": 0, "whisper": 0}  # relative positions, learnt ones, sound; seeds of varied text


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Models and their exports, each made once from a checkpoint whose task is found."""
    done: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in done:
            place, model = tmp_path_factory.mktemp(name), decoders.build_pair(name, FAMILIES[name])
            model.save_pretrained(place / "checkpoint")
            done[name] = model, export(place / "checkpoint", place / "out")
        return done[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(exported: Any, name: str) -> None:
    """Of one source and of three, of which the second ends with padding."""
    model, folder = exported(name)
    record = json.loads((folder / "export.json").read_text())
    assert record["task"] == ("automatic-speech-recognition" if name == "whisper" else "text2text-generation")
    assert set(record["graphs"]) == {"encoder_model.onnx", "decoder_model.onnx"}
    assert all(x["verification"]["done"] for x in record["graphs"].values())
    for batch in decoders.BATCHES:
        found = decoders.greedy_pair(model, folder, batch)
        assert found.distinct >= decoders.VARIED
        np.testing.assert_array_equal(found.ours, found.theirs)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_text_or_features_are_written_about(exported: Any, name: str, tmp_path: Path, capsys: Any) -> None:
    """The command's tokens are those of transformers; files beside the graphs tell where text begins and ends."""
    model, made = exported(name)
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 1}')
    fed = decoders.sources(model, 1)
    prompt = " ".join(f"w{i}" for i in fed.get("input_ids", [[]])[0])
    if name == "whisper":
        np.savez(folder / "sound.npz", **fed)
        prompt = str(folder / "sound.npz")
    assert main(["generate", str(folder), prompt, "--max-new", "12", "--json"]) == 0
    expected = decoders.theirs_pair(model, fed, 12)[0].tolist()
    assert json.loads(capsys.readouterr().out)["tokens"] == expected
    settings = {"decoder_start_token_id": 1, "begin_suppress_tokens": expected[:1]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert generate(folder, prompt, max_new=2).tokens[0] != expected[0]
    assert main(["generate", str(folder), prompt, "--draft", str(folder), "--graph", "encoder_model"]) == 2
    if name == "whisper":
        assert main(["generate", str(folder), "no such sound"]) == 2
        assert "the encoder reads input_features" in capsys.readouterr().err


def test_names_and_axes_of_both_graphs(exported: Any) -> None:
    _, folder = exported("t5")
    encoder, decoder = (storage.load(folder / f"{x}_model.onnx") for x in ("encoder", "decoder"))
    assert {s.name: s.shape for s in specs(encoder)} == {
        "input_ids": ("batch_size", SOURCE),
        "attention_mask": ("batch_size", SOURCE),
    }
    layers = [f"{i}.{{}}.{x}" for i in range(2) for x in ("key", "value")]
    cross, own = ([x.format(side) for x in layers] for side in ("encoder", "decoder"))
    assert [v.name for v in encoder.outputs] == ["last_hidden_state", *(f"present.{x}" for x in cross)]
    assert {s.name: s.shape for s in specs(decoder)} == {
        "input_ids": ("batch_size", NEW),
        "encoder_attention_mask": ("batch_size", SOURCE),
        **{f"past_key_values.{x}": ("batch_size", 4, PAST, 4) for x in own},
        **{f"past_key_values.{x}": ("batch_size", 4, SOURCE, 4) for x in cross},
    }
    assert [v.name for v in decoder.outputs] == ["logits", *(f"present.{x}" for x in own)]
    assert {s.name for s in specs(decoder) if s.cache is not None} == {f"past_key_values.{x}" for x in own}


def test_an_image_is_described(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    eye = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    text = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 40, "bos_token_id": 1}
    mouth = transformers.GPT2Config(**text, eos_token_id=2, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, mouth, pad_token_id=0)
    folder = export(
        transformers.VisionEncoderDecoderModel(config=config).eval(), tmp_path / "out", task="image-to-text"
    )
    assert [s.name for s in specs(storage.load(folder / "encoder_model.onnx"))] == ["pixel_values"]
    assert "encoder_attention_mask" not in {s.name for s in specs(storage.load(folder / "decoder_model.onnx"))}


def test_what_an_encoder_decoder_does_not_take_is_one_error(tmp_path: Path) -> None:
    model: Any = decoders.build_pair("bart")
    options: list[tuple[dict[str, Any], str]] = [
        ({"past": False}, "is always exported with caches"),
        ({"static": {"batch": 2}}, "axes of an encoder-decoder stay open: batch"),
    ]
    for given, why in options:
        with pytest.raises(ExportError, match=why):
            export(model, tmp_path / "out", task="text2text-generation", **given)
    assert not (tmp_path / "out").exists()
