"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed over it."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["remove_stale", "replacing", "sync", "sync_folder", "temporary_path"]

_NAME = re.compile(r"\.onnxcomp-(\d+)-[0-9a-f]{8}(\.data)?\.tmp$")
_STALE = 86400  # seconds after which a temporary counts as abandoned where processes cannot be asked


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `target` when the `with` ends, and is removed on an error."""
    temporary = temporary_path(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(target: Path) -> Path:
    """A free name in the folder of `target` that tells which process it belongs to."""
    return target.with_name(f".{target.name}.onnxcomp-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders of processes that were killed."""
    for p in folder.glob(".*.onnxcomp-*.tmp"):
        match = _NAME.search(p.name)
        if match and not _alive(int(match[1]), p):
            if p.is_dir() and not p.is_symlink():
                shutil.rmtree(p, ignore_errors=True)
            else:
                p.unlink(missing_ok=True)


def _alive(pid: int, path: Path) -> bool:
    """Whether the process that made a temporary may still write to it."""
    if os.name != "posix":  # there, signal 0 would end the process
        return time.time() - path.stat().st_mtime < _STALE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(f: BinaryIO) -> None:
    """Wait until the written bytes are on the disk."""
    f.flush()
    os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
