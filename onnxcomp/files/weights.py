"""Writing a model's tensors: one at a time to a data file that is named by its content, or into the model file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnxcomp.errors import ModelError
from onnxcomp.files.atomic import sync
from onnxcomp.files.external import tensors
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.graph.scratch import release_pages

__all__ = ["embedded", "externalize", "measure"]

SMALL = 1024  # bytes up to which a tensor stays in the model file, where shape inference can read it
PAGE = 4096  # bytes; tensors of at least a page begin at one, so that each can be mapped by itself


def externalize(model: ir.Model, file: Path, stem: str) -> str:
    """Write tensors over `SMALL` bytes to `file`, one in memory at a time; returns the name that the model refers to.

    It tells a hash of the content, so that an earlier result's model file never reads a later one's weights.
    """
    tensors_to_move = _movable(model)
    offsets: dict[object, int] = {}
    digest = hashlib.sha256()
    places: list[int] = []
    with file.open("wb") as f:
        for _, t in tensors_to_move:
            key = _identity(t)
            if key not in offsets:
                offsets[key] = _append(f, t, offsets, digest)
                if not isinstance(t, MappedTensor):  # a mapped one is read from its file, not through the mapping
                    release_pages([t])
            places.append(offsets[key])
        sync(f)
    name = f"{stem}-{digest.hexdigest()[:12]}.onnx.data"
    for (v, t), offset in zip(tensors_to_move, places, strict=True):
        _refer(v, t, name, offset)
    return name


def measure(model: ir.Model) -> int:
    """Bytes of the data file that `externalize` would write; the model gets references to it, no tensor is read."""
    places: dict[object, int] = {}
    end = 0
    for v, t in _movable(model):
        key = _identity(t)
        if key not in places:
            places[key] = _aligned(end, t)
            end = places[key] + t.nbytes
        _refer(v, t, f"model-{'0' * 12}.onnx.data", places[key])
    return end


def _movable(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The constants that go to the data file, after constants in attributes were made initializers."""
    LiftConstantsToInitializersPass(size_limit=SMALL)(model)
    constants = [(v, t) for t, v in tensors(model) if isinstance(v, ir.Value)]
    return [(v, t) for v, t in constants if t.nbytes > SMALL and t.dtype != ir.DataType.STRING]


def _identity(t: ir.TensorProtocol) -> object:
    return t.source if isinstance(t, MappedTensor) else id(t)


def _refer(v: ir.Value, t: ir.TensorProtocol, location: str, offset: int) -> None:
    shape = ir.Shape(t.shape.numpy())
    v.const_value = ir.ExternalTensor(location, offset, t.nbytes, t.dtype, shape=shape, name=str(v.name))


def _aligned(end: int, t: ir.TensorProtocol) -> int:
    """The next offset from `end` on at which a tensor may begin: page-aligned, small ones at 64 bytes."""
    align = PAGE if t.nbytes >= PAGE else 64
    return -(-end // align) * align


def embedded(model: ir.Model, data: str | None) -> ir.Model:
    """Copy tensors of other files than the one called `data` into the model file."""
    for t, holder in list(tensors(model)):
        if not isinstance(t, ir.ExternalTensor) or (data is not None and t.location == data):
            continue
        proto = onnx.TensorProto(name=t.name or "", data_type=t.dtype.value, dims=t.shape.numpy(), raw_data=t.tobytes())
        tensor = ir.TensorProtoTensor(proto)
        if isinstance(holder, ir.Value):
            holder.const_value = tensor
        else:
            node, name = holder
            node.attributes[name] = ir.AttrTensor(name, tensor)
    return model


class _Hashing:
    """A writer that counts and hashes the bytes it passes on to the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Pass bytes on; tensors of an exporter pass arrays of any rank."""
        view = memoryview(data)
        data = view.cast("B") if view.nbytes else b""
        self.digest.update(data)
        self.count += len(data)
        return self.file.write(data)


def _append(f: BinaryIO, t: ir.TensorProtocol, offsets: dict[object, int], total: hashlib._Hash) -> int:
    """Write one tensor at the next aligned offset and return the offset; content that is there already is reused.

    `offsets` are those of content hashes; `total` is the hash of the data file.
    """
    end = f.seek(0, os.SEEK_END)
    offset = _aligned(end, t)
    f.write(bytes(offset - end))
    out = _Hashing(f)
    write = getattr(t, "tofile", None)
    if write is not None:
        write(out)
    else:
        out.write(t.tobytes())
    if out.count != t.nbytes:
        raise ModelError(f"tensor '{t.name}' gave {out.count} bytes where its shape and type say {t.nbytes}")
    key = out.digest.digest()
    if key in offsets:
        f.truncate(end)
    else:
        total.update(offset.to_bytes(8, "little") + key)
    return offsets.setdefault(key, offset)
