"""The inputs of a model: their specification, the role each plays, and the checks that batches must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["Batch", "InputCheck", "Source", "TensorSpec", "completed", "roles", "specs", "vocabulary"]

LABELS = ("labels", "label")


@dataclass(frozen=True)
class Batch:
    """Arrays by input name, first axis = samples, and the labels of the samples where the task has any."""

    feeds: dict[str, Array]
    labels: Array | None = None

    @property
    def size(self) -> int:
        """Samples in the batch: the first axis of any input of rank 1 or more."""
        return next((a.shape[0] for a in self.feeds.values() if a.ndim), 1)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy type and shape of an input or output; a dynamic axis is a name ('?' where it has none)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    @property
    def integer(self) -> bool:
        """Whether it holds whole numbers."""
        return self.dtype.kind in "iu"


class Source(Protocol):
    """Samples by index; the same index always gives the same sample."""

    name: str
    random: bool
    notes: list[str]

    def __len__(self) -> int: ...
    def key(self, index: int) -> object:
        """Samples can share a batch when their keys are equal."""

    def rows(self, indices: Sequence[int]) -> Batch:
        """The samples of these indices as one batch."""


def specs(graph: Graph) -> list[TensorSpec]:
    """The inputs a model must be fed, in order."""
    return [spec(v) for v in graph.inputs]


def spec(v: ir.Value) -> TensorSpec:
    """The specification of one value; raises `DataError` where its type or rank is unknown."""
    if v.dtype is None or v.shape is None:
        raise DataError(
            f"input '{v.name}' of the model has no element type or rank; export the model again with shapes"
        )
    dtype = np.dtype(object) if v.dtype == ir.DataType.STRING else np.dtype(v.dtype.numpy())
    return TensorSpec(str(v.name), dtype, tuple(d if isinstance(d, int) else str(d.value or "?") for d in v.shape))


def roles(inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Input name by role: `tokens`, `mask`, `types`, `positions` or `pixels`, by name, then by shape."""
    names: dict[str, str] = {}
    for s in inputs:
        name = s.name.lower()
        if len(s.shape) == 4 and not s.integer and s.dtype.kind != "b":
            role = "pixels"
        elif "mask" in name:
            role = "mask"
        elif "position" in name:
            role = "positions"
        elif "token_type" in name or "segment" in name:
            role = "types"
        elif s.integer and len(s.shape) == 2:
            role = "tokens"
        else:
            continue
        names.setdefault(role, s.name)
    return names


def vocabulary(graph: Graph) -> dict[str, int]:
    """Number of rows of the embedding table that each integer input indexes directly, by input name."""
    sizes: dict[str, int] = {}
    for v in graph.inputs:
        reach = [v]
        for x in reach:
            for user, index in x.uses():
                if (
                    user.op_type in ("Cast", "Identity")
                    and len(user.outputs) == 1
                    and _stays_integer(user.outputs[0], user)
                ):
                    reach.append(user.outputs[0])
                elif user.op_type == "Gather" and index == 1:
                    table = Graph.tensor(user.inputs[0])
                    axis = user.attributes.get_int("axis", 0)
                    if table is not None and axis == 0 and len(table.shape) == 2:
                        rows = int(table.shape.numpy()[0])
                        sizes[str(v.name)] = min(rows, sizes.get(str(v.name), rows))
    return sizes


