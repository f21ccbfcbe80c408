"""External data of ONNX models: paths, ranges and sizes are checked before any byte is read, then files are mapped."""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.graph.mapped import PACKED, DataFile, MappedTensor

__all__ = ["attach", "check", "locations", "tensors"]

_ELEMENT_FIELDS = {  # protobuf field of a tensor's elements where they are not raw bytes, and entries per element
    "float_data": {ir.DataType.FLOAT: 1, ir.DataType.COMPLEX64: 2},
    "double_data": {ir.DataType.DOUBLE: 1, ir.DataType.COMPLEX128: 2},
    "int64_data": {ir.DataType.INT64: 1},
    "uint64_data": {ir.DataType.UINT32: 1, ir.DataType.UINT64: 1},
    "string_data": {ir.DataType.STRING: 1},
}


def locations(proto: onnx.ModelProto) -> set[str]:
    """Names of the data files a model refers to."""
    return {_entries(t).get("location", "") for t in _protos(proto) if t.data_location == onnx.TensorProto.EXTERNAL}


def check(proto: onnx.ModelProto, path: Path) -> None:
    """Raise `ModelError`, naming the tensor, for a model with unsafe or inconsistent tensors."""
    base = path.absolute().parent
    files: dict[str, Path] = {}
    ranges: dict[Path, list[tuple[int, int, str]]] = {}
    for t in _protos(proto):
        need = _nbytes(t, path)
        if t.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(t, need, path)
            continue
        entries = _entries(t)
        where = f"{path}: external tensor '{t.name}'"
        location = entries.get("location", "")
        if location not in files:
            files[location] = _contained(location, base, where)
        start, end = _range(entries, need, where)
        try:
            size = files[location].stat().st_size
        except OSError as e:  # another run has just replaced it
            raise ModelError(f"{where}: the data file '{location}' is gone: {e.strerror or e}") from e
        if end > size:
            raise ModelError(f"{where}: ends at byte {end} of '{location}', which has only {size}; copy the file again")
        if end > start:
            ranges.setdefault(files[location], []).append((start, end, t.name))
    for spans in ranges.values():
        _check_overlap(spans, path)


def _check_overlap(spans: list[tuple[int, int, str]], path: Path) -> None:
    """Refuse ranges that overlap without being equal (equal ones are a shared tensor)."""
    spans.sort()
    for (start, end, name), (start2, end2, name2) in itertools.pairwise(spans):
        if start2 < end and (start, end) != (start2, end2):
            raise ModelError(f"{path}: external tensors '{name}' and '{name2}' overlap in the data file; refused")


def _entries(t: onnx.TensorProto) -> dict[str, str]:
    return {e.key: e.value for e in t.external_data}


def _range(entries: dict[str, str], need: int, where: str) -> tuple[int, int]:
    try:
        start, length = int(entries.get("offset") or 0), int(entries.get("length") or need)
    except ValueError:
        raise ModelError(f"{where}: offset and length must be whole numbers; the model is damaged") from None
    if start < 0 or length < 0:
        raise ModelError(f"{where}: negative offset or length ({start}, {length}); refused")
    if length != need:
        raise ModelError(f"{where}: holds {length} bytes where its shape and type say {need}; refused")
    return start, start + length


def _contained(location: str, base: Path, where: str) -> Path:
    """The data file of a location, after checking that it is a plain file inside the model's folder."""
    windows = PureWindowsPath(location)
    if not location or "\0" in location:
        raise ModelError(f"{where}: names no data file; the model is damaged")
    if os.path.isabs(location) or windows.drive or windows.root:
        raise ModelError(f"{where}: the absolute path '{location}' is refused; data must lie in the model's folder")
    path = base / location
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(base)):
        raise ModelError(f"{where}: the path '{location}' leaves the model's folder; refused")
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(base)):
        raise ModelError(
            f"{where}: '{location}' is a link to {real}, outside the model's folder; refused. "
            f"If you trust it, replace the link by a copy: cp -L '{path}' '{path}.copy' && mv '{path}.copy' '{path}'"
        )
    try:
        info = real.stat()
    except OSError as e:
        raise ModelError(f"{where}: the data file '{location}' cannot be read: {e.strerror or e}") from e
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{where}: '{location}' is not a plain file; refused")
    if info.st_nlink > 1:
        raise ModelError(
            f"{where}: '{location}' has {info.st_nlink} hard links, so it may be someone else's file; refused. "
            f"If you trust it, copy it: cp '{path}' '{path}.copy' && mv '{path}.copy' '{path}'"
        )
    return real


def _nbytes(t: onnx.TensorProto, path: Path) -> int:
    """Bytes that a tensor's shape and type need (for strings the number of elements)."""
    try:
        dtype = ir.DataType(t.data_type)
    except ValueError:
        raise ModelError(f"{path}: tensor '{t.name}' has the unknown element type {t.data_type}") from None
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{path}: tensor '{t.name}' has no element type; the model is damaged")
    if any(d < 0 for d in t.dims):
        raise ModelError(f"{path}: tensor '{t.name}' has a negative size in its shape {list(t.dims)}; refused")
    count: int = math.prod(t.dims)
    if dtype == ir.DataType.STRING:
        return count
    bits: int = dtype.bitwidth
    return (count * bits + 7) // 8


def _check_inline(t: onnx.TensorProto, need: int, path: Path) -> None:
    dtype = ir.DataType(t.data_type)
    if t.HasField("raw_data"):
        have = len(t.raw_data)
    else:
        field, per = next(((f, d[dtype]) for f, d in _ELEMENT_FIELDS.items() if dtype in d), ("int32_data", 1))
        have = len(getattr(t, field))
        need = need if dtype == ir.DataType.STRING or dtype.bitwidth in PACKED else math.prod(t.dims) * per
    if have != need:
        raise ModelError(
            f"{path}: tensor '{t.name}' holds {have} units of data, its shape and type say {need}; refused"
        )


def _protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, attributes, subgraphs and functions."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors
            if attr.HasField("g"):
                yield from _of_graph(attr.g)
            for g in attr.graphs:
                yield from _of_graph(g)


def tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Any]]:
    """Every constant of a model with the value (initializer) or attribute that holds it."""
    graphs = [*model.graphs(), *(g for f in model.functions.values() for g in (f.graph, *f.graph.subgraphs()))]
    for graph in graphs:
        for v in graph.initializers.values():
            if v.const_value is not None:
                yield v.const_value, v
        for node in graph:
            for attr in node.attributes.values():
                if not attr.is_ref() and attr.type == ir.AttributeType.TENSOR:
                    yield attr.value, (node, attr.name)


def attach(model: ir.Model, base: Path) -> None:
    """Replace external tensors by views of a memory map, one per data file in the folder `base`."""
    files: dict[str, DataFile] = {}
    base = base.absolute()
    for t, holder in list(tensors(model)):
        if not isinstance(t, ir.ExternalTensor) or isinstance(t, MappedTensor):
            continue
        location = os.fspath(t.location)
        if location not in files:
            try:
                files[location] = DataFile(base / location)
            except OSError as e:
                raise ModelError(f"{base / location}: cannot be read: {e.strerror or e}") from e
        mapped = MappedTensor(files[location], t, base)
        if isinstance(holder, ir.Value):
            holder.const_value = mapped
        else:
            node, name = holder
            node.attributes[name] = ir.AttrTensor(name, mapped)
