"""Hashes by which entries of a cache prove themselves: an entry that was changed or moved counts as absent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["file_seals", "seal"]


def seal(parts: Iterable[str | bytes]) -> str:
    """SHA-256 (hex) over parts, none of which can pass for a piece of another."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()


def file_seals(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file in a folder, by name."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as f:
            found[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found