def _stays_integer(v: ir.Value, node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    return node.attributes.get_int("to", 0) in (int(ir.DataType.INT32), int(ir.DataType.INT64))


def completed(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> tuple[dict[str, Array], list[str]]:
    """Feeds with the mask, positions and token types that the model needs and the tokens imply, and notes on these."""
    out = dict(feeds)
    notes: list[str] = []
    role = roles(inputs)
    tokens = out.get(role.get("tokens", ""))
    if tokens is None or tokens.ndim != 2:
        return out, notes
    mask = out.get(role.get("mask", ""), np.ones_like(tokens))
    derived = {"mask": mask, "types": np.zeros_like(tokens), "positions": np.maximum(np.cumsum(mask, 1) - 1, 0)}
    for s in inputs:
        kind = next((r for r in derived if role.get(r) == s.name), None)
        if s.name not in out and kind is not None and len(s.shape) == 2:
            out[s.name] = derived[kind].astype(s.dtype)
            notes.append(f"input '{s.name}' is not in the data and was derived from the tokens")
    return out, notes


class InputCheck:
    """The checks that every batch must pass before it is fed; a failure is a `DataError` naming input and sample."""

    def __init__(self, inputs: Sequence[TensorSpec], vocab: Mapping[str, int], source: str) -> None:
        self.inputs, self.vocab, self.source = list(inputs), dict(vocab), source

    def __call__(self, batch: Batch, first: int = 0, notes: list[str] | None = None) -> Batch:
        """The batch in the model's types and input order; `first` is the index of its first sample, for errors."""
        given = {
            s.name: self._tensor(s, np.asarray(batch.feeds[s.name]), first)
            for s in self.inputs
            if s.name in batch.feeds
        }
        feeds, notes_made = completed(batch.feeds | given, self.inputs)
        wanted = [s.name for s in self.inputs]
        unknown = [n for n in feeds if n not in wanted]
        if missing := [n for n in wanted if n not in feeds]:
            extra = f"; it has {', '.join(map(repr, unknown))} instead" if unknown else ""
            raise DataError(f"{self.source}: the model's input '{missing[0]}' is missing{extra}")
        for note in [*notes_made, *(f"array '{n}' is no input of the model and was ignored" for n in unknown)]:
            if notes is not None and note not in notes:
                notes.append(note)
        out = {s.name: self._tensor(s, np.asarray(feeds[s.name]), first) for s in self.inputs}
        self._axes(out, first)
        labels = batch.labels
        if labels is not None and len(labels) != Batch(out).size:
            raise DataError(
                f"{self.source}: {len(labels)} labels for {Batch(out).size} samples, from sample {first} on"
            )
        return Batch(out, labels)

    def _where(self, s: TensorSpec, first: int, bad: Array | None = None) -> str:
        row = int(np.argwhere(bad)[0][0]) if bad is not None and bad.ndim else 0
        return f"{self.source}: input '{s.name}', sample {first + row}"

    def _tensor(self, s: TensorSpec, a: Array, first: int) -> Array:
        if a.ndim != len(s.shape):
            raise DataError(f"{self._where(s, first)}: has rank {a.ndim} {a.shape}, the model takes {_show(s)}")
        for axis, (have, want) in enumerate(zip(a.shape, s.shape, strict=True)):
            if isinstance(want, int) and have != want:
                raise DataError(f"{self._where(s, first)}: axis {axis} is {have}, the model takes {_show(s)}")
        if a.size == 0:
            raise DataError(f"{self._where(s, first)}: is empty, shape {a.shape}")
        a = self._cast(s, a, first)
        if a.dtype.kind not in "iubSUO":
            bad = ~np.isfinite(a.astype(np.float32) if a.dtype.kind == "V" or a.itemsize < 2 else a)
            if bad.any():
                raise DataError(f"{self._where(s, first, bad)}: holds NaN or infinity")
        rows = self.vocab.get(s.name)
        if rows is not None and s.integer:
            bad = (a < 0) | (a >= rows)
            if bad.any():
                raise DataError(
                    f"{self._where(s, first, bad)}: id {a[bad][0]} is outside 0 to {rows - 1}, the rows of the model's "
                    "embedding; was it made with another tokenizer?"
                )
        return a

    def _cast(self, s: TensorSpec, a: Array, first: int) -> Array:
        """The array in the model's type; raises `DataError` where a value changes or a narrower float overflows."""
        if a.dtype == s.dtype:
            return a
        real = "f" if a.dtype.kind == "V" else a.dtype.kind
        wanted_real = s.dtype.kind in "fV"
        if a.dtype.kind in "OSU" or (real == "f" and not wanted_real) or real == "c":
            raise DataError(f"{self._where(s, first)}: has type {a.dtype}, the model takes {s.dtype}; convert it first")
        with np.errstate(over="ignore", invalid="ignore"):
            out = a.astype(s.dtype)
            same = np.isfinite(out.astype(np.float64)) | ~np.isfinite(a) if real == "f" else out.astype(a.dtype) == a
        if not same.all():
            raise DataError(
                f"{self._where(s, first, ~same)}: {a[~same][0]} of type {a.dtype} does not fit the model's {s.dtype}"
            )
        return out

    def _axes(self, feeds: dict[str, Array], first: int) -> None:
        """Check that axes of one name have one size in all inputs, and that all first axes are equally long."""
        sizes: dict[str, tuple[int, str]] = {}
        for s in self.inputs:
            for axis, (have, want) in enumerate(zip(feeds[s.name].shape, s.shape, strict=True)):
                name = "first axis" if axis == 0 else f"axis '{want}'"
                if axis and (isinstance(want, int) or want == "?"):
                    continue
                was, other = sizes.setdefault(name, (have, s.name))
                if was != have:
                    places = f"is {was} in '{other}' but {have} in '{s.name}'"
                    raise DataError(f"{self.source}: from sample {first} on, the {name} {places}")


def _show(s: TensorSpec) -> str:
    return f"{s.dtype.name}[{', '.join(map(str, s.shape))}]"
