"""Encoder-decoders in folders for Optimum, transformers.js and genai: read as these do, the text is transformers'."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.cli import main
from onnxcomp.engine.consumers import package
from onnxcomp.errors import ModelError
from onnxcomp.runtime.sessions import Session

pytestmark = [pytest.mark.export]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from models import dates, dates_text  # noqa: E402
from onnxcomp.exporter import export  # noqa: E402
from tests import decoders, wider  # noqa: E402

NEW = 16
NODE = os.environ.get("ONNXCOMP_NODE_MODULES", "")  # a folder with node_modules/@huggingface/transformers
SCRIPT = """
import { env, AutoTokenizer, AutoModelForSeq2SeqLM } from '@huggingface/transformers';
const [root, name, ...texts] = process.argv.slice(2);
Object.assign(env, { localModelPath: root, allowRemoteModels: false });
const tok = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForSeq2SeqLM.from_pretrained(name);
for (const text of texts) {
  const out = await model.generate({ ...tok(text), max_new_tokens: 14, do_sample: false });
  console.log(tok.decode(out[0], { skip_special_tokens: true }));
}
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Tiny models and their exports, each made once."""
    done: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in done:
            model, task = decoders.build_pair(name), "automatic-speech-recognition" if name == "whisper" else None
            place = tmp_path_factory.mktemp(name)
            done[name] = model, export(model, place / "m", task=task or "text2text-generation")
            model.config.save_pretrained(place / "m")
        return done[name]

    return get


def read_as_consumers_do(encoder: Path, decoder: Path, fed: dict[str, Any], start: int, new: int) -> Any:
    """The likeliest tokens: all caches empty and the flag unset at first, then what was given, cross caches once."""
    with Session(encoder) as first, Session(decoder) as second:
        steady = {"encoder_hidden_states": first.run(fed)["last_hidden_state"]}
        steady |= {"encoder_attention_mask": fed["attention_mask"]} if "attention_mask" in fed else {}
        ports = [p for p in second.inputs if p.name.startswith("past_key_values.")]
        batch = len(steady["encoder_hidden_states"])
        sizes = {p.name: [d if isinstance(d, int) else 0 for d in p.shape[1:]] for p in ports}
        past = {p.name: np.zeros((batch, *sizes[p.name]), p.dtype) for p in ports}
        tokens = [np.full(batch, start)]
        while len(tokens) <= new:
            flag = np.array([len(tokens) > 1])
            feeds = {"input_ids": tokens[-1][:, None], "use_cache_branch": flag, **steady, **past}
            out = second.run({p.name: feeds[p.name] for p in second.inputs})
            given = {name: out[name.replace("past_key_values", "present")] for name in past}
            past = given if len(tokens) == 1 else past | {n: a for n, a in given.items() if ".decoder." in n}
            tokens.append(out["logits"][:, -1].argmax(-1))
    return np.stack(tokens[1:], 1)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_the_text_is_that_of_transformers(exported: Any, name: str, tmp_path: Path) -> None:
    model, folder = exported(name)
    out = package(folder, tmp_path / "out", "optimum")
    assert {p.name for p in out.glob("*.onnx")} == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    for batch in (1, 3):
        fed = decoders.sources(model, batch)
        theirs = decoders.theirs_pair(model, fed, NEW)
        ours = read_as_consumers_do(out / "encoder_model.onnx", out / "decoder_model_merged.onnx", fed, 1, NEW)
        np.testing.assert_array_equal(ours, theirs)


def test_weights_are_stored_once_and_caches_stand_layer_by_layer(exported: Any, tmp_path: Path) -> None:
    """The projections of the states move from the encoder to the decoder; Optimum pairs caches with inputs in order."""
    _, folder = exported("bart")
    out = package(folder, tmp_path / "out", "optimum")
    before, after = (sum(f.stat().st_size for f in x.glob("*.onnx")) for x in (folder, out))
    assert after < 1.05 * before
    graph = ir.load(out / "decoder_model_merged.onnx").graph
    caches = [str(v.name) for v in graph.inputs if str(v.name).startswith("past")]
    kinds = [f"{side}.{kind}" for side in ("decoder", "encoder") for kind in ("key", "value")]
    assert caches == [f"past_key_values.{i}.{x}" for i in range(2) for x in kinds]
    assert [str(v.name) for v in graph.outputs] == [
        "logits",
        *(c.replace("past_key_values", "present") for c in caches),
    ]
    assert [v.name for v in ir.load(out / "encoder_model.onnx").graph.outputs] == ["last_hidden_state"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dates` with weights of 4 bits, rounded to nearest."""
    place = tmp_path_factory.mktemp("dates")
    dates.export(place / "m")
    data = ("--eval", str(dates_text.DATA / "heldout.jsonl"), "--samples", "20")
    made = (
        "compress",
        str(place / "m"),
        "-o",
        str(place / "q"),
        "--preset",
        "int4-fast",
        "--no-measure",
        "--no-html",
        "-q",
    )
    assert main([*made, *data]) == 0
    return place / "q"


