"""A model file that was parsed once: whoever needs its graph, its size or its hash takes them from here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onnxcomp.graph import Graph

__all__ = ["Stored", "digest", "file_hash"]


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
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.hashes.values()))).hexdigest()

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of each file by its path beside the model, in the order of `files`."""
        return {p.relative_to(self.path.parent).as_posix(): file_hash(p) for p in self.files}


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(files: Sequence[Path]) -> bytes:
    """The SHA-256 digests of files, one after another."""
    return b"".join(bytes.fromhex(file_hash(p)) for p in files)
