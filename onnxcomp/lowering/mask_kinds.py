"""What a mask does, found out by running the arithmetic that makes it, and nothing else, on a few inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.data import open_axes
from onnxcomp.data.inputs import TensorSpec, roles, specs
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph, extract
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session

__all__ = ["name_of", "probe"]

SHAPES = ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 8})
TRIES = 3
FORBIDDEN = -9e3
LONG = range(5, 1 << 20)  # constants that may be a window which the samples are too short to show
SHORT = 3  # stands for them once more


def probe(g: Graph, values: Sequence[ir.Value]) -> dict[str, str]:
    """By name: `all`, `padding`, `causal` (just the triangle), `causal+` (less than it), `other`; `other` if unsure.

    `window 8` is the triangle without keys that are 8 or more places away.
    Evidence, not proof: the inputs are random, their mask random 0 and 1 with at least one key a row.
    """
    found = dict.fromkeys((str(v.name) for v in values), "other")
    nodes, light = extract.prefix(g, values)
    if not light:
        return found
    constant = {str(v.name) for v in light if not _reads_inputs(g, v)}
    model = extract.cut(g, nodes, light)
    try:
        found |= _names(g, model, constant)
    except OnnxcompError:
        return found
    for short in _shortened(model):
        with contextlib.suppress(OnnxcompError):  # that number was no window, but a size or a place
            seen = _names(g, short, constant)
            found = {name: _weaker(kind, seen.get(name, kind)) for name, kind in found.items()}
    windows = name_masks(g, [v for v in light if found[str(v.name)] == "causal+" and v.name in constant])
    for v, named in windows.items():
        kind, _, width = named.name.rpartition(" ")
        if v is not None and kind == "causal window" and not named.bias:
            found[str(v.name)] = f"window {width}"
    return found


def _names(g: Graph, model: Graph, constant: Collection[str]) -> dict[str, str]:
    """What each output of a model of masks does on samples; `constant` names those that follow from sizes alone."""
    samples = list(_samples(g, model))
    return {name: name_of([s[name] for s in samples], fixed=name in constant) for name in samples[0]}


def _weaker(kind: str, short: str) -> str:
    """What can be said of a mask that does `kind`, and `short` with one of its numbers replaced by a small one."""
    if kind == short:
        return kind
    return "causal+" if {kind, short} <= {"causal", "causal+"} else "other"


def _shortened(model: Graph) -> Iterable[Graph]:
    """The model once more for every long number among its constants, with a short one in its place."""
    numbers = {n for _, n in _numbers(model)}
    for number in sorted(n for n in numbers if abs(n) in LONG):
        other = model.clone()
        for v, n in _numbers(other):
            if n == number and v.const_value is not None:
                small = np.full(v.const_value.shape.numpy(), math.copysign(SHORT, n), v.const_value.dtype.numpy())
                v.const_value = ir.tensor(small, name=v.name)
        yield other


def _numbers(model: Graph) -> list[tuple[ir.Value, int]]:
    """Initializers that are one whole number."""
    held = ((v, v.const_value) for v in model.model.graph.initializers.values())
    return [(v, int(t.numpy().item())) for v, t in held if t is not None and t.size == 1 and t.dtype.is_integer()]


def _samples(g: Graph, model: Graph) -> Iterable[Mapping[str, Array]]:
    with Session(model, prepack=False) as session:
        for shape in SHAPES:
            for seed in range(TRIES):
                feeds = _random(g, _fitting(g, shape), seed)
                yield session.run({p.name: feeds[p.name] for p in session.inputs})


def _fitting(g: Graph, shape: Mapping[str, int]) -> dict[str, int]:
    """The shape with a size for every open axis; other axes get the sequence's length, plus one where it is a past."""
    sizes = dict(shape)
    names = {d for s in specs(g) for d in s.shape if isinstance(d, str)}
    known = dict(open_axes.default_shapes(g)[0])
    picked = {k: n for k, n in sizes.items() if k in known}
    for name in sorted(names):
        if name not in picked and name != "?":
            picked[name] = sizes["batch"] if "batch" in name else sizes["sequence"]
    return picked


def _random(g: Graph, shape: Mapping[str, int], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds = open_axes.feeds_for(g, shape)
    ports: Sequence[TensorSpec] = specs(g)
    mask = roles(ports).get("mask")
    for name, a in feeds.items():
        if name == mask or (a.dtype.kind == "b" and a.ndim == 2):
            seen = rng.random(a.shape) < 0.6
            seen[np.arange(len(seen)), rng.integers(0, a.shape[1], len(seen))] = True
            feeds[name] = seen.astype(a.dtype)
    return feeds


def _reads_inputs(g: Graph, v: ir.Value) -> bool:
    """Whether a value depends on what is fed, not only on the sizes of it."""
    stack, seen = [v], set()
    while stack:
        x = stack.pop()
        if x in seen or g.is_constant(x):
            continue
        seen.add(x)
        node = x.producer()
        if node is None:
            return True
        if node.op_type != "Shape":
            stack += [y for y in node.inputs if y is not None]
    return False


def name_of(samples: Sequence[Array], *, fixed: bool) -> str:
    """What masks `[..., s, t]` have in common; `fixed` says that they follow from sizes alone."""
    seen = [np.atleast_2d(a if a.dtype.kind == "b" else a > FORBIDDEN) for a in samples]
    zero = all(a.dtype.kind == "b" or bool(np.isin(a[a > FORBIDDEN], (0.0,)).all()) for a in samples)
    if not zero:
        return "causal+" if all(_within(a) for a in seen) else "other"
    if all(a.all() for a in seen):
        return "all" if fixed else "other"
    if all(bool((a == a[..., :1, :]).all()) and (a.ndim < 4 or bool((a == a[:, :1]).all())) for a in seen):
        return "padding"
    if fixed and all(bool((a == _triangle(a)).all()) for a in seen):
        return "causal"
    return "causal+" if all(_within(a) for a in seen) else "other"


def _triangle(a: Array) -> Array:
    """Which keys are not later than their query, the last query standing at the last key."""
    s, t = a.shape[-2:]
    return np.tri(s, t, t - s, dtype=bool)


def _within(a: Array) -> bool:
    return a.shape[-2] > 1 and not bool((a & ~_triangle(a)).any())