def test_a_result_keeps_its_bits_and_its_text(quantized: Path, tmp_path: Path) -> None:
    out = package(quantized, tmp_path / "out", "transformers.js")
    files = {p.name for p in (out / "onnx").iterdir()}
    assert files == {"encoder_model_q4.onnx", "decoder_model_merged_q4.onnx"}
    told = json.loads((out / "config.json").read_text())["transformers.js_config"]
    assert told == {"dtype": {"encoder_model": "q4", "decoder_model_merged": "q4"}}
    tok, (text, target) = dates.reader(), dates_text.read("heldout")[0]
    ids = np.array([tok.encode(text).ids])
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    models = (out / "onnx" / f"{x}_q4.onnx" for x in ("encoder_model", "decoder_model_merged"))
    tokens = read_as_consumers_do(*models, fed, dates.PAD, dates.LONGEST)[0].tolist()
    assert tok.decode(tokens[: tokens.index(dates.END)]) == target


@pytest.mark.skipif(not NODE or shutil.which("node") is None, reason="ONNXCOMP_NODE_MODULES names no transformers.js")
def test_transformers_js_writes_our_text(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    """Text by text, greedily, of 25 held-out dates."""
    package(quantized, tmp_path / "root" / "dates", "transformers.js")
    script = Path(NODE) / "pair_package.mjs"
    script.write_text(SCRIPT)
    texts = [text for text, _ in dates_text.read("heldout")[:25]]
    done = subprocess.run(
        ["node", script, tmp_path / "root", "dates", *texts], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = []
    for text in texts:
        assert main(["generate", str(quantized), text, "--max-new", "14", "--json"]) == 0
        ours.append(json.loads(capsys.readouterr().out)["text"])
    assert done.stdout.splitlines() == ours
    assert len(set(ours)) > 20


def test_genai_writes_transformers_text_about_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 s of features, which is what it takes; and its own features of a file are those of transformers."""
    genai = pytest.importorskip("onnxruntime_genai")
    whole = wider.BY_NAME["whisper"]
    long = {**whole.options, "max_source_positions": 1500}
    monkeypatch.setitem(wider.BY_NAME, "whisper", dataclasses.replace(whole, options=long))
    model = decoders.build_pair("whisper")
    folder = export(model, tmp_path / "m", task="automatic-speech-recognition")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    words = tokenizers.models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[])
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "WhisperTokenizer"}')
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    extractor.save_pretrained(folder)
    out = package(folder, tmp_path / "out", "genai", threads=1)
    loaded, sound = genai.Model(str(out)), decoders.sources(model, 1)["input_features"]
    asked = genai.GeneratorParams(loaded)
    asked.set_search_options(max_length=NEW + 1)
    generator, given, tokens = genai.Generator(loaded, asked), genai.NamedTensors(), []
    given["audio_features"], given["input_ids"] = sound, np.ones((1, 1), np.int32)
    generator.set_inputs(given)
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    theirs = decoders.theirs_pair(model, {"input_features": sound}, NEW)[0].tolist()
    assert tokens == theirs[: len(tokens)]
    assert len(tokens) == NEW or theirs[len(tokens) - 1] == model.config.eos_token_id
    _check_features(loaded, extractor, genai, tmp_path / "s.wav")


def _check_features(loaded: Any, extractor: Any, genai: Any, file: Path) -> None:
    wave_of = 0.3 * np.sin(np.arange(48000) * 2 * np.pi * 440 / 16000) + np.random.default_rng(0).normal(0, 0.02, 48000)
    samples = (wave_of * 32767).astype(np.int16)
    with wave.open(str(file), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
        f.writeframes(samples.tobytes())
    made = loaded.create_multimodal_processor()("a", audios=genai.Audios.open(str(file)))
    ours = np.array(made["audio_features"].as_numpy())
    theirs = extractor(samples.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="np").input_features
    assert np.abs(ours - theirs).mean() < 0.01 * theirs.std()  # frames at the ends differ


def test_what_consumers_cannot_load_is_one_line(exported: Any, tmp_path: Path, capsys: Any) -> None:
    _, made = exported("t5")
    folder = tmp_path / "m"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(consumer: str, **changed: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert main(["package", str(folder), "-o", str(tmp_path / "out"), "--for", consumer]) == 2
        err: str = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "genai has a type for whisper alone (0.18), this is t5" in refused("genai")
    assert "caches of all 3 layers" in refused("optimum", num_decoder_layers=3)
    assert "caches of all 3 layers" in refused("transformers.js", num_decoder_layers=3)
    assert "has 4 heads of 4, Optimum makes 4 of 8" in refused("optimum", d_model=32)
    _, short = exported("whisper")
    with pytest.raises(ModelError, match="reads 20 frames of sound, genai gives 3000"):
        package(short, tmp_path / "out", "genai")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        package(folder, tmp_path / "out", "optimum")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "decoder_model.onnx").unlink()
    with pytest.raises(ModelError, match=r"encoder-decoder without decoder_model\.onnx"):
        package(folder, tmp_path / "out", "optimum")
    assert not (tmp_path / "out").exists()
