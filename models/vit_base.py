"""vit_base: ViT-base/16 of real size (12 layers of width 768, 86 M parameters) with random weights, for speed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from models import randomise


def checkpoint(out: str | Path, seed: int = 0) -> Path:
    """Write a transformers folder with random weights, different in every layer (346 MB), and its image processor."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(seed)
    ViTImageProcessorPil().save_pretrained(out)
    return randomise.save(ViTForImageClassification(ViTConfig(num_labels=1000)), out, seed)


def export(out: str | Path, seed: int = 0) -> Path:
    """Write the random classifier as an ONNX folder."""
    import onnxcomp as oc

    with tempfile.TemporaryDirectory() as scratch:
        return oc.export(checkpoint(scratch, seed), out)
