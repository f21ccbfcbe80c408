"""The switch from an old result to a new one: a reader sees the one or the other, whole, whenever we are killed.

A folder that is not there yet appears by one rename. One that is there is exchanged for its successor, which holds the
new files and links to whatever else the folder had: one system call again (Linux). Where that cannot be (a mount point,
another system, subfolders or external data of other models, a folder that a process stands in), the staged folder
is first renamed to one that is `ready`, which decides, then its files are moved one by one; if we are killed meanwhile,
the next run or reader of ours finishes the move.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Set
from pathlib import Path
from typing import Any, TypeVar

from onnxcomp.errors import ModelError
from onnxcomp.files.atomic import file_sync, locked, sync_folder, temporary_path

__all__ = ["finish", "steadily", "switch"]

T = TypeVar("T")
_READS = 50  # of a folder that other runs replace while it is read
_READY = ".onnxcomp-*.ready"
_REMOVED = ".removed"  # in a ready folder: names that the new result no longer has, one a line
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def switch(staging: Path, out: Path, removed: Set[str], rooted: Collection[str]) -> None:
    """Put the files of `staging` into the folder `out`, which the caller has locked; `removed` names leave it.

    `rooted` are names of files that may not get a second link: external data of models that stay.
    """
    names = {p.name for p in staging.iterdir()}
    for name in names:
        file_sync(staging / name)
        if (out / name).is_dir():
            raise ModelError(f"{out / name}: is a folder where a file is to be written")
    others = [p for p in out.iterdir() if p.name not in names | removed and p != staging]
    linkable = all(p.is_file() and not p.is_symlink() and p.name not in rooted for p in others)
    if not (linkable and not _occupied(out) and _exchange(staging, out, [p.name for p in others])):
        (staging / _REMOVED).write_text("\n".join(sorted(removed)), encoding="utf-8")
        _complete(_decided(staging, out), out)
    sync_folder(out)


def _decided(staging: Path, out: Path) -> Path:
    """The ready folder in `out`; once it is there the new result will be completed, by whoever comes next."""
    ready = out / f"{staging.stem}.ready"
    try:
        os.rename(staging, ready)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        copy = out / staging.name
        shutil.copytree(staging, copy)
        for p in copy.iterdir():
            file_sync(p)
        os.rename(copy, ready)
    return ready


def finish(folder: Path) -> None:
    """Complete what a killed process had begun to move into a folder; raises `ModelError` where that is impossible."""
    if not _ready(folder):
        return
    try:
        with locked(folder):
            for ready in _ready(folder):
                _complete(ready, folder)
    except OSError as e:
        raise ModelError(
            f"{folder}: a run was killed while it replaced the result there, and it cannot be completed: "
            f"{e.strerror or e}. Run any command on this folder as a user who may write there"
        ) from e


def steadily(place: Any, read: Callable[[], T]) -> T:
    """What `read` gives of a file or folder; it is asked again where it failed because a run replaced the result."""
    try:
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
    except (OSError, TypeError, ValueError):  # no path, which `read` says in its words
        return read()
    for _ in range(_READS - 1):
        with _opened(folder) as fd:  # held, so that no other folder gets its number
            before = _state(folder)
            try:
                return read()
            except ModelError:
                replaced = fd is not None and before is not None and _state(folder) != before
                if not replaced:
                    raise
    return read()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    try:
        fd = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError):
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _state(folder: Path) -> tuple[int, int, frozenset[str]] | None:
    """What is another one when the folder is exchanged, or when names in it change."""
    try:
        info = folder.stat()
        return info.st_ino, info.st_mtime_ns, frozenset(os.listdir(folder))
    except (OSError, ValueError):
        return None


def _ready(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob(_READY)) if p.is_dir() and not p.is_symlink()]


def _complete(ready: Path, out: Path) -> None:
    """Move the files of a ready folder, models last; doing so again changes nothing."""
    sync_folder(out)
    staged = [p for p in ready.iterdir() if p.is_file() and p.name != _REMOVED]
    for p in sorted(staged, key=lambda p: (p.suffix == ".onnx", p.suffix != ".data", p)):
        os.replace(p, out / p.name)
    for name in (ready / _REMOVED).read_text(encoding="utf-8").split("\n") if (ready / _REMOVED).is_file() else ():
        if name and Path(name).name == name and not (out / name).is_dir():
            (out / name).unlink(missing_ok=True)
    shutil.rmtree(ready)


def _occupied(folder: Path) -> bool:
    """Whether a process stands in a folder, which would then look at the old one; only its own user's are seen."""
    here = os.path.realpath(folder)
    stands = [Path.cwd()]
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            stands.append(link.readlink())
    return any(p.is_relative_to(here) for p in stands)


def _exchange(staging: Path, out: Path, others: list[str]) -> bool:
    """Exchange `out` for the staged folder with links to `others`; False, and all as it was, where that cannot be."""
    beside = temporary_path(out.parent)
    linked: list[Path] = []
    before = set(os.listdir(out))
    try:
        os.rename(staging, beside)
    except OSError:
        return False
    try:
        for name in others:
            os.link(out / name, beside / name)
            linked.append(beside / name)
        _same_owner(out, beside)
        sync_folder(beside)
        _swap(beside, out)
    except OSError:
        for p in linked:
            p.unlink(missing_ok=True)
        try:
            os.rename(beside, staging)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return False
    for name in set(os.listdir(beside)) - before:  # what others made while we linked
        os.replace(beside / name, out / name)
    try:
        sync_folder(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _same_owner(out: Path, successor: Path) -> None:
    info = out.stat()
    if (own := successor.stat()) and (info.st_uid, info.st_gid) != (own.st_uid, own.st_gid):
        os.chown(successor, info.st_uid, info.st_gid)
    shutil.copystat(out, successor)


def _swap(a: Path, b: Path) -> None:
    """Exchange two folders in one system call; raises `OSError` where there is none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError(errno.ENOSYS, "no exchange of names on this system")
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
