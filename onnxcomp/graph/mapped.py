"""Tensors in external data files: the file is mapped once, bytes are read on demand and not kept."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.maths import Array

__all__ = ["DataFile", "MappedTensor"]

CHUNK = 1 << 22  # 4 MiB: bytes read at a time where a range is copied, which bounds the memory of a copy
PACKED = {2, 4, 6}  # bits per element of types that share bytes, so numpy cannot view them in place


class DataFile:
    """A data file, opened and mapped once for all its tensors; it stays readable after a rename or removal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        self.map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if self.size else None

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """The bytes of a range in pieces, read without touching the mapping, so that they do not stay resident."""
        while length > 0:
            chunk = self._read(offset, min(CHUNK, length))
            if not chunk:
                raise ModelError(f"{self.path}: the file became shorter while it was read")
            yield chunk
            offset, length = offset + len(chunk), length - len(chunk)

    def _read(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, length, offset)
        return b"" if self.map is None else self.map[offset : offset + length]


class MappedTensor(ir.ExternalTensor):
    """A read-only external tensor over a shared `DataFile`; its bytes are read on demand."""

    __slots__ = ("_shared", "_view")

    def __init__(self, shared: DataFile, tensor: ir.ExternalTensor, base: Path) -> None:
        super().__init__(
            tensor.location,
            tensor.offset or 0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(list(tensor.shape)),
            name=str(tensor.name),
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=str(base),
        )
        self._shared = shared
        self._view: Array | None = None

    @property
    def source(self) -> tuple[int, int, int]:
        """Identity of the stored bytes: equal for tensors that share them."""
        return id(self._shared), self.offset or 0, self.nbytes

    @property
    def mapping(self) -> mmap.mmap | None:
        """The mapping of the whole data file."""
        return self._shared.map

    def head(self, count: int) -> bytes:
        """At most `count` stored bytes from the beginning."""
        return b"".join(self._shared.chunks(self.offset or 0, min(count, self.nbytes)))

    def tobytes(self) -> bytes:
        """A copy of the stored bytes."""
        return b"".join(self._shared.chunks(self.offset or 0, self.nbytes))

    def tofile(self, file: Any) -> None:
        """Copy the stored bytes to a file in bounded pieces."""
        for chunk in self._shared.chunks(self.offset or 0, self.nbytes):
            file.write(chunk)

    def numpy(self) -> Array:
        """The tensor as a read-only array over the mapping; sub-byte types are unpacked to a copy each time."""
        if self.dtype.bitwidth in PACKED:
            return _unpack(self)
        if self._view is None:
            if self._shared.map is None or self.nbytes == 0:
                return np.empty(self.shape.numpy(), self.dtype.numpy())
            flat = np.frombuffer(self._shared.map, self.dtype.numpy(), self.size, self.offset or 0)
            self._view = flat.reshape(self.shape.numpy())
        return self._view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """The numpy protocol over `numpy()`."""
        return self.numpy() if dtype is None and not copy else np.array(self.numpy(), dtype=dtype)

    def release(self) -> None:
        """Forget the view; the shared mapping stays until its last tensor is gone."""
        self._view = None


def _unpack(t: MappedTensor) -> Array:
    proto = onnx.TensorProto(data_type=int(t.dtype), dims=t.shape.numpy(), raw_data=t.tobytes())
    a: Array = ir.serde.deserialize_tensor(proto).numpy()
    return a
