"""Sizes for the dynamic axes of a model, such as `batch=8,sequence=128`, and input arrays of the resulting shapes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.inputs import TensorSpec, id_ranges, roles, specs, total_mask
from onnxcomp.data.random_feeds import random_feeds
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.graph.interface import removed_ports
from onnxcomp.maths import Array

__all__ = ["default_shapes", "feeds_for", "label", "shapes_of"]

_TEXT = ("tokens", "mask", "positions", "types", "states")
_SIDES = {"sequence": "", "decoder_sequence": "decoder_", "encoder_sequence": "encoder_"}


def label(shape: Mapping[str, int]) -> str:
    """A shape as text: `batch=1,sequence=128`, or `fixed` for a model without dynamic axes."""
    return ",".join(f"{k}={n}" for k, n in shape.items()) or "fixed"


def _symbol(spec: TensorSpec, axis: int) -> str | None:
    """The name of a dynamic axis (an unnamed one is called `input.axis`), None for a static one."""
    d = spec.shape[axis]
    if isinstance(d, int):
        return None
    return f"{spec.name}.{axis}" if d in ("", "?") else d


def _places(ports: list[TensorSpec], name: str) -> list[tuple[TensorSpec, int]]:
    """The axes a name refers to: those of that name, else those of that part of the inputs.

    `batch` are samples, `sequence` new tokens, `past` tokens in caches, `decoder_sequence` those of a decoder that an
    encoder feeds, `encoder_sequence` what a decoder alone takes from an encoder.
    """
    exact = [(p, i) for p in ports for i in range(len(p.shape)) if _symbol(p, i) == name]
    if exact:
        return exact
    if name == "batch":
        return [(p, p.samples) for p in ports if p.samples is not None]
    if name == "past":
        return [(p, p.cache) for p in ports if p.cache is not None]
    if name in _SIDES:
        role, total = roles(ports), total_mask(ports)
        text = {role[r] for r in (f"{_SIDES[name]}{kind}" for kind in _TEXT) if r in role}
        return [(p, 1) for p in ports if p.name in text and len(p.shape) > 1 and p is not total]
    return []


def default_shapes(g: Graph) -> list[dict[str, int]]:
    """Batch 1 and 8 with 128 tokens, as far as these axes are dynamic; with caches a prompt and a token behind it."""
    ports = specs(g)

    def is_open(name: str) -> bool:
        return any(_symbol(p, i) is not None for p, i in _places(ports, name))

    if is_open("past") and is_open("sequence"):
        one = {"batch": 1} if is_open("batch") else {}
        return [{**one, "sequence": 128, "past": 0}, {**one, "sequence": 1, "past": 128}]
    rest = {"sequence": 128} if is_open("sequence") else {}
    return [{"batch": n, **rest} for n in (1, 8)] if is_open("batch") else [rest]


def shapes_of(g: Graph, shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every input; a dynamic batch axis without a given size is 1, caches are empty.

    Axes that follow from others need no size: sums such as `past + sequence`, the mask of cached and new tokens, and
    decoder and encoder, which are as long as each other.
    Raises `DataError` for an axis the model does not have, a static axis of another size, or an axis without a size.
    """
    ports, given = specs(g), dict(shape)
    known = list(dict.fromkeys(s for p in ports for i in range(len(p.shape)) if (s := _symbol(p, i))))
    sizes: dict[tuple[str, int], int] = {}
    if "batch" not in given and any(_symbol(p, i) not in given for p, i in _places(ports, "batch")):
        given["batch"] = 1
    for name, n in given.items():
        caches = _places(ports, "past") if n == 0 else []
        if n < 0 or (n == 0 and not (caches and all(x in caches for x in _places(ports, name)))):
            raise DataError(f"axis '{name}' must be at least 1, not {n}")
        if not (places := _places(ports, name)) and name not in removed_ports(g.model.metadata_props):
            raise DataError(f"the model has no axis '{name}'; its open axes are {', '.join(known) or 'none'}")
        for p, i in places:
            fixed = p.shape[i]
            if isinstance(fixed, int) and fixed != n and name in shape:
                raise DataError(f"{name}={n} was asked, but input '{p.name}' has a fixed {name} of {fixed}")
            sizes.setdefault((p.name, i), n)
    _derive(ports, sizes)
    return {p.name: tuple(_size(p, i, sizes) for i in range(len(p.shape))) for p in ports}


def _derive(ports: list[TensorSpec], sizes: dict[tuple[str, int], int]) -> None:
    """Add the sizes of axes that follow from those that are known."""
    for p, i in _places(ports, "past"):
        sizes.setdefault((p.name, i), 0)
    lengths = [sizes[p.name, i] for p, i in _places(ports, "sequence") if (p.name, i) in sizes]
    others = [*_places(ports, "decoder_sequence"), *_places(ports, "encoder_sequence")]
    for p, i in others if lengths else ():
        sizes.setdefault((p.name, i), lengths[0])
    total = total_mask(ports)
    past = next((sizes[p.name, i] for p, i in _places(ports, "past")), 0)
    if total is not None and lengths:
        n = sizes.setdefault((total.name, 1), past + lengths[0])
        if n != past + lengths[0]:
            raise DataError(
                f"'{total.name}' of {n} entries does not fit {past} tokens in the cache and {lengths[0]} new ones"
            )
    known = {
        s: sizes[p.name, i] for p in ports for i in range(len(p.shape)) if (p.name, i) in sizes and (s := _symbol(p, i))
    }
    for p in ports:
        for i in range(len(p.shape)):
            parts = [x.strip() for x in (_symbol(p, i) or "").split("+")]
            if (p.name, i) not in sizes and all(x in known or x.isdecimal() for x in parts):
                sizes[p.name, i] = sum(known[x] if x in known else int(x) for x in parts)


def _size(p: TensorSpec, axis: int, sizes: Mapping[tuple[str, int], int]) -> int:
    d = p.shape[axis]
    if isinstance(d, int):
        return d
    if (p.name, axis) not in sizes:
        name = _symbol(p, axis)
        raise DataError(f"axis '{name}' of input '{p.name}' is open; say its size, such as --shape batch=1,{name}=128")
    return sizes[p.name, axis]


def feeds_for(g: Graph, shape: Mapping[str, int], data: Dataset | None = None) -> dict[str, Array]:
    """Inputs of a shape: random but valid (ids in the vocabulary, no padding), or from data, truncated and repeated."""
    dims = shapes_of(g, shape)
    if data is not None:
        batch = next(iter(data), None)
        if batch is None:
            raise DataError(f"the data '{data.name}' is empty")
        if missing := [name for name in dims if name not in batch.feeds]:
            raise DataError(f"the data '{data.name}' has no input '{missing[0]}'")
        return {name: _resized(batch.feeds[name], to) for name, to in dims.items()}
    # Seeded by name, so that two models with the same inputs get the same values.
    return random_feeds(specs(g), dims, id_ranges(g), lambda name: np.random.default_rng(zlib.crc32(name.encode())))


def _resized(a: Array, to: tuple[int, ...]) -> Array:
    """Truncate or repeat an array along each axis."""
    if a.ndim != len(to):
        raise DataError(f"the data has an input of shape {a.shape} where the model takes {to}")
    for axis, n in enumerate(to):
        if a.shape[axis] != n:
            a = np.take(a, np.arange(n) % a.shape[axis], axis=axis)
    return a
