"""What a statistic is: the need that asks for it, the class that registers its kind, the accumulator that reduces rows.

A new kind is one file: a subclass of `Statistic` with its accumulator, and a function that makes its `Need`. It is
known from the moment that file is imported, which whoever asks for it does.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np

from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.maths import Array

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Accumulator", "Key", "Need", "NoRows", "Stat", "Statistic", "Stats", "fetched", "kinds", "statistic"]

Per = Literal["tensor", "channel"]
Of = Literal["current", "original"]
OtherOf = Literal["", "current", "original"]
Key = tuple[Of, str]  # a value of one of the two graphs

CHUNK = 1 << 18  # elements converted to float64 at a time: 2 MiB, which stays in cache


@dataclass(frozen=True)
class Stat:
    """What is reduced, and over which axes.

    `other` is the second value of a pairwise statistic, of the graph `other_of` ("" is the graph of the need itself);
    `n` is the number of rows of a sample, or of the integers that are counted; `without` are channels left out of a
    histogram.
    """

    kind: str
    per: Per = "tensor"
    other: str = ""
    n: int = 0
    other_of: OtherOf = ""
    without: tuple[int, ...] = ()


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


class Statistic(abc.ABC):
    """A kind of statistic; a subclass that has a `kind` registers itself.

    Raises `OnnxcompError` where another class has that kind already.
    """

    kind: ClassVar[str]
    family: ClassVar[str] = ""
    """Kinds of one family are read from one accumulator; by default a kind has its own."""
    per: ClassVar[tuple[Per, ...]] = ("tensor", "channel")
    """What it can be asked of."""
    pairs: ClassVar[bool] = False
    """Whether it reads a second value: `extra` of the accumulator's `update`, with as many rows."""
    sized: ClassVar[bool] = False
    """Whether it needs a number `n`."""
    draws: ClassVar[bool] = False
    """Whether `extra` is a key of each row `[R]` instead; the rows of a pair lie side by side then."""
    integers: ClassVar[bool] = False
    """Whether it is of integers from 0 to `n - 1`."""
    exact: ClassVar[bool] = False
    """Whether the order of the data changes no bit of it; else only float noise."""
    degree: ClassVar[int] = 1
    """It grows as this power of the values."""
    noise: ClassVar[float] = 1e-12
    """Relative to its size: what the order of the data may change, where it is not exact."""
    version: ClassVar[int] = 1
    """Raise it with the definition, so that results on disk are not taken for the new ones."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            return
        there = _KINDS.get(cls.kind)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise OnnxcompError(f"{cls.__module__}: there is a statistic '{cls.kind}' already, in {there.__module__}")
        _KINDS[cls.kind] = cls
        _FAMILIES.setdefault(cls.family or cls.kind, cls)

    @classmethod
    @abc.abstractmethod
    def accumulator(cls, stat: Stat) -> Accumulator:
        """An empty accumulator, the same for all kinds of a family."""

    @classmethod
    def finish(cls, stat: Stat, result: Array) -> Array:
        """The statistic itself, from what its accumulator gives."""
        return result

    @classmethod
    def nbytes(cls, stat: Stat, widths: Sequence[int]) -> int:
        """Bytes that an accumulator holds for values of these widths; by default six float32 or `n` rows."""
        return int(widths[0] * 4 * max(stat.n, 6))

    @classmethod
    def examples(cls) -> list[Stat]:
        """What the law of the accumulators is tested on."""
        return [Stat(cls.kind, per, "w" if cls.pairs else "", 5 if cls.sized else 0) for per in cls.per]


_KINDS: dict[str, type[Statistic]] = {}
_FAMILIES: dict[str, type[Statistic]] = {}


def kinds() -> dict[str, type[Statistic]]:
    """All that have registered, by kind."""
    return dict(_KINDS)


def statistic(stat: Stat) -> type[Statistic]:
    """The class of a statistic or of a family; raises `ValueError` for a kind that nobody registered."""
    found = _KINDS.get(stat.kind) or _FAMILIES.get(stat.kind)
    if found is None:
        raise ValueError(f"there is no statistic '{stat.kind}'; there are {', '.join(sorted(_KINDS))}")
    return found


def family(stat: Stat) -> Stat:
    """The statistic whose accumulator answers `stat`: mean, variance and norm share one, and so do the extremes."""
    return replace(stat, kind=statistic(stat).family or stat.kind)


def accumulator(stat: Stat) -> Accumulator:
    """An empty accumulator for a statistic or a family."""
    return statistic(stat).accumulator(stat)


def fetched(need: Need) -> list[Key]:
    """The values a statistic reads, each of its graph."""
    second: list[Key] = [(need.stat.other_of or need.of, need.stat.other)] if need.stat.other else []
    return [(need.of, need.value), *second]


# ---- for those who write one ----------------------------------------------------------------------------------------


def name_of(v: ir.Value | str) -> str:
    """The name of a value; raises `OnnxcompError` where it has none."""
    name = v if isinstance(v, str) else v.name
    if not name:
        raise OnnxcompError("a statistic was asked of a value without a name")
    return name


def finite(a: Any) -> None:
    """Raise `DataError` where something is NaN or infinite."""
    if not np.isfinite(a).all():
        raise DataError("NaN or infinity")


class NoRows(DataError):
    """A statistic of nothing: padding counts for none, and some experts are chosen by no token."""


def no_rows() -> NoRows:
    """The error of an accumulator that has seen nothing."""
    return NoRows("the data has no rows that count (everything is padding, or no token is sent there)")


class Stats(Mapping[Need, Array]):
    """Collected statistics; a statistic nobody asked for is a clear error.

    One that is too large to hold lies in a file and is mapped anew each time it is read, so that its memory is free
    again as soon as the reader lets go. One of a value that no sample reaches raises when it is read.
    """

    def __init__(self, values: Mapping[Need, Array | Path | NoRows] | None = None) -> None:
        self._values: dict[Need, Array | Path | NoRows] = dict(values or {})

    def __getitem__(self, need: Need) -> Array:
        try:
            held = self._values[need]
        except KeyError:
            raise OnnxcompError(f"statistic {need} was not collected; yield it from needs()") from None
        if isinstance(held, NoRows):
            raise held
        return np.load(held, mmap_mode="r", allow_pickle=False) if isinstance(held, Path) else held

    def reached(self, need: Need) -> bool:
        """Whether any sample has rows of the value."""
        return not isinstance(self._values.get(need), NoRows)

    def __iter__(self) -> Iterator[Need]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
