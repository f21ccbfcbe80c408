"""Masks named by probing: what computes a mask is cut out and run alone on small samples, compared with closed forms.

The algebra of mask subgraphs differs with every exporter; what they compute does not. A name is evidence, no proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxcomp.canonical.masks import BLOCKED
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["Mask", "name_masks"]

BATCH, LENGTH = 2, 9
SHORT = 4  # stands for a window too long to be seen in a sample
WEIGHTED = {"MatMul", "Gemm", "Conv", "Attention", "LayerNormalization", "RMSNormalization", "Softmax", "Einsum"}
MOST = 1000  # values
LARGE = 1 << 20  # elements of a constant that is rather a weight
FAILS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError)
OTHER = "other"


@dataclass(frozen=True)
class Mask:
    """The name of a mask, and of the finite numbers it adds to the scores ("" for none)."""

    name: str
    bias: str = ""


def name_masks(g: Graph, masks: Iterable[ir.Value | None]) -> dict[ir.Value | None, Mask]:
    """Names such as `causal+padding`; `other` where no closed form fits or the mask is computed from activations."""
    named: dict[ir.Value | None, Mask] = {None: Mask("none")}
    for mask in masks:
        if mask is not None and mask not in named:
            named[mask] = _name(g, mask)
    return named


def _name(g: Graph, mask: ir.Value) -> Mask:
    if g.is_constant(mask):
        return _of_sample(_Sample(g.array(mask)))
    read = _read_inputs(g, mask)
    if read is None:
        return Mask(OTHER, "content")
    try:
        return _probed(_Cut.of(g, mask), read)
    except FAILS:  # the evaluator refuses what it does not know in its own ways
        return Mask(OTHER)


def _read_inputs(g: Graph, mask: ir.Value) -> list[ir.Value] | None:
    """Graph inputs whose content the mask depends on; None when it takes a layer's arithmetic to compute it."""
    every = _above(g, mask, through_shapes=True)
    if every is None:
        return None
    return [v for v in _above(g, mask, through_shapes=False) or () if v.producer() is None]


def _above(g: Graph, mask: ir.Value, *, through_shapes: bool) -> list[ir.Value] | None:
    """What a mask is computed from; None when that holds weights, or too much."""
    todo, seen = [mask], set[ir.Value]()
    while todo:
        v = todo.pop()
        tensor = g.tensor(v)
        if v in seen or (tensor is not None and tensor.size <= LARGE):
            continue
        seen.add(v)
        node = v.producer()
        if tensor is not None or (node is not None and (node.op_type in WEIGHTED or node.domain)) or len(seen) > MOST:
            return None
        if node is not None and (through_shapes or node.op_type != "Shape"):
            todo.extend(x for x in node.inputs if x is not None)
    return list(seen)


# ---- running ---------------------------------------------------------------------------------------------------------


class _Cut:
    """The part of a model that computes one value."""

    def __init__(self, model: ir.Model, inputs: list[ir.Value]) -> None:
        self.model, self.inputs = model, inputs

    @classmethod
    def of(cls, g: Graph, mask: ir.Value) -> _Cut:
        """Everything above a mask."""
        copy = g.clone()
        copy.model.graph.outputs[:] = [copy.value(str(mask.name))]
        copy.sweep()
        return cls(copy.model, copy.inputs)

    def run(self, contents: Mapping[str, Array] | None = None) -> _Sample:
        """The mask for inputs of ones, or with the given contents."""
        feeds = {str(v.name): np.ones(_sizes(v), _dtype(v)) for v in self.inputs}
        feeds |= {k: a.astype(feeds[k].dtype) for k, a in (contents or {}).items()}
        with np.errstate(all="ignore"):
            (result,) = ReferenceEvaluator(ir.to_proto(self.model)).run(None, feeds)
        return _Sample(np.asarray(result))

    def numbers(self) -> set[int]:
        """All whole numbers among the constants."""
        return {n for _, n in self._scalars()}

    def with_number(self, old: int, new: int) -> _Cut:
        """A copy with a number replaced wherever it stands."""
        other = _Cut(self.model.clone(), self.inputs)
        for v, n in other._scalars():
            t = v.const_value
            if n == old and t is not None:
                v.const_value = ir.tensor(np.full(t.shape.numpy(), new, t.dtype.numpy()), name=v.name)
        return other

    def _scalars(self) -> list[tuple[ir.Value, int]]:
        held = ((v, v.const_value) for v in self.model.graph.initializers.values())
        return [(v, int(t.numpy().item())) for v, t in held if t is not None and t.size == 1 and t.dtype.is_integer()]


def _sizes(v: ir.Value) -> list[int]:
    dims = list(v.shape or ())
    return [d if isinstance(d, int) else BATCH if i == 0 else LENGTH for i, d in enumerate(dims)]


def _dtype(v: ir.Value) -> np.dtype[np.generic]:
    return (v.dtype or ir.DataType.INT64).numpy()


