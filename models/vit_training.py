"""Training and judging small image classifiers: what the scripts of vision models share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained; `average` is the decay of the averaged weights."""

    steps: int
    peak: float
    warmup: int
    decay: float
    smoothing: float
    average: float

    def rate(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, then a cosine to zero."""
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


def fit(model: Model, draw: Callable[[], tuple[torch.Tensor, torch.Tensor]], schedule: Schedule, log=None) -> Model:
    """Train on what `draw` gives for each step, images [B, C, H, W] and labels [B]; the model with averaged weights."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.peak, weight_decay=schedule.decay, betas=(0.9, 0.99))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = time.perf_counter()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.peak * schedule.rate(step)
        x, y = draw()
        loss = torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y, label_smoothing=schedule.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - min(schedule.average, (step + 1) / (step + 10)))
        if log and step % 250 == 249:
            log(f"{step + 1} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s")
    model.load_state_dict(average, strict=False)
    return model.eval()


def correct(model: nn.Module, images: np.ndarray, labels: np.ndarray, batch: int = 512) -> np.ndarray:
    """Whether each image is classified rightly: bool [N]."""
    import torch

    with torch.no_grad():
        parts = [model(pixel_values=x).logits.argmax(-1).numpy() for x in torch.from_numpy(images).split(batch)]
    return np.concatenate(parts) == labels


def interval(right: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Accuracy of answers [N] with its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(0, len(right), (resamples, len(right)))
    low, high = np.quantile(right[draws].mean(1), [0.025, 0.975])
    return {"accuracy": float(right.mean()), "low": float(low), "high": float(high), "images": len(right)}
