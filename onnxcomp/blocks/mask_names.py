"""Masks named by probing: the subgraph of a mask is run alone on small samples and compared with closed forms.

Mask subgraphs differ between exporters; what they compute does not. A name is evidence, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxcomp.blocks.bounded_evaluator import BOUNDED_OPS
from onnxcomp.canonical.masks import MASKED_BELOW
from onnxcomp.canonical.sinks import has_sink
from onnxcomp.data.inputs import specs, total_mask
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYER_OPS
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Array

__all__ = ["Mask", "name_masks"]

SAMPLE_BATCH, SAMPLE_LENGTH = 2, 9  # sizes of the open axes of a sample
SAMPLE_PAST = 4  # tokens of it that are in the caches, where a model has any
SHORT_WINDOW = 4  # replaces a window longer than a sample
SHORT_SINKS = 2  # replaces more of them
WINDOW = re.compile(r"((?:causal )?window) (\d+)(?: sinks (\d+))?")
MAX_WINDOW = 1 << 20  # integers from here on are not tried as windows
LINEAR_TOLERANCE = 1e-3  # of the steps of a bias along the keys, relative to the largest slope
MAX_VALUES = 1000  # values in a mask's subgraph; a larger one is not probed
MAX_CONSTANT = 1 << 20  # elements of a constant in it; a larger one counts as a weight
# A mask behind one of these is computed from activations, or takes turns that nothing bounds.
WEIGHTED_OPS = LAYER_OPS | {"Einsum", "Loop", "Scan"}
EVALUATOR_ERRORS = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError, ArithmeticError,
    MemoryError,
)  # fmt: skip
OTHER = "other"


@dataclass(frozen=True)
class Mask:
    """The name of a mask, and of the finite numbers it adds to the scores ("" for none)."""

    name: str
    bias: str = ""


def name_masks(g: Graph, masks: Iterable[ir.Value | None]) -> dict[ir.Value | None, Mask]:
    """Names such as `causal+padding`; `other` where no closed form fits or the mask is computed from activations.

    A mask that holds the sinks of its attentions is named by what it does to the keys.
    """
    named: dict[ir.Value | None, Mask] = {None: Mask("none")}
    for mask in masks:
        if mask is not None and mask not in named:
            named[mask] = _name(g, mask)
    return named


def _name(g: Graph, mask: ir.Value) -> Mask:
    keys = slice(None, -1 if any(u.op_type == "Attention" and has_sink(u) for u in users_of(mask)) else None)
    if g.is_constant(mask):
        return _name_sample(_Sample(g.array(mask)[..., keys]))
    inputs_read = _read_inputs(g, mask)
    if inputs_read is None:
        return Mask(OTHER, "content")
    try:
        return _name_by_probing(_MaskModel.of(g, mask, keys), inputs_read)
    except (*EVALUATOR_ERRORS, DataError):  # the evaluator raises all of these for unsupported nodes
        return Mask(OTHER)


def _read_inputs(g: Graph, mask: ir.Value) -> list[ir.Value] | None:
    """Graph inputs whose content the mask depends on; None where a layer's operators are needed to compute it."""
    upstream = _upstream(g, mask, through_shapes=True)
    if upstream is None:
        return None
    return [v for v in _upstream(g, mask, through_shapes=False) or () if v.producer() is None]


def _upstream(g: Graph, mask: ir.Value, *, through_shapes: bool) -> list[ir.Value] | None:
    """All values that a mask is computed from; None where these include weights or are too many."""
    pending, visited = [mask], set[ir.Value]()
    while pending:
        v = pending.pop()
        tensor = g.tensor(v)
        if v in visited or (tensor is not None and tensor.size <= MAX_CONSTANT):
            continue
        visited.add(v)
        node = v.producer()
        if (
            tensor is not None
            or (node is not None and (node.op_type in WEIGHTED_OPS or node.domain))
            or len(visited) > MAX_VALUES
        ):
            return None
        if node is not None and (through_shapes or node.op_type != "Shape"):
            pending.extend(x for x in node.inputs if x is not None)
    return list(visited)


# ---- running ---------------------------------------------------------------------------------------------------------


