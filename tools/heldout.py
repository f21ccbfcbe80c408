"""What measuring commands share: the reference models with their data, held out and drawn."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Dataset, load_data
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.validation.compare import Reference

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "models" / "data"
VISION = ("vit_digits", "vit_glyphs")
# The real MiniLM: the files of our own sentences that it is calibrated on, and how many other texts are drawn for each
# seed: doc strings alone (`foreign`), natural sentences alone, or half of each.
SENTENCES = {
    "minilm foreign": (("calibration",), {"docstrings": 1100}),
    "minilm": (("calibration", "natural"), {"examples": 2200}),
    "minilm both": (("calibration", "natural"), {"docstrings": 1100, "examples": 1100}),
}
JUDGES = ("heldout", "natural_heldout")  # natural sentences that no calibration set holds
METRIC = {**dict.fromkeys(VISION, "accuracy"), "docs_lm": "perplexity", **dict.fromkeys(SENTENCES, "")}
SHOWN = {
    **dict.fromkeys(VISION, ("accuracy-drop", "kl")),
    "docs_lm": ("perplexity-rise", "kl"),
    **dict.fromkeys(SENTENCES, ("pooled-sqnr", "pooled-sqnr of docstrings")),
}
DRAWN = {**dict.fromkeys(VISION, 256), "docs_lm": 128}  # training images, windows of training text, for each seed
HELDOUT = {**dict.fromkeys(VISION), "docs_lm": 64}  # samples; the KL of 64 windows is a mean over 8,000 tokens


@dataclass(frozen=True)
class Case:
    """A reference model in canonical form, its outputs on held-out data, and calibration data by seed."""

    model: Graph
    heldout: Dataset
    reference: Reference
    drawn: dict[int, Dataset]
    second: Reference | None = None  # of the other domain


def folder(name: str, work: Path) -> Path:
    """Where a model's data lies; where a script makes it, it is written first."""
    if (DATA / name / "heldout.npz").exists():
        return DATA / name
    made = work / name / "data"
    if not made.exists():
        importlib.import_module(f"models.{name}").write_data(made)
    return made


def opened(
    name: str,
    seeds: Sequence[int],
    work: Path,
    samples: int | None = None,
    drawn: int | None = None,
    *,
    planted: bool = False,
) -> Case:
    """Export one model, run it on its held-out data, and draw calibration data for each seed.

    A `planted` one has activation outliers and the same outputs (`models/outliers.py`).
    """
    if planted:
        outliers = importlib.import_module("models.outliers")
        checkpoint = outliers.plant(ROOT / "models" / "weights" / name, work / name / "planted")
        path = importlib.import_module("onnxcomp").export(checkpoint, work / name / "model", dtype="fp32", past=False)
    else:
        path = importlib.import_module(f"models.{name}").export(work / name / "model")
    model = storage.load(path)
    heldout = load_data(folder(name, work) / "heldout.npz", model, None, batch=64, samples=samples or HELDOUT[name])
    reference = Reference(model, heldout, metrics=[METRIC[name]], scratch=work / name / "reference")
    canonicalize(model)
    return Case(model, heldout, reference, {seed: _drawn(name, seed, model, work / name, drawn) for seed in seeds})


def _drawn(name: str, seed: int, model: Graph, work: Path, count: int | None) -> Dataset:
    """Calibration samples of one seed."""
    with np.load(folder(name, work.parent) / "train.npz") as held:
        arrays = {k: held[k] for k in held.files}
    if name == "docs_lm":
        ids = importlib.import_module("models.docs_lm").rows_of(arrays["tokens"].astype(np.int64))
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole = len(next(iter(arrays.values())))
    chosen = np.sort(np.random.default_rng(seed).choice(whole, count or DRAWN[name], replace=False))
    path = work / f"calibration-{seed}.npz"
    np.savez(path, **{k: a[chosen] for k, a in arrays.items()})
    return load_data(path, model, None, batch=32)


# ---- the real MiniLM ------------------------------------------------------------------------------------------------


def opened_minilm(name: str, seeds: Sequence[int], work: Path, source: Path | None, count: int | None = None) -> Case:
    """MiniLM, exported to the folder `source` or exported now, judged on natural sentences and left-out doc strings."""
    source = source or importlib.import_module("models.minilm").export(work / "minilm").parent
    model = storage.load(source / "model.onnx")
    judges = {
        "natural": [text for part in JUDGES for text in sentences(part)],
        "docstrings": [json.loads(line)["text"][:300] for line in (DATA / "docs_lm" / "heldout.jsonl").open()],
    }
    data = {k: _texts(work / f"{k}.jsonl", texts, model, source) for k, texts in judges.items()}
    answers = {k: Reference(model, d, scratch=work / f"{name}-{k}") for k, d in data.items()}
    files, others = SENTENCES[name]
    known = [text for part in files for text in sentences(part)]
    draw = {"docstrings": docstrings, "examples": examples}
    drawn = {}
    for seed in seeds:
        more = [text for kind, usual in others.items() for text in draw[kind](count or usual, seed)]
        drawn[seed] = _texts(work / f"{name}-{seed}.jsonl", known + more, model, source)
    canonicalize(model)
    return Case(model, data["natural"], answers["natural"], drawn, answers["docstrings"])


def sentences(part: str) -> list[str]:
    """The sentences of our own of one file under `models/data/minilm`."""
    return [json.loads(line)["text"] for line in (DATA / "minilm" / f"{part}.jsonl").open(encoding="utf-8")]


def examples(count: int, seed: int) -> list[str]:
    """Examples of usage from WordNet: natural sentences of ten words and more."""
    known = sentences("examples")
    return [known[i] for i in np.random.default_rng(seed).permutation(len(known))[:count]]


def docstrings(count: int, seed: int) -> list[str]:
    """Doc strings of 40 to 300 characters, drawn from the training text of `docs_lm`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "weights" / "docs_lm")
    with np.load(DATA / "docs_lm" / "train.npz") as held:
        tokens = held["tokens"].astype(np.int64)
    starts = np.flatnonzero(tokens == tokenizer.bos_token_id)
    ends = [*starts[1:], len(tokens)]
    fitting: list[str] = []
    for i in np.random.default_rng(seed).permutation(len(starts)):
        text = tokenizer.decode(tokens[starts[i] + 1 : ends[i]])
        if 40 <= len(text) <= 300:
            fitting.append(text)
        if len(fitting) == count:
            break
    return fitting


def _texts(path: Path, texts: Sequence[str], model: Graph, source: Path) -> Dataset:
    """Texts as data, by length: a batch of texts of one length has no padding to compute."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in sorted(texts, key=len)), encoding="utf-8")
    return load_data(path, model, source, batch=32)
