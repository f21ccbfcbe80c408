"""Statistics as values: the expression that asks for a statistic is also the key that reads it.

`needs()` yields `absmax(v)`; later `env.stats[absmax(v)]` is the answer. A channel is an index of the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

from onnxcomp.errors import OnnxcompError
from onnxcomp.maths import Array

if TYPE_CHECKING:
    import onnx_ir as ir

Per = Literal["tensor", "channel"]
Of = Literal["current", "original"]
OtherOf = Literal["", "current", "original"]
Kind = Literal[
    "absmax",
    "minmax",
    "mean",
    "var",
    "norm2",
    "gram",
    "cross_gram",
    "histogram",
    "cosine",
    "sample",
    "paired",
    "counts",
]


@dataclass(frozen=True)
class Stat:
    """What is reduced, and over which axes.

    `other` is the second value of a pairwise statistic, of the graph `other_of` ("" is the graph of the need itself);
    `n` is the number of rows of a sample, or of the integers that are counted.
    """

    kind: Kind
    per: Per = "tensor"
    other: str = ""
    n: int = 0
    other_of: OtherOf = ""


@dataclass(frozen=True)
class Need:
    """One statistic of one value, of the graph as it is now or of the original model."""

    value: str
    stat: Stat
    of: Of = "current"

    def __str__(self) -> str:
        return f"{self.stat.kind}({self.value})" + (" of the original" if self.of == "original" else "")


class Accumulator(Protocol):
    """Streaming reduction; law: any split of the batches, merged in any order, gives the same result.

    `x` has rows `[R, C]`; `extra` is the second value of a pair or the row keys of a sample (see `accumulate`).
    """

    def update(self, x: Array, extra: Array | None = None) -> None: ...
    def merge(self, other: Self) -> None: ...
    def result(self) -> Array: ...


class Stats(Mapping[Need, Array]):
    """Collected statistics; a statistic nobody asked for is a clear error.

    One that is too large to hold lies in a file and is mapped anew each time it is read, so that its memory is free
    again as soon as the reader lets go.
    """

    def __init__(self, values: Mapping[Need, Array | Path] | None = None) -> None:
        self._values: dict[Need, Array | Path] = dict(values or {})

    def __getitem__(self, need: Need) -> Array:
        try:
            held = self._values[need]
        except KeyError:
            raise OnnxcompError(f"statistic {need} was not collected; yield it from needs()") from None
        return np.load(held, mmap_mode="r", allow_pickle=False) if isinstance(held, Path) else held

    def __iter__(self) -> Iterator[Need]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _name(v: ir.Value | str) -> str:
    name = v if isinstance(v, str) else v.name
    if not name:
        raise OnnxcompError("a statistic was asked of a value without a name")
    return name


def absmax(v: ir.Value | str, per: Per = "tensor", of: Of = "current") -> Need:
    """Largest magnitude: shape `[]`, or `[C]` per channel."""
    return Need(_name(v), Stat("absmax", per), of)


def minmax(v: ir.Value | str, per: Per = "tensor", of: Of = "current") -> Need:
    """Smallest and largest value: shape `[2]`, or `[2, C]` per channel."""
    return Need(_name(v), Stat("minmax", per), of)


def mean(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Mean over rows: shape `[]`, or `[C]` per channel."""
    return Need(_name(v), Stat("mean", per), of)


def var(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Population variance over rows: shape `[]`, or `[C]` per channel."""
    return Need(_name(v), Stat("var", per), of)


def norm2(v: ir.Value | str, per: Per = "channel", of: Of = "current") -> Need:
    """Euclidean norm over rows: shape `[]`, or `[C]` per channel (Wanda's statistic)."""
    return Need(_name(v), Stat("norm2", per), of)


def gram(v: ir.Value | str, of: Of = "current") -> Need:
    """`X^T X` over rows: shape `[C, C]`, float64."""
    return Need(_name(v), Stat("gram", "channel"), of)


def cross_gram(v: ir.Value | str, other: ir.Value | str, of: Of = "current", other_of: OtherOf = "") -> Need:
    """`X^T Y` over rows, `Y` being the value `other`, by default of the same graph: shape `[C, D]`, float64."""
    return Need(_name(v), Stat("cross_gram", "channel", other=_name(other), other_of=other_of), of)


def histogram(v: ir.Value | str, of: Of = "current") -> Need:
    """Counts by the top 16 bits of the float32 pattern: shape `[65536]`, int64 (see `maths.formats`)."""
    return Need(_name(v), Stat("histogram"), of)


def cosine(v: ir.Value | str, other: ir.Value | str, of: Of = "current", other_of: OtherOf = "") -> Need:
    """Mean row-wise cosine of two values of equal shape: shape `[]` (ShortGPT's block influence is one minus it)."""
    return Need(_name(v), Stat("cosine", other=_name(other), other_of=other_of), of)


def sample(v: ir.Value | str, n: int, of: Of = "current") -> Need:
    """A reproducible sample of at most `n` rows, independent of batch size: shape `[<=n, C]`."""
    return Need(_name(v), Stat("sample", "channel", n=n), of)


def paired(v: ir.Value | str, other: ir.Value | str, n: int, of: Of = "current", other_of: OtherOf = "") -> Need:
    """A sample of rows, each with the same row of `other` behind it: shape `[<=n, C + D]`.

    The rows are those of any other pair or sample of `v` of that size.
    """
    return Need(_name(v), Stat("paired", "channel", other=_name(other), n=n, other_of=other_of), of)


def counts(v: ir.Value | str, n: int, of: Of = "current") -> Need:
    """How often each integer below `n` occurs in an integer value: shape `[n]`, int64."""
    return Need(_name(v), Stat("counts", n=n), of)
