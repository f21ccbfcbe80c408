"""Writing a model's tensors: to a data file one at a time, named by what it holds, or into the model file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnxcomp.errors import ModelError
from onnxcomp.files.external import tensors
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.graph.scratch import release

__all__ = ["embedded", "externalize", "measure", "sync"]

SMALL = 1024  # bytes up to which a tensor stays in the model file, where shape inference can read it
PAGE = 4096


def externalize(model: ir.Model, target: Path, temporary: Path) -> Path:
    """Move tensors over `SMALL` bytes to a data file named by its content, one tensor in memory at a time."""
    held = _movable(model)
    offsets: dict[object, int] = {}
    content = hashlib.sha256()
    places: list[int] = []
    with temporary.open("xb") as f:
        for _, t in held:
            key = _identity(t)
            if key not in offsets:
                offsets[key] = _append(f, t, offsets, content)
                if not isinstance(t, MappedTensor):  # that one is read without its mapping
                    release([t])
            places.append(offsets[key])
        sync(f)
    digest = content.hexdigest()[:12]
    data = target.with_name(f"{target.stem}-{digest}.onnx.data")
    os.replace(temporary, data)
    for (v, t), offset in zip(held, places, strict=True):
        _refer(v, t, data.name, offset)
    return data


def measure(model: ir.Model) -> int:
    """Bytes of the data file that `externalize` would write, whose references the model gets; nothing is read."""
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
    """The constants that go to the data file, attributes made initializers first."""
    LiftConstantsToInitializersPass(size_limit=SMALL)(model)
    found = [(v, t) for t, v in tensors(model) if isinstance(v, ir.Value)]
    return [(v, t) for v, t in found if t.nbytes > SMALL and t.dtype != ir.DataType.STRING]


def _identity(t: ir.TensorProtocol) -> object:
    return t.source if isinstance(t, MappedTensor) else id(t)


def _refer(v: ir.Value, t: ir.TensorProtocol, location: str, offset: int) -> None:
    shape = ir.Shape(t.shape.numpy())
    v.const_value = ir.ExternalTensor(location, offset, t.nbytes, t.dtype, shape=shape, name=str(v.name))


def _aligned(end: int, t: ir.TensorProtocol) -> int:
    """Where a tensor may begin behind what is written."""
    align = PAGE if t.nbytes >= PAGE else 64
    return -(-end // align) * align


def embedded(model: ir.Model, data: Path | None) -> ir.Model:
    """Take tensors that lie in any file but `data` into the model file."""
    for t, holder in list(tensors(model)):
        if not isinstance(t, ir.ExternalTensor) or (data is not None and t.location == data.name):
            continue
        proto = onnx.TensorProto(name=t.name or "", data_type=t.dtype.value, dims=t.shape.numpy(), raw_data=t.tobytes())
        held = ir.TensorProtoTensor(proto)
        if isinstance(holder, ir.Value):
            holder.const_value = held
        else:
            node, name = holder
            node.attributes[name] = ir.AttrTensor(name, held)
    return model


class _Hashing:
    """A writer that counts and hashes what passes through to the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Pass bytes on; exporters hand over arrays of any rank."""
        view = memoryview(data)
        data = view.cast("B") if view.nbytes else b""
        self.digest.update(data)
        self.count += len(data)
        return self.file.write(data)


def _append(f: BinaryIO, t: ir.TensorProtocol, seen: dict[object, int], content: hashlib._Hash) -> int:
    """Write one tensor at the next aligned offset and return it; equal content is not written again."""
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
    if key in seen:
        f.truncate(end)
    else:
        content.update(offset.to_bytes(8, "little") + key)
    return seen.setdefault(key, offset)


def sync(f: BinaryIO) -> None:
    """Wait until the written bytes are on the disk."""
    f.flush()
    os.fsync(f.fileno())
