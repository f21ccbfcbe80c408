"""What measuring commands share: the reference models with their data, held out and drawn."""

from __future__ import annotations

import importlib
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
METRIC = {**dict.fromkeys(VISION, "accuracy"), "docs_lm": "perplexity"}
SHOWN = {**dict.fromkeys(VISION, ("accuracy-drop", "kl")), "docs_lm": ("perplexity-rise", "kl")}
DRAWN = {**dict.fromkeys(VISION, 256), "docs_lm": 128}  # training images, windows of training text, for each seed
HELDOUT = {**dict.fromkeys(VISION), "docs_lm": 64}  # samples; the KL of 64 windows is a mean over 8,000 tokens


@dataclass(frozen=True)
class Case:
    """A reference model in canonical form, its outputs on held-out data, and calibration data by seed."""

    model: Graph
    heldout: Dataset
    reference: Reference
    drawn: dict[int, Dataset]


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
        path = importlib.import_module("onnxcomp").export(checkpoint, work / name / "model", dtype="fp32")
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
