"""manifest.json of a result folder: the hashes of all its files, and of the sources they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError
from onnxcomp.files.atomic import replacing
from onnxcomp.files.stored import file_hash
from onnxcomp.version import __version__

__all__ = ["MANIFEST", "Entry", "Made", "Manifest", "read", "renew"]

MANIFEST = "manifest.json"
SCHEMA = 1  # of manifest.json
LARGEST = 16 << 20  # bytes of a manifest; a larger file is none


@dataclass(frozen=True)
class Entry:
    """A file of the result: SHA-256 (hex) and bytes."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> Entry:
        """What a file has now."""
        return cls(file_hash(path), path.stat().st_size)


@dataclass(frozen=True)
class Made:
    """Where a model of the folder came from: SHA-256 (hex) of the source's files by name, and of the recipe."""

    source: Mapping[str, str]
    recipe: str
    target: str


@dataclass(frozen=True)
class Manifest:
    """The files of a result folder by name, and how its models were made, by file name."""

    files: dict[str, Entry] = field(default_factory=dict)
    models: dict[str, Made] = field(default_factory=dict)

    def text(self) -> str:
        """The content of manifest.json: sorted, sealed with the hash of all that is in it."""
        made = {
            name: {"source": dict(x.source), "recipe": x.recipe, "target": x.target} for name, x in self.models.items()
        }
        whole: dict[str, Any] = {
            "schema_version": SCHEMA,
            "made_by": f"onnxcomp {__version__}",
            "models": made,
            "files": {name: {"sha256": x.sha256, "bytes": x.bytes} for name, x in self.files.items()},
        }
        return _sealed(whole)

    def followed(self, staging: Path, gone: Collection[str], folder: Path, made: Mapping[str, Made]) -> Manifest:
        """The manifest after the files of `staging` took their places in `folder`, which the files `gone` leave."""
        staged = {p.name: p for p in sorted(staging.iterdir()) if p.is_file() and p.name != MANIFEST}
        files = {k: x for k, x in self.files.items() if k not in gone and (folder / k).is_file()}
        files |= {name: Entry.of(p) for name, p in staged.items()}
        models = {k: x for k, x in self.models.items() if k in files} | dict(made)
        return Manifest(files, models)


def renew(folder: Path, paths: Iterable[Path]) -> None:
    """Take down what files of a result are now, where they were made again and its manifest lists them.

    Raises `ModelError` for a manifest that cannot be read, `OSError` where it cannot be written.
    """
    known = read(folder)
    changed = [p.name for p in paths if known is not None and p.name in known.files]
    if known is None or not changed:
        return
    known.files.update({name: Entry.of(folder / name) for name in changed})
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(known.text(), "utf-8")


def _sealed(whole: dict[str, Any]) -> str:
    body = {k: v for k, v in whole.items() if k != "seal"}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "seal": seal}, indent=2, sort_keys=True) + "\n"


def read(folder: Path) -> Manifest | None:
    """The manifest of a result folder, None where there is none.

    Raises `ModelError` for a file that is no manifest of ours, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        if not path.exists():
            return None
        text = path.read_text("utf-8") if path.stat().st_size <= LARGEST else ""
        raw = json.loads(text)
        if _sealed(raw) != text:
            raise ModelError(f"{path}: was changed since onnxcomp wrote it, or was not written by onnxcomp")
        files = {str(k): Entry(x["sha256"], x["bytes"]) for k, x in raw["files"].items()}
        models = {str(k): Made(x["source"], x["recipe"], x["target"]) for k, x in raw["models"].items()}
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: is no manifest that onnxcomp wrote") from e
    if outside := [name for name in (*files, *models) if Path(name).name != name or name in ("", ".", "..")]:
        raise ModelError(f"{path}: names a file outside the folder: '{outside[0][:80]}'")
    return Manifest(files, models)