class _Sample:
    """One evaluated mask as `[batch, heads, queries, keys]`: what it allows, and what it adds where it allows."""

    def __init__(self, a: Array) -> None:
        whole = a.reshape((1,) * (4 - a.ndim) + a.shape)
        self.allowed: Array = whole if whole.dtype == np.bool_ else whole.astype(np.float64) > BLOCKED
        added = np.zeros(whole.shape) if whole.dtype == np.bool_ else whole.astype(np.float64)
        self.added: Array = np.where(self.allowed, added, 0.0)

    @property
    def pattern(self) -> Array | None:
        """What all samples and heads allow alike, `[queries, keys]`; None where they differ."""
        first: Array = self.allowed[0, 0]
        return first if (self.allowed == first).all() else None


# ---- names -----------------------------------------------------------------------------------------------------------


def _probed(cut: _Cut, read: list[ir.Value]) -> Mask:
    plain = cut.run()
    pattern = plain.pattern
    if pattern is None:
        return Mask(OTHER, _bias(plain))
    padding = _padding(cut, plain, [v for v in cut.inputs if v.name in {x.name for x in read}])
    form = _form(pattern)
    if form in ("", "causal"):
        form = _long_window(cut, form)
    if form is None or padding is None:
        return Mask(OTHER, _bias(plain))
    return Mask("+".join(x for x in (form, padding) if x) or "none", _bias(plain))


def _of_sample(sample: _Sample) -> Mask:
    form = _form(sample.pattern) if sample.pattern is not None else None
    return Mask(OTHER if form is None else form or "none", _bias(sample))


def _form(pattern: Array) -> str | None:
    """Empty where everything is allowed, None where no closed form fits; queries are the last positions of the keys."""
    queries, keys = pattern.shape
    if pattern.all():
        return ""
    back = np.arange(keys - queries, keys)[:, None] - np.arange(keys)[None, :]
    width = int(pattern.sum(1).max())
    if np.array_equal(pattern, back >= 0):
        return "causal"
    if np.array_equal(pattern, (back >= 0) & (back < width)):
        return f"causal window {width}"
    side = int(np.abs(back)[pattern].max()) if pattern.any() else 0
    return f"window {side}" if np.array_equal(pattern, np.abs(back) <= side) else None


def _long_window(cut: _Cut, form: str) -> str:
    """Whether one of the constants is a window longer than the sample: put a short one in its place and look again."""
    for number in sorted(cut.numbers()):
        if not LENGTH <= abs(number) < 1 << 20:
            continue
        pattern = cut.with_number(number, SHORT if number > 0 else -SHORT).run().pattern
        found = _form(pattern) if pattern is not None else None
        if found and "window" in found:
            kind, _, width = found.rpartition(" ")
            return f"{kind} {abs(number) + int(width) - SHORT}"
    return form


def _padding(cut: _Cut, plain: _Sample, read: Iterable[ir.Value]) -> str | None:
    """Empty where no input's content matters, None where it does in another way than hiding keys."""
    rng, result = np.random.default_rng(0), ""
    for v in read:
        sizes = _sizes(v)
        if len(sizes) != 2:
            return None
        kept = rng.integers(0, 2, sizes)
        kept[:, 0], kept[:, -1] = 1, 0
        allowed = cut.run({str(v.name): kept}).allowed
        if allowed.shape == plain.allowed.shape and np.array_equal(allowed, plain.allowed):
            continue
        found = next((name for name, hides in _hidings(kept, plain) if _equal(allowed, hides)), None)
        if found is None or result:
            return None
        result = found
    return result


def _hidings(kept: Array, plain: _Sample) -> Iterable[tuple[str, Array]]:
    """Ways in which a `[batch, keys]` input of zeros and ones may hide keys."""
    keys, queries = kept[:, None, None, :] == 1, kept[:, None, :, None] == 1
    if kept.shape[1] == plain.allowed.shape[-1]:
        yield "padding", plain.allowed & keys
        if plain.allowed.shape[-2] in (1, kept.shape[1]):
            yield "padding of queries and keys", plain.allowed & keys & queries


def _equal(a: Array, b: Array) -> bool:
    """Whether two masks are the same once broadcast."""
    try:
        return bool((a == b).all())
    except ValueError:  # shapes that do not fit together
        return False


def _bias(sample: _Sample) -> str:
    """`alibi` for numbers linear in the key's place, `relative` for any others, empty for none."""
    added = sample.added
    if not added.any():
        return ""
    steps = np.diff(added, axis=-1)
    known = sample.allowed[..., 1:] & sample.allowed[..., :-1]
    slope = np.where(known, steps, 0).sum((-2, -1), keepdims=True) / np.maximum(known.sum((-2, -1), keepdims=True), 1)
    linear = np.where(known, np.abs(steps - slope), 0).max() <= 1e-3 * max(float(np.abs(slope).max()), 1e-12)
    return "alibi" if linear else "relative"
