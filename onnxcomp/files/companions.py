"""The files beside a model that its users need: configuration, tokenizer, processor."""

from __future__ import annotations

import shutil
from pathlib import Path

from onnxcomp.files.atomic import replacing

__all__ = ["COMPANIONS", "companions", "copy_companions"]

COMPANIONS = (  # files beside a checkpoint or model that users of the result need
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
)


def companions(source: Path) -> list[str]:
    """Names of tokenizer, processor and configuration files in a folder."""
    return [name for name in COMPANIONS if (source / name).is_file()]


def copy_companions(source: Path, out: Path) -> list[Path]:
    """Copy tokenizer, processor and configuration files from one folder to another; returns the copies."""
    folder = source if source.is_dir() else source.parent
    if out.exists() and folder.samefile(out):
        return []
    copies = []
    for name in companions(folder):
        with replacing(out / name) as temporary:
            shutil.copyfile(folder / name, temporary)
        copies.append(out / name)
    return copies