class _MaskModel:
    """The subgraph that computes a mask, as a model."""

    def __init__(self, model: ir.Model, inputs: list[ir.Value], keys: slice, sizes: Mapping[str, list[int]]) -> None:
        self.model, self.inputs, self.keys, self.sizes = model, inputs, keys, sizes

    @classmethod
    def of(cls, g: Graph, mask: ir.Value, keys: slice) -> _MaskModel:
        """The subgraph of a mask."""
        copy = g.clone()
        copy.model.graph.outputs[:] = [copy.value(str(mask.name))]
        copy.sweep()
        return cls(copy.model, copy.inputs, keys, _sizes(g))

    def run(self, contents: Mapping[str, Array] | None = None) -> _Sample:
        """The mask for inputs of ones, or of the given contents."""
        feeds = {str(v.name): np.ones(self.sizes[str(v.name)], _dtype(v)) for v in self.inputs}
        feeds |= {k: a.astype(feeds[k].dtype) for k, a in (contents or {}).items()}
        with np.errstate(all="ignore"):
            (result,) = ReferenceEvaluator(ir.to_proto(self.model), new_ops=BOUNDED_OPS).run(None, feeds)
        return _Sample(np.asarray(result)[..., self.keys])

    def numbers(self) -> set[int]:
        """All integers among the scalar constants."""
        return {n for _, n in self._scalars()}

    def with_number(self, old: int, new: int) -> _MaskModel:
        """A copy with a number replaced in all scalar constants."""
        changed = _MaskModel(self.model.clone(), self.inputs, self.keys, self.sizes)
        for v, n in changed._scalars():
            t = v.const_value
            if n == old and t is not None:
                v.const_value = ir.tensor(np.full(t.shape.numpy(), new, t.dtype.numpy()), name=v.name)
        return changed

    def _scalars(self) -> list[tuple[ir.Value, int]]:
        initializers = ((v, v.const_value) for v in self.model.graph.initializers.values())
        return [
            (v, int(t.numpy().item()))
            for v, t in initializers
            if t is not None and t.size == 1 and t.dtype.is_integer()
        ]


def _sizes(g: Graph) -> dict[str, list[int]]:
    """The sizes of each input in a sample; behind caches new tokens are fewer than those that a mask counts."""
    inputs = specs(g)
    total = total_mask(inputs)
    past = SAMPLE_PAST if any(s.cache is not None for s in inputs) else 0
    sizes = {}
    for s in inputs:
        length = SAMPLE_LENGTH if s is total else SAMPLE_PAST if s.cache is not None else SAMPLE_LENGTH - past
        first = [SAMPLE_BATCH, *[length] * len(s.shape)]
        sizes[s.name] = [d if isinstance(d, int) else first[i] for i, d in enumerate(s.shape)]
    return sizes


def _dtype(v: ir.Value) -> np.dtype[np.generic]:
    return (v.dtype or ir.DataType.INT64).numpy()


class _Sample:
    """One evaluated mask `[batch, heads, queries, keys]`: which keys it allows, and the bias that it adds to these."""

    def __init__(self, a: Array) -> None:
        four_axes = a.reshape((1,) * (4 - a.ndim) + a.shape)
        self.allowed: Array = four_axes if four_axes.dtype == np.bool_ else four_axes.astype(np.float64) > MASKED_BELOW
        added = np.zeros(four_axes.shape) if four_axes.dtype == np.bool_ else four_axes.astype(np.float64)
        self.added: Array = np.where(self.allowed, added, 0.0)

    @property
    def pattern(self) -> Array | None:
        """The pattern `[queries, keys]` that all samples and heads share; None where they differ."""
        first: Array = self.allowed[0, 0]
        return first if (self.allowed == first).all() else None


# ---- names -----------------------------------------------------------------------------------------------------------


def _name_by_probing(mask_model: _MaskModel, inputs_read: list[ir.Value]) -> Mask:
    unpadded = mask_model.run()
    pattern = unpadded.pattern
    if pattern is None:
        return Mask(OTHER, _bias(unpadded))
    padding = _padding(mask_model, unpadded, [v for v in mask_model.inputs if v.name in {x.name for x in inputs_read}])
    form = _form(pattern)
    if form in ("", "causal"):
        form = _find_long_window(mask_model, form)
    if form is None or padding is None:
        return Mask(OTHER, _bias(unpadded))
    return Mask("+".join(x for x in (form, padding) if x) or "none", _bias(unpadded))


def _name_sample(sample: _Sample) -> Mask:
    form = _form(sample.pattern) if sample.pattern is not None else None
    return Mask(OTHER if form is None else form or "none", _bias(sample))


def _form(pattern: Array) -> str | None:
    """The closed form, empty where all is allowed, None where none fits; queries are the last positions of the keys."""
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
    return f"window {side}" if np.array_equal(pattern, np.abs(back) <= side) else _with_sinks(pattern, back)


