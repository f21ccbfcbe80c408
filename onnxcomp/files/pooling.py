"""How a checkpoint of sentence-transformers makes one vector of a text, read from its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Pooling", "pooling"]

LARGEST = 1 << 20  # bytes of such a file; a larger one is none


@dataclass(frozen=True)
class Pooling:
    """What is taken of the tokens' vectors, such as `mean` or `cls`, and whether vectors get length 1."""

    mode: str
    normalized: bool


def pooling(folder: Path) -> Pooling | None:
    """What `modules.json` of a folder says, or its `export.json`; None for none, and for other modules beside these."""
    told = _read(folder / "export.json")
    if isinstance(told, dict) and isinstance(known := told.get("pooling"), dict):
        return Pooling(str(known.get("mode", "")), known.get("normalized") is True)
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        return None
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        return None
    place = Path(str(modules[1].get("path", "")))
    if place.is_absolute() or ".." in place.parts:
        return None
    mode = _mode(_read(folder / place / "config.json"))
    return Pooling(mode, "Normalize" in kinds) if mode else None


def _mode(config: Any) -> str:
    """The one mode of a pooling's configuration, in either of its spellings; empty for several."""
    if not isinstance(config, dict):
        return ""
    if isinstance(config.get("pooling_mode"), str):
        return str(config["pooling_mode"])
    prefix = "pooling_mode_"
    modes = [
        k.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for k, on in config.items()
        if k.startswith(prefix) and on is True
    ]
    return modes[0] if len(modes) == 1 else ""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None
