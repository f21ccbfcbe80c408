"""minilm: the real all-MiniLM-L6-v2 encoder (BERT, 6 layers of width 384), from the folder `tools/fetch_minilm` fills.

Not shipped; the sentences under `data/minilm` are our own. It has no task head: judge it by agreement with its
original embeddings (mean over the tokens, then cosine).
"""

from __future__ import annotations

from pathlib import Path

CACHE = Path(__file__).parent / "cache" / "minilm"
DATA = Path(__file__).parent / "data" / "minilm"


def checkpoint(folder: str | Path = CACHE) -> Path:
    """The folder with config, tokenizer and weights, or an error that says how to get it."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no MiniLM weights in {folder}; run `tools/fetch_minilm --out {folder}` to download and check them (84 MB)"
        )
    return folder


def export(out: str | Path, seed: int = 0, folder: str | Path = CACHE) -> Path:
    """Write the encoder as an ONNX folder; the weights are given, so `seed` changes nothing."""
    source = checkpoint(folder)
    import onnxcomp as oc

    return oc.export(source, out)
