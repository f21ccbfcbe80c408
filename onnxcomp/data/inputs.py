"""The inputs of a model: their specification, the role each plays, and what follows from the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import onnx_ir as ir

from onnxcomp.data.input_axes import cache_axis, sample_axes
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = [
    "Batch",
    "Derived",
    "Source",
    "TensorSpec",
    "completed",
    "id_ranges",
    "past_length",
    "roles",
    "specs",
    "total_mask",
    "vocabulary",
    "word_count",
]

LABELS = ("labels", "label")
MOST_CLASSES = 1 << 20  # entries of a constant that ids are compared with, up to which its content is read


@dataclass(frozen=True)
class Batch:
    """Arrays by input name, and the labels of the samples where the task has any; `samples` where it is known."""

    feeds: dict[str, Array]
    labels: Array | None = None
    samples: int | None = None

    @property
    def size(self) -> int:
        """Samples in the batch: as it was made, else the first axis of any input of rank 1 or more."""
        if self.samples is not None:
            return self.samples
        return next((a.shape[0] for a in self.feeds.values() if a.ndim), 1)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy type and shape of an input or output; a dynamic axis is a name ('?' where it has none).

    `samples` is the axis that counts samples (None for scalars, flags and fixed states), `cache` that of the tokens so
    far of a key-value cache.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    samples: int | None = 0
    cache: int | None = None

    @property
    def flag(self) -> bool:
        """Whether it is one boolean for the whole batch, such as the one that switches to the branch with a cache."""
        return self.dtype.kind == "b" and self.shape in ((), (1,)) and self.samples is None

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


@runtime_checkable
class Derived(Source, Protocol):
    """A source whose samples a model makes of those `given`; `content` identifies that model."""

    given: Source

    def content(self) -> str:
        """A hash of the model that makes them."""

    def of_result(self) -> Self:
        """The samples as the result of that model makes them."""


def specs(graph: Graph) -> list[TensorSpec]:
    """The inputs a model must be fed, in order."""
    ports = [spec(v) for v in graph.inputs]
    axes = sample_axes({s.name: s.shape for s in ports})
    return [
        replace(s, samples=axes[s.name], cache=cache_axis(v, s.shape)) for s, v in zip(ports, graph.inputs, strict=True)
    ]


def spec(v: ir.Value) -> TensorSpec:
    """The specification of one value; raises `DataError` where its type or rank is unknown."""
    if v.dtype is None or v.shape is None:
        raise DataError(
            f"input '{v.name}' of the model has no element type or rank; export the model again with shapes"
        )
    dtype = np.dtype(object) if v.dtype == ir.DataType.STRING else np.dtype(v.dtype.numpy())
    return TensorSpec(str(v.name), dtype, tuple(d if isinstance(d, int) else str(d.value or "?") for d in v.shape))


def roles(inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Input name by role: `tokens`, `mask`, `types`, `positions` or `pixels`, by name, then by shape.

    Those of a decoder behind an encoder that takes tokens too are `decoder_tokens` and so on; a mask of encoder states
    is `encoder_mask`, these `encoder_states`. Caches have no role here: see `TensorSpec.cache`.
    """
    names: dict[str, str] = {}
    found = [(s, kind) for s in inputs if (kind := _kind(s))]
    encoded = any(kind == "tokens" and "decoder" not in s.name.lower() for s, kind in found)
    for s, kind in found:
        name = s.name.lower()
        side = "decoder_" if encoded and "decoder" in name else "encoder_" if name.startswith("encoder") else ""
        names.setdefault(side + kind, s.name)
    return names


def _kind(s: TensorSpec) -> str:
    """What an input holds, empty where that is not known."""
    name = s.name.lower()
    if s.cache is not None or "past_key" in name or "past_value" in name or s.flag:
        return ""
    if len(s.shape) == 4 and not s.integer and s.dtype.kind != "b":
        return "pixels"
    if "mask" in name:
        return "mask"
    if "position" in name:
        return "positions"
    if "token_type" in name or "segment" in name:
        return "types"
    if name.startswith("encoder") and len(s.shape) == 3 and not s.integer:
        return "states"
    return "tokens" if s.integer and len(s.shape) == 2 else ""


