"""Files that appear whole or not at all, and temporaries that the next run sweeps.

A temporary is locked (`flock`) for as long as its process lives, wherever that process runs: a process id would say
nothing in another container. Where the system or the file system has no such locks, age decides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from onnxcomp.errors import OnnxcompError

fcntl: Any
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

__all__ = [
    "file_sync",
    "locked",
    "remove_stale",
    "replacing",
    "scratch_folder",
    "staging_folder",
    "sync",
    "sync_folder",
    "temporary_file",
    "temporary_path",
]

_TEMPORARY = ".onnxcomp-*.tmp"
_SCRATCH = "onnxcomp-scratch-"
_STALE = 86400  # seconds after which a temporary counts as abandoned where there are no locks
_PATIENCE = 60  # seconds to wait for another run, which holds a folder for some renames only
_PAUSE = 0.02  # seconds between two looks at a folder that another run holds


# ---- temporaries -----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `target` when the `with` ends, and is removed on an error."""
    with temporary_file(target.parent) as temporary:
        yield temporary
        os.replace(temporary, target)


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """An empty file of a free name in a folder; it is gone when the `with` ends, unless it was renamed."""
    while True:
        path = temporary_path(folder)
        with locked(folder):  # which may be exchanged for another one
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _keep(fd, path):
            break
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A folder of a free name in `folder`, which must be there; removed when the `with` ends, unless renamed."""
    with _locked_folder(lambda: temporary_path(folder), 0o777) as path:
        yield path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files; what killed processes left there is removed first."""
    place = Path(tempfile.gettempdir())
    _sweep(place, f"{_SCRATCH}*")
    with contextlib.ExitStack() as held:
        try:
            path = held.enter_context(_locked_folder(lambda: place / f"{_SCRATCH}{uuid.uuid4().hex[:12]}", 0o700))
        except OSError as e:
            raise OnnxcompError(f"{place}: no folder for temporary files can be made: {e.strerror or e}") from e
        yield path


@contextmanager
def _locked_folder(name: Callable[[], Path], mode: int) -> Iterator[Path]:
    fd: int | None = None
    while True:
        path = name()
        with contextlib.nullcontext() if path.name.startswith(_SCRATCH) else locked(path.parent):
            path.mkdir(mode=mode)
        if fcntl is None:
            break
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # swept between the two calls
            continue
        if _keep(fd, path):
            break
    try:
        yield path
    finally:
        if path.exists() and (fd is None or os.path.samestat(os.fstat(fd), path.stat())):
            shutil.rmtree(path, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def temporary_path(folder: Path) -> Path:
    """A free name in a folder that `remove_stale` knows."""
    return folder / f".onnxcomp-{uuid.uuid4().hex[:12]}.tmp"


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders of processes that were killed."""
    _sweep(folder, _TEMPORARY)


def _sweep(folder: Path, pattern: str) -> None:
    for p in folder.glob(pattern):
        try:
            if p.is_symlink() or not (p.is_file() or p.is_dir()):
                continue
            fd = os.open(p, os.O_RDONLY) if fcntl is not None or p.is_file() else None
        except OSError:  # another's, or gone
            continue
        try:
            free = None if fd is None else _flock(fd)
            if free or (free is None and time.time() - p.stat().st_mtime > _STALE):
                shutil.rmtree(p, ignore_errors=True) if p.is_dir() else p.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            if fd is not None:
                os.close(fd)


def _keep(fd: int, path: Path) -> bool:
    """Lock a temporary that was just made; False (and `fd` closed) where a sweep was quicker than the lock."""
    try:
        if _flock(fd) is not False and os.path.samestat(os.fstat(fd), os.stat(path)):
            return True
    except FileNotFoundError:
        pass
    os.close(fd)
    return False


def _flock(fd: int) -> bool | None:
    """Lock without waiting: whether that succeeded, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# ---- folders that several runs write to ------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while names in it change; waits for other runs. A temporary folder has no other run."""
    fd = None if _private(folder) or fcntl is None else _hold(folder)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _private(folder: Path) -> bool:
    return folder.match(_TEMPORARY) or folder.name.startswith(_SCRATCH)


def _hold(folder: Path) -> int | None:
    """A descriptor with the lock of a folder; opened again where the folder was exchanged for another meanwhile."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fd = os.open(folder, os.O_RDONLY)
        except PermissionError:  # it may be written to, not read
            return None
        if _flock(fd) is not False and os.path.samestat(os.fstat(fd), os.stat(folder)):
            return fd
        os.close(fd)
        if time.monotonic() > end:
            raise OnnxcompError(f"{folder}: another run has been writing there for {_PATIENCE} s; try again later")
        time.sleep(_PAUSE)


# ---- the disk --------------------------------------------------------------------------------------------------------


def sync(f: BinaryIO) -> None:
    """Wait until the written bytes are on the disk."""
    f.flush()
    os.fsync(f.fileno())


def file_sync(path: Path) -> None:
    """`sync` for a file that was closed."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
