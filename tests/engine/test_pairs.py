"""Encoder-decoders as one model: compressed, judged on pairs behind their own encoders, and compared as texts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp
from onnxcomp.cli import main

pytestmark = [pytest.mark.export]
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from models import dates, dates_text  # noqa: E402
from onnxcomp.exporter import export  # noqa: E402
from tests import decoders  # noqa: E402

HELD_OUT = dates_text.DATA / "heldout.jsonl"
CALIBRATION = dates_text.DATA / "calibration.jsonl"
FEW = ("--samples", "40")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dates.export(tmp_path_factory.mktemp("dates") / "m")


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    """Both graphs in int8, judged on 40 pairs."""
    out = model.parent / "small"
    args = ("compress", model, "-o", out, "--preset", "int8-dynamic", "--eval", HELD_OUT, *FEW, "--no-measure")
    assert main([*map(str, args), "--gate", "size<=0.4x", "--gate", "sqnr[last_hidden_state]>=20", "-q"]) == 0
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(map(str, args)))
        return code, *capsys.readouterr()

    return call


def judged(run: Run, *args: object) -> dict[str, Any]:
    code, out, err = run("validate", *args, "--eval", HELD_OUT, *FEW, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def pairs(count: int = 40) -> list[tuple[str, str]]:
    """Those that `--samples` takes."""
    whole = dates_text.read("heldout")
    return [whole[i * len(whole) // count] for i in range(count)]


def test_perplexity_is_that_of_every_token_of_the_targets(model: Path, run: Run) -> None:
    """By transformers: the same loss, over all targets with their ends; batches of padded sources."""
    tok, theirs = dates.reader(), dates.load()
    total, count = 0.0, 0
    for text, target in pairs():
        ids, labels = (torch.tensor([tok.encode(x).ids]) for x in (text, target))
        with torch.no_grad():
            total += float(theirs(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    found = judged(run, model, model)
    assert found["metrics"]["perplexity"]["reference"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["equal"]


def test_both_graphs_are_one_job_with_one_report(model: Path, small: Path, run: Run) -> None:
    report = json.loads((small / "report.json").read_text())
    parts = {name: json.loads((small / f"{name}_model.report.json").read_text()) for name in ("encoder", "decoder")}
    for side in ("original", "result"):
        assert report["size"][side] == sum(p["size"][side] for p in parts.values())
    files = [model / f"{name}.onnx" for name in ("encoder_model", "decoder_model")]
    assert report["size"]["original"] == sum(f.stat().st_size for f in files)
    assert [v["gate"] for v in report["verdicts"]] == [
        *("sqnr>=12", "perplexity-rise<=3%?", "sqnr[last_hidden_state]>=20", "size<=0.4x")
    ]
    outputs = report["validation"]["outputs"]
    assert {"logits", "last_hidden_state", "present.0.encoder.key", "present.2.decoder.value"} <= outputs.keys()
    assert {s["name"] for s in report["steps"]} >= {"encoder_model: dynamic-quant", "decoder_model: dynamic-quant"}
    assert report["source"]["path"] == str(model)
    assert str(model) in report["command"]
    assert run("verify", small)[0] == 0
    # What the job measured is what validate measures of the files.
    again = judged(run, model, small)
    assert again["metrics"]["perplexity"] == report["validation"]["metrics"]["perplexity"]
    assert again["outputs"]["logits"]["sqnr"] == pytest.approx(outputs["logits"]["sqnr"])


def test_a_result_is_judged_behind_its_own_encoder(model: Path, small: Path, tmp_path: Path, run: Run) -> None:
    """The decoder alone loses less; with a broken encoder beside it the same decoder fails."""
    both, alone = judged(run, model, small), judged(run, model, small, "--graph", "decoder_model")
    assert both["outputs"]["logits"]["sqnr"] < alone["outputs"]["logits"]["sqnr"] - 0.5
    mixed = tmp_path / "mixed"
    shutil.copytree(model, mixed)
    shutil.copy(small / "encoder_model.onnx", mixed)
    found = judged(run, model, mixed)["outputs"]
    assert 20 < found["logits"]["sqnr"] < 60
    assert found["last_hidden_state"]["sqnr"] == both["outputs"]["last_hidden_state"]["sqnr"]


def test_texts_are_those_of_transformers_and_are_compared_with_targets(model: Path, small: Path, run: Run) -> None:
    right = dates.correct(dates.load(), dates.reader(), pairs()).mean()
    found = judged(run, model, small, "--generate", "new=14", "--gate", "exact-drop<=5%", "--gate", "wer-rise<=0.05")
    assert found["metrics"]["exact"]["reference"] == right
    assert found["metrics"]["wer"]["reference"] == pytest.approx(1 - right)  # a date is one word
    assert [v["value"] for v in found["verdicts"]] == [
        found["metrics"]["exact"]["reference"] - found["metrics"]["exact"]["candidate"],
        found["metrics"]["wer"]["candidate"] - found["metrics"]["wer"]["reference"],
    ]
    short = judged(run, model, small, "--generate", "new=3")["metrics"]
    assert short["exact"]["reference"] == 0 < short["chrf"]["reference"] < found["metrics"]["chrf"]["reference"]
    code, out, _ = run("generate", small, "the third of may, nineteen forty-five")
    assert code == 0
    assert "1945-05-03" in out


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_data_that_weights_and_ranges_are_fitted_to(model: Path, tmp_path: Path, run: Run, preset: str) -> None:
    args = ("--calibration", CALIBRATION, "--eval", HELD_OUT, "--samples", 16, "--no-measure", "--no-html", "-q")
    code, _, err = run("compress", model, "-o", tmp_path / "out", "--preset", preset, *args)
    assert code == 0, err
    found = judged(run, model, tmp_path / "out", "--generate", "new=14", "--gate", "exact-drop<=5%")
    assert found["verdicts"][0]["passed"]
    assert not (tmp_path / "out" / "report.html").exists()


def test_speed_is_that_of_the_encoder_with_the_first_token_and_of_each_other(
    model: Path, small: Path, run: Run
) -> None:
    code, out, err = run("bench", model, small, "--generate", "prompt=8,new=4", "--runs", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(r["model"], r["shape"]) for r in found["rows"]] == [
        (str(m), shape) for shape in ("prompt=8", "next token of 4, prompt=8") for m in (model, small)
    ]
    bytes_of = [sum(f.stat().st_size for f in m.glob("*.onnx")) for m in (model, small)]
    assert [round(r["size_mib"] * 2**20) for r in found["rows"]] == 2 * bytes_of
    assert {r["samples"] for r in found["rows"]} == {6, 18}  # six rounds of one first and three other tokens
    code, _, err = run("bench", model, small)
    assert (code, "name one with --graph" in err) == (2, True)
    code, _, err = run("bench", model, small, "--generate", "prompt=80,new=4")
    assert (code, "takes at most 64 tokens" in err) == (2, True)


def test_a_gate_on_both_refuses_both(model: Path, tmp_path: Path, run: Run) -> None:
    args = ("--preset", "int8-dynamic", "--eval", HELD_OUT, *FEW, "--no-measure", "--report", tmp_path / "r.json")
    code, _, err = run("compress", model, "-o", tmp_path / "out", *args, "--gate", "size<=0.1x", "-q")
    assert (code, "size<=0.1x: measured 0.3" in err) == (3, True)
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["models"] == [str(model)]
    assert [v["passed"] for v in report["verdicts"]] == [True, True, False]


def test_the_library_gives_the_report_on_both(model: Path) -> None:
    found = onnxcomp.compress(
        model, model.parent / "library", preset="optimize", measure=False, html=False, evaluation="random"
    )
    assert found.path == model.parent / "library" / "decoder_model.onnx"
    assert found.report.models == (str(model),)
    assert found.report.validation is not None
    assert found.report.validation.drift.sqnr is None or found.report.validation.drift.sqnr > 90


def test_columns_have_any_names(model: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"asked": a, "said": b, "text": "no", "target": "no"} for a, b in pairs(6)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ("validate", model, model, "--eval", tmp_path / "x.jsonl", "--generate", "new=14", "--json")
    code, out, err = run(*args, "--text-column", "asked,said")
    assert code == 0, err
    assert json.loads(out)["metrics"]["exact"]["reference"] > 0.5
    code, _, err = run(*args, "--text-column", "asked,answer")
    assert (code, "needs a string 'answer'" in err, "--text-column SOURCE,TARGET" in err) == (2, True, True)


def test_sound_comes_as_arrays_with_tokens(tmp_path: Path, run: Run) -> None:
    pair = decoders.build_pair("whisper")
    folder = export(pair, tmp_path / "m", task="automatic-speech-recognition")
    rng = np.random.default_rng(0)
    sound, ids = decoders.sources(pair, 6), rng.integers(1, pair.config.vocab_size, (6, 5))
    np.savez(tmp_path / "data.npz", **sound, decoder_input_ids=ids)
    data = ("--eval", tmp_path / "data.npz")
    steps = (x for spec in ("canonicalize", "dynamic-quant: {min_size: 1}", "lower") for x in ("--pass", spec))
    args = (*steps, "--no-measure", "--no-html", "--gate", "sqnr>=5", "-q")
    code, _, err = run("compress", folder, "-o", tmp_path / "out", *args, *data)
    assert code == 0, err
    with torch.no_grad():
        tensors = {k: torch.from_numpy(v) for k, v in sound.items()}
        scores = pair(**tensors, decoder_input_ids=torch.from_numpy(ids)).logits.log_softmax(-1)[:, :-1]
    nll = -scores.gather(-1, torch.from_numpy(ids[:, 1:, None])).mean()
    code, out, _ = run("validate", folder, tmp_path / "out", *data, "--json")
    assert json.loads(out)["metrics"]["perplexity"]["reference"] == pytest.approx(float(nll.exp()), rel=1e-4)
    np.savez(tmp_path / "bare.npz", **sound)
    code, _, err = run("validate", folder, tmp_path / "out", "--eval", tmp_path / "bare.npz")
    assert (code, "decoder_input_ids" in err) == (2, True)


def test_what_cannot_be_is_one_line(model: Path, small: Path, tmp_path: Path, run: Run) -> None:
    place = tmp_path / "m"
    shutil.copytree(model, place)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.txt").write_text("a\n")
    compress = ("compress", place, "-o", tmp_path / "out", "--preset", "int8-dynamic", "--no-measure")
    validate = ("validate", place, small, "--eval")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((*compress, "--eval", tmp_path / "x.jsonl"), "needs a string 'target'; it has 'text'"),
        ((*compress, "--eval", tmp_path / "x.txt"), "has no targets"),
        ((*compress, "--eval", HELD_OUT, "--gate", "exact-drop<=1%"), "give it to onnxcomp validate --generate"),
        ((*compress, "--eval", HELD_OUT, "--gate", "sqnr[nothing]>=1"), "no output 'nothing'"),
        ((*validate, HELD_OUT, "--gate", "wer-rise<=0"), "add --generate"),
        ((*validate, HELD_OUT, "--generate", "prompt=3"), "--generate takes new=TOKENS"),
        ((*validate, HELD_OUT, "--by-layer"), "of one graph: name it with --graph"),
        ((*validate, tmp_path / "x.jsonl"), "needs a string 'target'"),
    ]
    for args, why in wrong:
        code, _, err = run(*args)
        assert (code, err.count("\n"), why in err) == (2, 1, True), err
    (place / "tokenizer.json").unlink()
    code, _, err = run(*compress, "--eval", HELD_OUT)
    assert (code, "tokenizer.json" in err) == (2, True)
    (place / "decoder_model.onnx").unlink()
    for args in (compress, (*validate, HELD_OUT), ("generate", place, "a")):
        code, _, err = run(*args)
        assert (code, "encoder-decoder without decoder_model.onnx" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_passes_that_cut_what_both_graphs_share_are_refused(model: Path, tmp_path: Path, run: Run) -> None:
    """Heads of cross attention and words; heads of the decoder's own attention and layers may go."""
    data = ("--calibration", CALIBRATION, "--eval", HELD_OUT, "--samples", 20, "--no-measure", "--no-html", "-q")

    def cut(spec: str) -> tuple[int, str]:
        code, _, err = run("compress", model, "-o", tmp_path / "out", "--pass", "canonicalize", "--pass", spec, *data)
        return code, err

    code, err = cut("prune-heads: {ratio: 0.25}")
    assert (code, "heads of cross attention were cut in the decoder alone" in err, err.count("\n")) == (2, True, 1)
    code, err = cut("prune-vocab")
    assert (code, "compress one graph (--graph NAME)" in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out").exists()
    code, err = cut('prune-heads: {ratio: 0.25, skip: ["*EncDecAttention*", "*.layer.1.*"]}')
    assert code == 0, err
    found = judged(run, model, tmp_path / "out", "--generate", "new=14")["metrics"]
    assert found["exact"]["candidate"] > 0.9
