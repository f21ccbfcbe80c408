"""Two models value by value: where they begin to differ, and which part is to blame for it.

Values correspond by content and order, not by name: both models are raised to the canonical form, run on the same
samples, and their values aligned. Then the second model runs once more with every value that corresponds replaced by
that of the first one: what a part makes of the *right* inputs is its own error, whatever came before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.element_types import narrowest_float
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.landmarks import Landmark, landmarks
from onnxcomp.engine.probe import fitted
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.sequence_alignment import align
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, Target

__all__ = ["ByLayer", "Compared", "by_layer"]

Runs = list[Array]  # a value on each sample
SAMPLES = (
    4  # run one by one where that goes, so that no padding is compared; layers differ by factors, so few are enough
)
SKETCH = 2048  # elements of a value that similarity is taken of, at equal distances
# Relative error that the same arithmetic in another order stays below, by the narrowest float of the two models.
NOISE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 1e-2, ir.DataType.BFLOAT16: 5e-2}
ALIKE = 0.5  # cosine from which on two values of one shape stand for each other
WRONG = 0.2  # relative error of the next value that shows that an unlike one is no other basis, but wrong
SAME_KIND = 0.5  # what one operator in both is worth, as squared cosine: decides where a fault left nothing alike
OUTSTANDING = 6.0  # times the median own error of values of its kind from which on one stands out
# Own error of the usual product from which on two models have nothing in common: of independent weights it is 1 or
# more, of codes of 2 bits below 0.5.
UNRELATED = 0.8
FEW = 4  # values of a kind below which they have no usual error of their own


@dataclass(frozen=True)
class Compared:
    """A value of the first model and the one of the second that corresponds to it.

    `error` is the relative L2 difference, `own` that where everything before it is as in the first model; `outstanding`
    is how many times larger than those of its kind that is: 0 where it is noise, infinite where most of these are
    exact.
    """

    reference: Landmark
    candidate: Landmark
    error: float
    own: float
    outstanding: float = 0.0

    @property
    def title(self) -> str:
        """Where it is, in words, with the node of the second model."""
        return f"{self.reference.title} ({self.candidate.node})"


@dataclass(frozen=True)
class ByLayer:
    """All values that correspond, from the inputs on, `missing` those of the first model that have no counterpart."""

    values: tuple[Compared, ...]
    missing: tuple[Landmark, ...]
    noise: float
    samples: int

    @property
    def unrelated(self) -> bool:
        """Whether most weight products make something else of the same inputs, so that no part can be blamed.

        Of models in which hardly any products correspond, most of all values.
        """
        products = [x.own for x in self.values if x.reference.product]
        found = products if len(products) >= FEW else [x.own for x in self.values]
        return len(found) >= FEW and not float(np.median(found)) < UNRELATED

    @property
    def first(self) -> Compared | None:
        """The first value that differs by more than noise."""
        return next((x for x in self.values if not x.error <= self.noise), None)

    @property
    def worst(self) -> list[Compared]:
        """Values by their own error, the largest first, without noise."""
        found = [x for x in self.values if not x.own <= self.noise]
        return sorted(found, key=lambda x: -np.nan_to_num(x.own, nan=np.inf))

    @property
    def culprits(self) -> list[Compared]:
        """Values whose own error stands out from those of their kind, the most outstanding first."""
        found = (x for x in self.values if x.outstanding >= OUTSTANDING)
        return sorted(found, key=lambda x: (-x.outstanding, -np.nan_to_num(x.own, nan=np.inf)))


def by_layer(
    original: Graph, result: Graph, data: Dataset, target: Target = CPU, *, source: Graph | None = None
) -> ByLayer:
    """Compare two models value by value on a few samples of the original's data, or of the `source`'s of both."""
    first, second = _raised(original), _raised(result)
    before, after = landmarks(first), landmarks(second)
    raw = [b.feeds for b in data.singly(SAMPLES)]
    feeds, fed = ([fitted(x, source or original, g) for x in raw] for g in (original, result))
    right = _values(first, before, feeds, target)
    made = _values(second, after, fed, target)
    cosines = _cosines(right, made)
    same = np.array([[a.op == b.op for b in after] for a in before]).reshape(cosines.shape)
    like = np.maximum(cosines, 0.0) ** 2  # so that one that is right outweighs one of the same operator that is not
    pairs = align(np.where(np.isnan(cosines), -1.0, like + SAME_KIND * same - SAME_KIND / 2))
    forced = _forced(second, right, after, _alike(pairs, cosines), fed, target)
    if wrong := _wrong(pairs, cosines, right, forced):
        forced = _forced(second, right, after, [*_alike(pairs, cosines), *wrong], fed, target)
    found = [Compared(before[i], after[j], _error(right[i], made[j]), _error(right[i], forced[j])) for i, j in pairs]
    known = {i for i, _ in pairs}
    noise = max(NOISE.get(narrowest_float(g), NOISE[ir.DataType.FLOAT]) for g in (first, second))
    missing = tuple(x for i, x in enumerate(before) if i not in known)
    return ByLayer(tuple(_judged(found, noise)), missing, noise, len(feeds))


def _raised(g: Graph) -> Graph:
    work = g.clone()
    canonicalize(work)
    work.sweep()
    work.infer_shapes()
    return work


def _values(g: Graph, wanted: Sequence[Landmark], feeds: Iterable[Mapping[str, Any]], target: Target) -> list[Runs]:
    """Each wanted value on all samples: `[samples][...]`."""
    names = [x.value for x in wanted]
    with Session(g, target, taps=names) as session:
        runs = [session.run(x, names) for x in feeds]
    return [[np.asarray(r[n]) for r in runs] for n in names]


def _forced(
    g: Graph,
    right: Sequence[Runs],
    wanted: Sequence[Landmark],
    pairs: Sequence[tuple[int, int]],
    feeds: Sequence[Mapping[str, Any]],
    target: Target,
) -> list[Runs]:
    """The wanted values of a graph where the users of those in `pairs` read the right ones instead."""
    work, more = g.clone(), [dict(x) for x in feeds]
    for i, j in pairs:
        name = f"{wanted[j].value}_given"
        v = work.value(wanted[j].value)
        kind = v.dtype or ir.DataType.from_numpy(right[i][0].dtype)
        sizes = [set(n) for n in zip(*_shapes(right[i]), strict=True)]
        shape = ir.Shape([n.pop() if len(n) == 1 else None for n in sizes])  # widths must be known
        new = ir.Value(name=name, type=ir.TensorType(kind), shape=shape)
        work.model.graph.inputs.append(new)
        for user, at in tuple(v.uses()):
            user.replace_input_with(at, new)
        for x, a in zip(more, right[i], strict=True):
            x[name] = a.astype(kind.numpy())
    return _values(work, wanted, more, target)


def _alike(pairs: Iterable[tuple[int, int]], cosines: Float64) -> list[tuple[int, int]]:
    return [(i, j) for i, j in pairs if cosines[i, j] >= ALIKE]


def _wrong(
    pairs: Sequence[tuple[int, int]], cosines: Float64, right: Sequence[Runs], forced: Sequence[Runs]
) -> list[tuple[int, int]]:
    """Pairs that are unlike, and make the next alike one wrong; where they do not, they stand in another basis."""
    found = []
    for at, (i, j) in enumerate(pairs):
        if cosines[i, j] < ALIKE:
            later = next(((a, b) for a, b in pairs[at + 1 :] if cosines[a, b] >= ALIKE), None)
            if later is None or not _error(right[later[0]], forced[later[1]]) <= WRONG:
                found.append((i, j))
    return found


def _flat(values: Runs) -> Float64:
    parts = [np.asarray(a, np.float64).ravel() for a in values]
    return np.concatenate(parts) if parts else np.zeros(0)


def _shapes(values: Runs) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(a) for a in values)


def _cosines(right: Sequence[Runs], made: Sequence[Runs]) -> Float64:
    """Cosine of each value of one model with each of the other, NaN where shapes differ: `[n, m]`."""
    cosines = np.full((len(right), len(made)), np.nan)
    groups: dict[Any, tuple[list[int], list[int]]] = {}
    for at, side in enumerate((right, made)):
        for i, values in enumerate(side):
            groups.setdefault(_shapes(values), ([], []))[at].append(i)
    for rows, columns in groups.values():
        if rows and columns:
            a, b = (np.array([_sketch(side[i]) for i in x]) for side, x in ((right, rows), (made, columns)))
            cosines[np.ix_(rows, columns)] = a @ b.T
    return cosines


def _sketch(values: Runs) -> Float64:
    """A value at equal distances, with norm 1; all of it where it is small."""
    flat = np.nan_to_num(_flat(values), posinf=0.0, neginf=0.0)
    x = flat[:: max(1, len(flat) // SKETCH)]
    return x / max(float(np.linalg.norm(x)), 1e-30)


def _error(right: Runs, made: Runs) -> float:
    """Relative L2 difference of two values; infinite entries that both have are equal, others count as a whole."""
    a, b = _flat(right), _flat(made)
    if a.shape != b.shape:
        return float("nan")
    both = np.isfinite(a) & np.isfinite(b)
    if not both.all() and (a[~both] != b[~both])[~np.isnan(a[~both])].any():
        return float("inf")
    a, b = a[both], b[both]
    return float(np.linalg.norm(b - a) / max(float(np.linalg.norm(a)), 1e-30)) if len(a) else 0.0


def _judged(found: Sequence[Compared], noise: float) -> list[Compared]:
    """Each value with how far its own error stands out: from its kind's, and no less from those of products."""
    products = [x.own for x in found if x.reference.product]
    least = max(noise, float(np.median(products)) if products else 0.0)
    kinds: dict[str, list[float]] = {}
    for x in found:
        kinds.setdefault(_kind(x), []).append(x.own)
    usual = {k: max(least, float(np.median(v)) if len(v) >= FEW else 0.0) for k, v in kinds.items()}
    return [dataclasses.replace(x, outstanding=_outstanding(x.own, usual[_kind(x)], noise)) for x in found]


def _outstanding(own: float, usual: float, noise: float) -> float:
    """How many times the usual error one is; the usual one being noise, a multiple of it would say nothing."""
    if own <= noise:
        return 0.0
    if usual > noise:
        return own / usual
    return 0.0 if own < OUTSTANDING * noise else math.inf


def _kind(x: Compared) -> str:
    return "product" if x.reference.product else x.reference.op