def word_count(graph: Graph) -> int:
    """How many tokens a model of text knows, 2 where it does not tell."""
    return vocabulary(graph).get(roles(specs(graph)).get("tokens", ""), 2)


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
                ) or (user.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and index == 0):
                    reach.append(user.outputs[0])
                elif user.op_type in ("Gather", "GatherBlockQuantized") and index == 1:
                    table = Graph.tensor(user.inputs[0])
                    axis = user.attributes.get_int("axis" if user.op_type == "Gather" else "gather_axis", 0)
                    if table is not None and axis == 0 and len(table.shape) == 2:
                        rows = int(table.shape.numpy()[0])
                        sizes[str(v.name)] = min(rows, sizes.get(str(v.name), rows))
    return sizes


def id_ranges(graph: Graph) -> dict[str, int]:
    """Below which number ids mean something, by input name: rows of an embedding table, classes of a one-hot code."""
    classes: dict[str, int] = {}
    for v in graph.inputs:
        reach = [v] if v.dtype is not None and v.dtype.is_integer() else []
        for x in reach:
            for user, index in x.uses():
                if user.op_type in ("Cast", "Identity", "Unsqueeze", "Reshape", "Expand") and index == 0:
                    reach.append(user.outputs[0])
                elif user.op_type in ("Equal", "OneHot") and (n := _classes(user, index)):
                    classes[str(v.name)] = n
    return classes | vocabulary(graph)


def _classes(node: ir.Node, index: int) -> int:
    """The number of classes of a OneHot, or of an Equal with 0, 1, 2, ...; 0 for another comparison."""
    other = Graph.tensor(node.inputs[1 - index]) if index < 2 else None
    if other is None or other.size > MOST_CLASSES:
        return 0
    a = other.numpy().reshape(-1)
    if node.op_type == "OneHot":
        return int(a[0]) if index == 0 and a.size == 1 else 0
    return a.size if a.size > 2 and bool((a == np.arange(a.size)).all()) else 0


def _stays_integer(v: ir.Value, node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    return node.attributes.get_int("to", 0) in (int(ir.DataType.INT32), int(ir.DataType.INT64))


def past_length(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> int:
    """How many tokens the caches among the feeds hold."""
    given = (feeds[s.name].shape[s.cache] for s in inputs if s.cache is not None and s.name in feeds)
    return next(given, 0)


def total_mask(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The mask `[b, past + new]` of a model with caches, whose length is not that of the tokens; None without one."""
    role, by_name = roles(inputs), {s.name: s for s in inputs}
    mask, tokens = (by_name.get(role.get(r, "")) for r in ("mask", "tokens"))
    if mask is None or tokens is None or len(mask.shape) != 2 or all(s.cache is None for s in inputs):
        return None
    return None if mask.shape[1] == tokens.shape[1] and mask.shape[1] != "?" else mask


def completed(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> tuple[dict[str, Array], list[str]]:
    """Feeds with what the model needs and the tokens imply, and notes on these.

    Mask, positions, token types and, where none is given, empty caches; a flag says whether there is a cache.
    """
    out = dict(feeds)
    notes: list[str] = []
    role = roles(inputs)
    tokens = out.get(role.get("tokens", ""))
    if tokens is None or tokens.ndim != 2:
        return out, notes
    past = past_length(out, inputs)
    width = tokens.shape[1] + (past if total_mask(inputs) is not None else 0)
    mask = out.get(role.get("mask", ""), np.ones((len(tokens), width), tokens.dtype))
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) if mask.ndim == 2 else np.zeros_like(tokens)
    derived = {"mask": mask, "types": np.zeros_like(tokens), "positions": positions[:, -tokens.shape[1] :]}
    for s in inputs:
        kind = next((r for r in derived if role.get(r) == s.name), None)
        if s.name in out:
            continue
        if kind is not None and len(s.shape) == 2:
            out[s.name] = derived[kind].astype(s.dtype)
            notes.append(f"input '{s.name}' is not in the data and was derived from the tokens")
        elif s.flag:
            out[s.name] = np.full([1] * len(s.shape), past > 0)
        elif (empty := _empty(s, len(tokens))) is not None:
            out[s.name] = empty
            notes.append("caches are not in the data: they were fed empty")
    return out, list(dict.fromkeys(notes))


def _empty(s: TensorSpec, samples: int) -> Array | None:
    """A cache without tokens; None for another input and where another axis than samples and tokens is open."""
    sizes = {s.samples: samples, s.cache: 0}
    shape = [d if isinstance(d, int) else sizes.get(i) for i, d in enumerate(s.shape)]
    if s.cache is None or any(d is None for d in shape):
        return None
    return np.zeros([d or 0 for d in shape], s.dtype)
