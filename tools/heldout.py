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
METRIC = {"vit_digits": "accuracy", "docs_lm": "perplexity"}
SHOWN = {"vit_digits": ("accuracy-drop", "kl"), "docs_lm": ("perplexity-rise", "kl")}
DRAWN = {"vit_digits": 256, "docs_lm": 128}  # training images, windows of training text, for each seed
HELDOUT = {"vit_digits": None, "docs_lm": 64}  # samples; the KL of 64 windows is a mean over 8,000 tokens


@dataclass(frozen=True)
class Case:
    """A reference model in canonical form, its outputs on held-out data, and calibration data by seed."""

    model: Graph
    heldout: Dataset
    reference: Reference
    drawn: dict[int, Dataset]


def opened(name: str, seeds: Sequence[int], work: Path, samples: int | None = None, drawn: int | None = None) -> Case:
    """Export one model, run it on its held-out data, and draw calibration data for each seed."""
    path = importlib.import_module(f"models.{name}").export(work / name)
    model = storage.load(path)
    heldout = load_data(DATA / name / "heldout.npz", model, None, batch=64, samples=samples or HELDOUT[name])
    reference = Reference(model, heldout, metrics=[METRIC[name]], scratch=work / name / "reference")
    canonicalize(model)
    return Case(model, heldout, reference, {seed: _drawn(name, seed, model, work / name, drawn) for seed in seeds})


def _drawn(name: str, seed: int, model: Graph, work: Path, count: int | None) -> Dataset:
    """Calibration samples of one seed."""
    with np.load(DATA / name / "train.npz") as held:
        arrays = {k: held[k] for k in held.files}
    if name == "docs_lm":
        ids = importlib.import_module("models.docs_lm").rows_of(arrays["tokens"].astype(np.int64))
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole = len(next(iter(arrays.values())))
    chosen = np.sort(np.random.default_rng(seed).choice(whole, count or DRAWN[name], replace=False))
    path = work / f"calibration-{seed}.npz"
    np.savez(path, **{k: a[chosen] for k, a in arrays.items()})
    return load_data(path, model, None, batch=32)
