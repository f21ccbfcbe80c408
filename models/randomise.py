"""Random checkpoints whose layers differ in every parameter: fresh models have equal norm gains and zero biases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save(model: PreTrainedModel, out: str | Path, seed: int = 0) -> Path:
    """Add noise of 0.05 to every vector parameter, so that no two are equal, and write the checkpoint."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(out)
    return Path(out)
