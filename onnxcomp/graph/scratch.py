"""Large new weights in scratch files: written when they are created, memory-mapped when they are read."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.maths import Array

__all__ = ["as_tensor", "release_pages", "release_weights"]

SCRATCH_FROM = 1 << 20  # 1 MiB: bytes from which on a new weight goes to the scratch folder, where a graph has one


def as_tensor(a: Array | ir.TensorProtocol, name: str | None = None, folder: Path | None = None) -> ir.TensorProtocol:
    """A constant's content: a tensor as it is, an array in memory, or in the scratch folder where it is large."""
    if isinstance(a, ir.TensorProtocol):
        return a
    if folder is not None and a.nbytes >= SCRATCH_FROM:
        return _in_scratch_file(a, folder)
    return ir.tensor(np.ascontiguousarray(a).reshape(np.shape(a)), name=name)


def _in_scratch_file(a: Array, folder: Path) -> ir.TensorProtocol:
    """The array as a tensor over a file of its own, whose name is removed at once where the system allows it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".weight", dir=folder)
        with os.fdopen(handle, "wb") as f:
            np.ascontiguousarray(a).tofile(f)
    except OSError as e:
        raise ModelError(f"{folder}: a changed weight cannot be written there: {e.strerror or e}") from e
    mapped = np.memmap(name, dtype=a.dtype, mode="r", shape=a.shape)
    if os.name == "posix":
        Path(name).unlink()
    return ir.Tensor(mapped)


def release_weights(model: ir.Model) -> None:
    """Give the pages of mapped weights back to the system; they are read again on demand."""
    release_pages(v.const_value for v in model.graph.initializers.values())


def release_pages(tensors: Iterable[ir.TensorProtocol | None]) -> None:
    """`release_weights` for some tensors: the pages of the whole file that each lies in."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    maps: dict[int, mmap.mmap] = {}
    for t in tensors:
        mapping = None
        if isinstance(t, MappedTensor):
            mapping = t.mapping
        elif isinstance(t, ir.Tensor) and isinstance(t.raw, np.memmap) and t.raw.mode == "r":
            mapping = getattr(t.raw, "_mmap", None)
        if mapping is not None:
            maps[id(mapping)] = mapping
    for m in maps.values():
        m.madvise(mmap.MADV_DONTNEED)
