"""bert_base: BERT-base of real size (12 layers of width 768, 109 M parameters), random weights, for speed only."""

from __future__ import annotations

import tempfile
from pathlib import Path


def checkpoint(out: str | Path, seed: int = 0) -> Path:
    """Write a transformers folder with random weights, different in every layer (438 MB)."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig(), add_pooling_layer=False).eval().save_pretrained(out)
    return Path(out)


def export(out: str | Path, seed: int = 0) -> Path:
    """Write the random encoder as an ONNX folder."""
    import onnxcomp as oc

    with tempfile.TemporaryDirectory() as scratch:
        return oc.export(checkpoint(scratch, seed), out)
