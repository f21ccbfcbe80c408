"""bert_base: BERT-base of real size (12 layers of width 768, 109 M parameters), random weights, for speed only."""

from __future__ import annotations

import tempfile
from pathlib import Path

from models import randomise


def checkpoint(out: str | Path, seed: int = 0, layers: int = 12) -> Path:
    """Write a transformers folder with random weights, different in every layer (438 MB of 12 layers)."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    return randomise.save(BertModel(BertConfig(num_hidden_layers=layers)), out, seed)


def export(out: str | Path, seed: int = 0, layers: int = 12) -> Path:
    """Write the random encoder as an ONNX folder."""
    import onnxcomp as oc

    with tempfile.TemporaryDirectory() as scratch:
        return oc.export(checkpoint(scratch, seed, layers), out)