def _with_sinks(pattern: Array, back: Array) -> str | None:
    """A window and first tokens that all see, and, where it is not causal, that see all; None for another form."""
    keys = pattern.shape[1]
    hidden = np.flatnonzero(~pattern[-1])
    if not len(hidden) or not pattern[-1, 0]:
        return None
    sinks, width = int(hidden[0]), keys - 1 - int(hidden[-1])
    key, query = np.arange(keys)[None, :], np.arange(keys - len(pattern), keys)[:, None]
    near = (np.abs(back) < width) | (key < sinks)
    if np.array_equal(pattern, (back >= 0) & near):
        return f"causal window {width} sinks {sinks}"
    return f"window {width - 1} sinks {sinks}" if np.array_equal(pattern, near | (query < sinks)) else None


def _find_long_window(mask_model: _MaskModel, form: str) -> str:
    """The form with a window longer than the sample, if replacing one of the constants by a short window reveals it.

    Sinks may be more than the sample has tokens as well: then two are replaced.
    """
    numbers = sorted(mask_model.numbers())
    long = [n for n in numbers if SAMPLE_LENGTH <= abs(n) < MAX_WINDOW]
    for number in long:
        short = SHORT_WINDOW if number > 0 else -SHORT_WINDOW
        shorter = mask_model.with_number(number, short)
        for sinks in (None, *(n for n in numbers if SHORT_SINKS < n < MAX_WINDOW and n != number)):
            found = _tried(shorter if sinks is None else shorter.with_number(sinks, SHORT_SINKS))
            if found is None or (sinks is not None and found[2] != SHORT_SINKS):
                continue
            kind, width, first = found
            said = f"{kind} {abs(number) + width - SHORT_WINDOW}"
            return said if not first else f"{said} sinks {first if sinks is None else sinks}"
    return form


def _tried(mask_model: _MaskModel) -> tuple[str, int, int] | None:
    """What kind of window a mask has, its width and its sinks; None for another mask."""
    try:
        pattern = mask_model.run().pattern
    except EVALUATOR_ERRORS:  # the number was not a window but a size or an index
        return None
    parts = WINDOW.fullmatch((_form(pattern) or "") if pattern is not None else "")
    return None if parts is None else (parts[1], int(parts[2]), int(parts[3] or 0))


def _padding(mask_model: _MaskModel, unpadded: _Sample, inputs_read: Iterable[ir.Value]) -> str | None:
    """The form of padding: empty where no input's content matters, None where it does otherwise than by hiding keys."""
    rng, result = np.random.default_rng(0), ""
    for v in inputs_read:
        sizes = mask_model.sizes[str(v.name)]
        if len(sizes) != 2:
            return None
        token_mask = rng.integers(0, 2, sizes)
        token_mask[:, 0], token_mask[:, -1] = 1, 0
        allowed = mask_model.run({str(v.name): token_mask}).allowed
        if allowed.shape == unpadded.allowed.shape and np.array_equal(allowed, unpadded.allowed):
            continue
        padding_form = next(
            (name for name, hides in _padding_forms(token_mask, unpadded) if _equal(allowed, hides)), None
        )
        if padding_form is None or result:
            return None
        result = padding_form
    return result


def _padding_forms(token_mask: Array, unpadded: _Sample) -> Iterable[tuple[str, Array]]:
    """Ways in which a `[batch, keys]` input of zeros and ones may hide keys."""
    keys, queries = token_mask[:, None, None, :] == 1, token_mask[:, None, :, None] == 1
    if token_mask.shape[1] == unpadded.allowed.shape[-1]:
        yield "padding", unpadded.allowed & keys
        if unpadded.allowed.shape[-2] in (1, token_mask.shape[1]):
            yield "padding of queries and keys", unpadded.allowed & keys & queries


def _equal(a: Array, b: Array) -> bool:
    """Whether two masks are the same once broadcast."""
    try:
        return bool((a == b).all())
    except ValueError:  # shapes that do not fit together
        return False


def _bias(sample: _Sample) -> str:
    """`alibi` for a bias linear in the key's position, `relative` for any other, empty for none."""
    added = sample.added
    if not added.any():
        return ""
    steps = np.diff(added, axis=-1)
    both_allowed = sample.allowed[..., 1:] & sample.allowed[..., :-1]
    slope = np.where(both_allowed, steps, 0).sum((-2, -1), keepdims=True) / np.maximum(
        both_allowed.sum((-2, -1), keepdims=True), 1
    )
    linear = np.where(both_allowed, np.abs(steps - slope), 0).max(initial=0) <= LINEAR_TOLERANCE * max(
        float(np.abs(slope).max()), 1e-12
    )
    return "alibi" if linear else "relative"
