"""A model file that was parsed once: whoever needs its graph, its size or its hash takes them from here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onnxcomp.graph import Graph

__all__ = ["Stored", "digest"]


@dataclass(frozen=True)
class Stored:
    """A model on disk with its graph; `files` are the model file and those of its external data, sorted by name."""

    path: Path
    graph: Graph
    files: tuple[Path, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def nbytes(self) -> int:
        """Bytes on disk, external data included."""
        return sum(p.stat().st_size for p in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the files, that of `storage.fingerprint`."""
        return hashlib.sha256(digest(self.files)).hexdigest()


def digest(files: Sequence[Path]) -> bytes:
    """The SHA-256 digests of files, one after another."""
    parts = []
    for p in files:
        with p.open("rb") as f:
            parts.append(hashlib.file_digest(f, "sha256").digest())
    return b"".join(parts)
