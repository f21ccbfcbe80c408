"""What an attention mask hides (padding, later keys, keys outside a window), read from its values on sample inputs.

Only the subgraph that computes the mask is run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.mask_names import name_masks
from onnxcomp.canonical.masks import MASKED_BELOW
from onnxcomp.data import open_axes
from onnxcomp.data.inputs import TensorSpec, roles, specs, total_mask
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph, extract
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session

__all__ = ["name_of", "probe"]

SHAPES = ({"batch": 2, "sequence": 5}, {"batch": 3, "sequence": 8})
TRIES = 3  # random inputs per shape
WINDOWS = range(5, 1 << 20)  # constants that may be the width of a window: too wide to show in samples of 5 to 8 tokens
SHORT_WINDOW = 3  # replaces them in a second run, so that a window shows


def probe(g: Graph, values: Sequence[ir.Value]) -> dict[str, str]:
    """Kinds of masks by name: `all`, `padding`, `causal` (no later key), `causal+` (fewer keys), `other` if unsure.

    `window 8` is causal without keys that are 8 or more positions away. Evidence, not proof: the inputs are random,
    their padding mask random 0 and 1 with at least one key per sample.
    """
    kinds = dict.fromkeys((str(v.name) for v in values), "other")
    nodes, light = extract.light_prefix(g, values)
    if not light:
        return kinds
    constant = {str(v.name) for v in light if not _reads_inputs(g, v)}
    model = extract.extract_subgraph(g, nodes, light)
    try:
        kinds |= _names(g, model, constant)
    except OnnxcompError:
        return kinds
    for short in _shortened(model):
        with contextlib.suppress(OnnxcompError):  # the number was not a window but a size or an index
            shortened = _names(g, short, constant)
            kinds = {name: _common_kind(kind, shortened.get(name, kind)) for name, kind in kinds.items()}
    windows = name_masks(g, [v for v in light if kinds[str(v.name)] == "causal+" and v.name in constant])
    for v, named in windows.items():
        kind, _, width = named.name.rpartition(" ")
        if v is not None and kind == "causal window" and not named.bias:
            kinds[str(v.name)] = f"window {width}"
    return kinds


def _names(g: Graph, model: Graph, constant: Collection[str]) -> dict[str, str]:
    """The kind of each output of a model that computes masks; `constant` names those that depend on sizes alone."""
    samples = list(_samples(g, model))
    return {name: name_of([s[name] for s in samples], fixed=name in constant) for name in samples[0]}


def _common_kind(kind: str, short: str) -> str:
    """The kind that covers both that of a mask and that of its variant with a short window."""
    if kind == short:
        return kind
    return "causal+" if {kind, short} <= {"causal", "causal+"} else "other"


def _shortened(model: Graph) -> Iterable[Graph]:
    """A copy of the model for each number among its constants that may be a window, replaced by a short one."""
    numbers = {n for _, n in _numbers(model)}
    for number in sorted(n for n in numbers if abs(n) in WINDOWS):
        other = model.clone()
        for v, n in _numbers(other):
            if n == number and v.const_value is not None:
                small = np.full(
                    v.const_value.shape.numpy(), math.copysign(SHORT_WINDOW, n), v.const_value.dtype.numpy()
                )
                v.const_value = ir.tensor(small, name=v.name)
        yield other


def _numbers(model: Graph) -> list[tuple[ir.Value, int]]:
    """Initializers that are a single integer, with its value."""
    constants = ((v, v.const_value) for v in model.model.graph.initializers.values())
    return [(v, int(t.numpy().item())) for v, t in constants if t is not None and t.size == 1 and t.dtype.is_integer()]


def _samples(g: Graph, model: Graph) -> Iterable[Mapping[str, Array]]:
    with Session(model, prepack=False) as session:
        for shape in SHAPES:
            for seed in range(TRIES):
                feeds = _random(g, _fitting(g, shape), seed)
                yield session.run({p.name: feeds[p.name] for p in session.inputs})


def _fitting(g: Graph, shape: Mapping[str, int]) -> dict[str, int]:
    """The shape with a size for every dynamic axis; other axes than the batch get the length of the sequence."""
    sizes = dict(shape)
    names = {d for s in specs(g) if s.cache is None for d in s.shape if isinstance(d, str)}
    known = dict(open_axes.default_shapes(g)[0])
    picked = {k: n for k, n in sizes.items() if k in known}
    if "past" in known:
        picked["past"] = sizes["sequence"]
        total = total_mask(specs(g))
        names -= {d for d in (total.shape if total is not None else ()) if isinstance(d, str)}
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
        if name == mask and a.ndim == 1:  # lengths
            feeds[name] = rng.integers(1, 1 + max(shape.values(), default=1), a.shape).astype(a.dtype)
        elif a.ndim == 2 and (name == mask or a.dtype.kind == "b"):
            visible = rng.random(a.shape) < 0.6
            visible[np.arange(len(visible)), rng.integers(0, a.shape[1], len(visible))] = True
            feeds[name] = visible.astype(a.dtype)
    return feeds


def _reads_inputs(g: Graph, v: ir.Value) -> bool:
    """Whether a value depends on the content of inputs, not only on their sizes."""
    stack, visited = [v], set()
    while stack:
        x = stack.pop()
        if x in visited or g.is_constant(x):
            continue
        visited.add(x)
        node = x.producer()
        if node is None:
            return True
        if node.op_type != "Shape":
            stack += [y for y in node.inputs if y is not None]
    return False


def name_of(samples: Sequence[Array], *, fixed: bool) -> str:
    """The kind of sampled masks `[..., s, t]`; `fixed` says that they depend on sizes alone."""
    visible = [np.atleast_2d(a if a.dtype.kind == "b" else a > MASKED_BELOW) for a in samples]
    unbiased = all(a.dtype.kind == "b" or bool(np.isin(a[a > MASKED_BELOW], (0.0,)).all()) for a in samples)
    if not unbiased:
        return "causal+" if all(_is_causal(a) for a in visible) else "other"
    if all(a.all() for a in visible):
        return "all" if fixed else "other"
    if all(bool((a == a[..., :1, :]).all()) and (a.ndim < 4 or bool((a == a[:, :1]).all())) for a in visible):
        return "padding"
    if fixed and all(bool((a == _triangle(a)).all()) for a in visible):
        return "causal"
    return "causal+" if all(_is_causal(a) for a in visible) else "other"


def _triangle(a: Array) -> Array:
    """Bool `[s, t]` of keys not later than their query, where the last query has the position of the last key."""
    s, t = a.shape[-2:]
    return np.tri(s, t, t - s, dtype=bool)


def _is_causal(a: Array) -> bool:
    return a.shape[-2] > 1 and not bool((a & ~_triangle(a)).any())
