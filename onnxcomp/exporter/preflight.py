"""What is wrong with a checkpoint before torch and transformers are imported, which takes seconds: its files say it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from onnxcomp.errors import ExportError
from onnxcomp.exporter.checkpoints import located, task_of

__all__ = ["check_installed", "check_source"]

WEIGHTS = ("*.safetensors", "*.bin")


def check_installed() -> None:
    """Raise `ExportError` where a package that export needs is missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"export needs torch and transformers: pip install 'onnxcomp[export]' (no {' and no '.join(missing)})"
        )


def check_source(source: str | Path, task: str | None, allow_pickle: bool) -> None:
    """Raise `ExportError` for a local folder that is no checkpoint, or none of a model that can be exported."""
    folder = Path(located(source))
    if not folder.is_dir():
        return  # a name on the hub
    config = _config(folder, source)
    if task is None:
        fields = {"architectures": None, "is_encoder_decoder": False} | dict(config)
        task_of(SimpleNamespace(**{str(k): v for k, v in fields.items()}), source)
    _check_weights(folder, source, allow_pickle)


def _config(folder: Path, source: object) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ExportError(f"{source}: config.json cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise ExportError(f"{source}: config.json is no JSON object")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ExportError(f"{source}: config.json names no model_type, so transformers cannot know the architecture")
    if not _known(kind):
        installed = importlib.metadata.version("transformers")
        own = "; it brings its own code, which is never run" if "auto_map" in config else ""
        raise ExportError(f"{source}: transformers {installed} does not know the model type '{kind}'{own}")
    return config


def _known(kind: str) -> bool:
    """Whether the tables of transformers name a model type; read as text, since importing them imports torch."""
    spec = importlib.util.find_spec("transformers")
    folders = [Path(p) / "models" / "auto" for p in (spec.submodule_search_locations or ())] if spec else []
    tables = [file for folder in folders for file in folder.glob("*.py")]
    return not tables or any(f'"{kind}"' in file.read_text("utf-8", errors="replace") for file in tables)


def _check_weights(folder: Path, source: object, allow_pickle: bool) -> None:
    """Raise `ExportError` where there are no weights, or only pickled ones that may not be read."""
    safe, pickled = (any(folder.glob(pattern)) for pattern in WEIGHTS)
    if not safe and not pickled:
        raise ExportError(f"{source}: holds no weights (model.safetensors)")
    if not safe and not allow_pickle:
        raise ExportError(
            f"{source}: its weights are pickled (.bin), which can run code; use --allow-pickle if you trust them"
        )
