"""Reference models: trained ones are as good as they claim, planted outliers change no output, data do not overlap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reference models need torch")
pytest.importorskip("transformers", reason="reference models need transformers")

from models import dates, dates_text, docs_lm, docs_text, llama, minilm, outliers, vit_digits, vit_glyphs  # noqa: E402

DATA = Path(docs_text.DATA).parent
WEIGHTS = Path(docs_lm.WEIGHTS).parent
MARGIN = 0.65  # docs_lm must stay below this part of the trigram's perplexity


def rows(path: Path) -> list[dict[str, str]]:
    """The objects of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(name: str, count: int) -> dict[str, torch.Tensor]:
    """The first held-out samples of a shipped model, as its inputs."""
    data = np.load(DATA / name / "heldout.npz")
    return {key: torch.from_numpy(data[key][:count]) for key in data.files if key != "labels"}


def logits(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a checkpoint answers."""
    with torch.no_grad():
        return outliers.load(folder)(**inputs).logits


def site_ratios(folder: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Largest over median channel of every site a checkpoint may have outliers at, on real data."""
    model = outliers.load(folder)
    sites = outliers.SITES[model.config.model_type](model)
    peaks: list[np.ndarray] = []
    for site in sites:
        site.readers[0].register_forward_pre_hook(lambda _m, x: peaks.append(x[0].flatten(0, -2).abs().amax(0).numpy()))
    with torch.no_grad():
        model(**inputs)
    return outliers.ratios(peaks)


def test_vit_digits_is_accurate_on_other_writers():
    result = vit_digits.report()
    assert result["images"] == 899
    assert result["accuracy"] >= 0.97


def test_vit_glyphs_is_neither_perfect_nor_poor_on_images_of_another_seed():
    result = vit_glyphs.report()
    assert result["images"] == 3000
    assert 0.85 <= result["low"] <= result["high"] <= 0.97


def test_vit_glyphs_draws_parts_that_do_not_overlap_and_stay_the_same():
    again = vit_glyphs.arrays("calibration")[0]
    np.testing.assert_array_equal(vit_glyphs.arrays("calibration")[0], again)
    seen = {image.tobytes() for image in vit_glyphs.arrays("train")[0]}
    assert not seen & {image.tobytes() for image in again}
    assert sum(p.numel() for p in vit_glyphs.load().parameters()) >= 1_000_000


def test_dates_are_written_right_on_days_that_training_has_in_no_spelling():
    """No line of a table decides: each spelling is right almost always."""
    pairs = dates_text.read("heldout")
    right = dates.correct(dates.load(), dates.reader(), pairs[:400])
    assert right.mean() >= 0.95
    assert dates.correct(dates.load(), dates.reader(), [("5. mai 1961", "1961-05-06")]).tolist() == [False]
    held = {target for _, target in pairs}
    trained = {target for _, target in [*dates_text.pairs(20000, 9), *dates_text.read("calibration")]}
    assert not held & trained
    assert len(trained) > 10000
    assert dates_text.read("heldout") == list(dates_text.pairs(1000, 2, dates_text.HELD_OUT))


def test_docs_lm_beats_the_trigram():
    ids = np.load(DATA / "docs_lm" / "heldout.npz")["input_ids"][::4]
    data = np.load(DATA / "docs_lm" / "train.npz")
    tune = docs_lm.rows_of(data["tune"])[::4]
    baseline = docs_lm.ngram.perplexities(data["tokens"], tune, ids, docs_text.VOCAB)
    model = docs_lm.logits_perplexity(docs_lm.load(), ids)
    assert baseline["trigram"] < baseline["bigram"] < baseline["unigram"]
    assert model < MARGIN * baseline["trigram"]


@pytest.mark.parametrize("name", ["docs_lm", "vit_digits"])
def test_planted_outliers_change_no_output(name: str, tmp_path: Path):
    source, inputs = WEIGHTS / name, held_out(name, 16)
    planted = outliers.plant(source, tmp_path / "planted")
    before, after = logits(source, inputs), logits(planted, inputs)
    assert float((before - after).norm() / before.norm()) < 1e-5
    assert sorted(p.name for p in planted.iterdir()) == sorted(p.name for p in source.iterdir())


@pytest.mark.parametrize("name", ["docs_lm", "vit_digits"])
def test_planted_outliers_are_large(name: str, tmp_path: Path):
    inputs = held_out(name, 16)
    found = site_ratios(outliers.plant(WEIGHTS / name, tmp_path), inputs)
    assert len(found) >= 8
    assert found.min() >= 20


def test_planting_needs_a_known_architecture(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match="known: "):
        outliers.plant(tmp_path / "gpt", tmp_path / "out")


def test_bert_and_grouped_values_are_scaled_exactly(tmp_path: Path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    BertModel(config).eval().save_pretrained(tmp_path / "bert")
    ids = torch.arange(24).reshape(2, 12)
    planted = outliers.plant(tmp_path / "bert", tmp_path / "planted")
    with torch.no_grad():
        before, after = (outliers.load(folder)(ids).last_hidden_state for folder in (tmp_path / "bert", planted))
    assert torch.allclose(before, after, atol=1e-5)
    assert outliers.Site("value", torch.nn.Identity(), (), repeat=2, head=4).columns(5) == [9, 13]


def test_held_out_modules_are_in_no_other_part():
    parts = json.loads((DATA / "docs_lm" / "modules.json").read_text(encoding="utf-8"))
    heldout, tune, train = (set(parts[name]) for name in ("heldout", "tune", "train"))
    assert heldout
    assert tune
    assert not heldout & tune
    assert not (heldout | tune) & train
    assert {row["module"] for row in rows(DATA / "docs_lm" / "heldout.jsonl")} <= heldout
    assert {row["module"] for row in rows(DATA / "docs_lm" / "calibration.jsonl")} <= train


@pytest.mark.parametrize("name", ["docs_lm", "minilm"])
def test_no_held_out_text_is_in_the_calibration(name: str):
    heldout, calibration = (
        [row["text"] for row in rows(DATA / name / f"{part}.jsonl")] for part in ("heldout", "calibration")
    )
    assert len(set(heldout)) == len(heldout) >= 60
    assert len(set(calibration)) == len(calibration) >= 60
    assert not set(heldout) & set(calibration)


def test_held_out_windows_and_images_are_in_no_training_array():
    images = {
        part: {image.tobytes() for image in vit_digits.arrays(part)[0]} for part in ("train", "calibration", "heldout")
    }
    assert images["calibration"] <= images["train"]
    assert not images["heldout"] & images["train"]
    windows = {
        part: {w.tobytes() for w in np.load(DATA / "docs_lm" / f"{part}.npz")["input_ids"]}
        for part in ("calibration", "heldout")
    }
    stream = np.load(DATA / "docs_lm" / "train.npz")["tokens"].astype(np.int64).tobytes()
    assert not windows["heldout"] & windows["calibration"]
    assert not any(window in stream for window in windows["heldout"])
    assert all(window in stream for window in windows["calibration"])


def test_processors_load_beside_the_weights():
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    pixels = AutoImageProcessor.from_pretrained(WEIGHTS / "vit_digits")(
        Image.new("L", (8, 8), 255), return_tensors="np"
    )["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    assert float(pixels.max()) == 1.0
    batch = AutoTokenizer.from_pretrained(WEIGHTS / "docs_lm")(
        ["Return the length of the sequence.", "Close."], padding=True, return_tensors="np"
    )
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].min() == 0


def test_images_come_back_through_the_processor_unchanged(tmp_path: Path):
    from PIL import Image

    assert vit_digits.write_images(tmp_path, "calibration", 12) == 12
    pixels, labels = vit_digits.arrays("calibration")
    for path in tmp_path.rglob("*.png"):
        at = int(path.stem.split("_")[1])
        found = vit_digits.processor()(Image.open(path), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found, pixels[at], atol=1e-6)
        assert path.parent.name == str(labels[at])


def test_shipped_files_stay_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 15e6
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 4e6


def test_written_llama_has_distinct_weights_and_runs(tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime", reason="runs the written graph")
    size = llama.Size(32, 2, 64, 4, 2, vocab=50, positions=32)
    folder = llama.write(tmp_path, size)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.arange(14).reshape(2, 7)
    mask = np.ones_like(ids)
    full = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    mask[1, 4:] = 0
    padded = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    assert full.shape == (2, 7, 50)
    assert np.isfinite(full).all()
    np.testing.assert_allclose(full[1, :4], padded[1, :4], atol=1e-5)
    import onnx_ir as ir

    weights = [
        v.const_value.numpy().tobytes()
        for k, v in ir.load(folder / "model.onnx").graph.initializers.items()
        if "layers" in k
    ]
    assert len(set(weights)) == len(weights) == 18


def test_a_missing_minilm_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="tools/fetch_minilm"):
        minilm.checkpoint(tmp_path)
