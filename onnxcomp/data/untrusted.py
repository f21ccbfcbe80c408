"""Files that nobody has checked: what is opened is plain and of bearable size, what fails inside is one clear error."""

from __future__ import annotations

import math
import mmap
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.maths import Array

__all__ = ["LARGEST", "guarded", "plain_file", "read_npz", "whole_number"]

LARGEST = 2 << 30  # bytes of data that are held in memory at once; more belongs in several files
_PACKING = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}  # what numpy writes
# What readers of damaged files raise; `Exception` leaves out the panics of libraries in Rust, which are no such.
_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, OnnxcompError)


@contextmanager
def guarded(what: object) -> Iterator[None]:
    """Whatever fails inside is a `DataError` that begins with `what`; also a panic of a library written in Rust."""
    try:
        yield
    except _OURS:
        raise
    except MemoryError as e:
        raise DataError(f"{what}: needs more memory than there is") from e
    except RecursionError as e:
        raise DataError(f"{what}: is nested too deep") from e
    except BaseException as e:
        why = " ".join(str(e).split())[:200]
        raise DataError(f"{what}: {why or type(e).__name__}") from e


def plain_file(path: Path, largest: int = LARGEST) -> Path:
    """The path of a file that can be read to its end: no pipe, no device, not larger than `largest` bytes."""
    with guarded(f"{path}: cannot be read"):
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if not path.is_file():
            raise DataError(f"{path}: is not a plain file")
        if (size := path.stat().st_size) > largest:
            raise DataError(f"{path}: has {size} bytes; at most {largest} are read at once, so split it")
    return path


def whole_number(settings: dict[str, Any], name: str, default: int, where: str, *, least: int = 1) -> int:
    """A number of a configuration file, `default` where it names none; raises `DataError` for anything else."""
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise DataError(f"{where}: '{name}' is {str(value)[:40]!r}, not a whole number of at least {least}")
    return value


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a file; sizes are added up before a byte is unpacked, and no object is made (pickle)."""
    room = _room()
    plain_file(path, room)
    with guarded(f"{path}: cannot be read as .npz"), zipfile.ZipFile(path) as archive:
        total = 0
        for member in archive.infolist():
            where = f"{path}: '{member.filename}'"
            if member.flag_bits & 1:
                raise DataError(f"{where} is encrypted; save it with numpy.savez")
            if member.compress_type not in _PACKING:
                raise DataError(f"{where} is packed in a way that numpy does not write; save it with numpy.savez")
            total += member.file_size
            if total > room:
                raise DataError(f"{path}: unpacks to more than {room >> 30} GiB; write several files into a folder")
            _check_header(archive, member, where)
        with np.load(path, allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}


def _room() -> int:
    """Bytes that one file may take: half of the machine's memory, and at least `LARGEST`."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names else 0
    return max(LARGEST, pages * mmap.PAGESIZE // 2)


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> None:
    """Raise `DataError` unless an array has as many bytes as its header says: numpy makes room for those first."""
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(f)
        if dtype.hasobject:
            raise DataError(f"{where} holds Python objects (pickle); save arrays of numbers")
        if f.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise DataError(f"{where} has {member.file_size} bytes, its shape {list(shape)} and type {dtype} others")
