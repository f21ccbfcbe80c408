"""Equal weights become one constant, by content; weights in files are read in pieces, lazy ones are not read."""

from __future__ import annotations

import enum
import hashlib
from collections import defaultdict
from types import FunctionType
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.graph.graph import Graph
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.graph.scratch import release_pages

__all__ = ["share_equal"]

LEAST_ELEMENTS = 64  # of a matrix that is compared: smaller ones save nothing
PROBE = 4096  # bytes that are compared first, so that different weights of one shape are not read
LARGE = 1 << 16  # bytes: arrays from which a lazy tensor is made count as equal by content up to this size


def share_equal(g: Graph) -> int:
    """Let all users of equal matrices read the first one; returns how many others lost their users.

    Rows (biases, gains) stay as they are: equal ones, such as zeros, belong to different layers by chance.
    """
    by_shape: defaultdict[object, list[ir.Value]] = defaultdict(list)
    for v in g.model.graph.initializers.values():
        t = v.const_value
        if t is None or t.dtype is ir.DataType.STRING or v.is_graph_input() or v.is_graph_output():
            continue
        if len(t.shape) > 1 and t.size >= LEAST_ELEMENTS and list(v.uses()):
            by_shape[t.dtype, tuple(t.shape.numpy())].append(v)
    merged = 0
    for alike in _split(by_shape.values(), _probe):
        for same in _split([alike], _content):
            for v in same[1:]:
                g.replace(v, same[0])
                merged += 1
    return merged


def _split(groups: Any, key: Any) -> list[list[ir.Value]]:
    """Groups of several values, parted by a key of their tensors; those that are left alone are dropped."""
    found = []
    for group in groups:
        parts: defaultdict[object, list[ir.Value]] = defaultdict(list)
        for v in group if len(group) > 1 else ():
            parts[key(v.const_value)].append(v)
        found += [p for p in parts.values() if len(p) > 1]
    return found


def _probe(t: ir.TensorProtocol) -> object:
    """The first bytes of a tensor, or the recipe of a lazy one."""
    if isinstance(t, ir.LazyTensor):
        return _recipe(t)
    if isinstance(t, MappedTensor):
        return t.head(PROBE)
    if isinstance(t, ir.ExternalTensor):  # as onnx_ir loads it; its array would be a mapping of the whole file
        with open(t.path, "rb") as f:
            f.seek(t.offset or 0)
            return f.read(min(PROBE, t.nbytes))
    return _flat(t)[:PROBE].tobytes()


def _content(t: ir.TensorProtocol) -> object:
    """A hash of all bytes of a tensor, or the recipe of a lazy one."""
    if isinstance(t, ir.LazyTensor):
        return _recipe(t)
    digest = _Digest()
    if isinstance(t, MappedTensor):
        t.tofile(digest)
    else:
        digest.write(_flat(t))
        release_pages([t])
    return digest.sha.digest()


class _Digest:
    """A file that hashes what is written to it."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Take bytes."""
        self.sha.update(data)


def _flat(t: ir.TensorProtocol) -> Any:
    """The elements' bytes, as a view where they are contiguous; those of less than a byte as stored."""
    if t.dtype.bitwidth < 8:
        return np.frombuffer(t.tobytes(), np.uint8)
    return np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8)


def _recipe(x: Any) -> object:
    """What a lazy tensor is computed by and from: equal for two only if their contents are."""
    if isinstance(x, ir.LazyTensor):
        return "lazy", x.dtype, tuple(x.shape.numpy()), _recipe(x.raw)
    if isinstance(x, FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or ()]
        return x.__code__, tuple(map(_recipe, cells)), tuple(map(_recipe, x.__defaults__ or ()))
    if isinstance(x, MappedTensor):
        return "mapped", x.source, x.dtype, tuple(x.shape.numpy())
    if isinstance(x, np.ndarray) and x.nbytes <= LARGE and not x.dtype.hasobject:
        return "array", str(x.dtype), x.shape, x.tobytes()
    if isinstance(x, (tuple, list)):
        return tuple(map(_recipe, x))
    if isinstance(x, slice):
        return "slice", x.start, x.stop, x.step
    return (type(x), x) if x is None or isinstance(x, (bool, int, float, str, bytes, enum.Enum)) else ("id", id(x))
