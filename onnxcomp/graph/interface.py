"""The interface of a model: its inputs and outputs, and which of the original's a pass removed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from onnxcomp.errors import ModelError

__all__ = ["REMOVED_PORTS", "Interface", "interface", "removed_ports", "same_interface"]

REMOVED_PORTS = "onnxcomp.gone"  # metadata key: names of removed inputs, outputs and open axes


def removed_ports(metadata: Mapping[str, str]) -> frozenset[str]:
    """Removed inputs, outputs and axes from the metadata: calibration data and shapes may still name these.

    Anyone can write metadata: what is no list of names removes nothing, and names that are still there stay.
    """
    try:
        names = json.loads(metadata.get(REMOVED_PORTS, "[]"))
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(x for x in names if isinstance(x, str)) if isinstance(names, list) else frozenset()


Port = tuple[str, str, tuple[int | str, ...] | None]


Interface = tuple[tuple[Port, ...], tuple[Port, ...]]


def interface(graph: ir.Graph) -> Interface:
    """Name, element type and axes of every input and output."""
    return _describe(graph.inputs), _describe(graph.outputs)


def _describe(values: Iterable[ir.Value]) -> tuple[Port, ...]:
    return tuple(
        (
            str(v.name),
            v.dtype.name if v.dtype else "?",
            None if v.shape is None else tuple(d if isinstance(d, int) else str(d.value or "?") for d in v.shape),
        )
        for v in values
    )


def same_interface(before: Interface, now: Interface) -> None:
    """Raise `ModelError` where names, order or known types differ, or a dynamic axis became static."""
    for old, new, what in zip(before, now, ("inputs", "outputs"), strict=True):
        if not _same(old, new):
            raise ModelError(f"the model's {what} changed from {old} to {new}")


def _same(old: tuple[Port, ...], new: tuple[Port, ...]) -> bool:
    if len(old) != len(new) or any(a[0] != b[0] or a[1] not in (b[1], "?") for a, b in zip(old, new, strict=True)):
        return False
    for (_, _, a), (_, _, b) in zip(old, new, strict=True):
        if a is None or b is None:
            continue
        if len(a) != len(b) or any(isinstance(q, int) and p not in (q, "?") for p, q in zip(a, b, strict=True)):
            return False
    return True
