"""Sizes of axes: integers, or products of named unknowns; enough algebra to prove two layouts equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Dim",
    "Equalities",
    "Shape",
    "Size",
    "add",
    "divide",
    "floor",
    "is_static",
    "multiply",
    "named",
    "parts_of",
    "product",
    "subtract",
]


@dataclass(frozen=True)
class Dim:
    """`factor` times the product of named unknowns (sorted); a sum is one unknown named by its text."""

    factor: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        parts = ([str(self.factor)] if self.factor != 1 else []) + list(self.names)
        return "*".join(parts)


Size = int | Dim
Shape = tuple[Size, ...]


class Sum(str):
    """The name of an unknown that is the sum of two sizes, `parts`."""

    parts: tuple[Size, Size]

    def __new__(cls, a: Size, b: Size) -> Sum:
        first, second = sorted((a, b), key=str)
        name = super().__new__(cls, f"({first}+{second})")
        name.parts = (first, second)
        return name


def parts_of(a: Size) -> tuple[Size, Size] | None:
    """The two sizes that `a` is the sum of, if it is one unknown made so."""
    name = a.names[0] if isinstance(a, Dim) and a.factor == 1 and len(a.names) == 1 else None
    return name.parts if isinstance(name, Sum) else None


def named(name: str) -> Dim:
    """The unknown of that name."""
    return Dim(1, (name,))


def _simplified(factor: int, names: Iterable[str]) -> Size:
    sorted_names = tuple(sorted(names))
    return Dim(factor, sorted_names) if sorted_names and factor else factor


def _parts(a: Size) -> tuple[int, tuple[str, ...]]:
    return (a, ()) if isinstance(a, int) else (a.factor, a.names)


def multiply(a: Size, b: Size) -> Size:
    """The product."""
    (f, x), (g, y) = _parts(a), _parts(b)
    return _simplified(f * g, x + y)


def product(sizes: Iterable[Size]) -> Size:
    """The product of all; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def divide(a: Size, b: Size) -> Size | None:
    """The quotient where it is exact whatever the unknowns are, else None."""
    (f, x), (g, y) = _parts(a), _parts(b)
    if g == 0 or f % g:
        return None
    remaining = list(x)
    for name in y:
        if name not in remaining:
            return None
        remaining.remove(name)
    return _simplified(f // g, remaining)


def floor(a: Size, b: Size) -> Size:
    """Integer division towards minus infinity; an unknown of its own where it is not exact.

    Multiples of `b` leave the division, `(x - 4) // 4 = x // 4 - 1`, so that equal sizes get one name.
    """
    if isinstance(a, int) and isinstance(b, int) and b:
        return a // b
    exact = divide(a, b)
    if exact is not None:
        return exact
    rest, offset = _offset(a)
    if offset and isinstance(b, int) and b > 0:
        multiple = offset // b
        if multiple:
            return add(floor(add(rest, offset - multiple * b), b), multiple)
    return named(f"({a}//{b})")


def add(a: Size, b: Size) -> Size:
    """The sum; of unlike unknowns an unknown of its own."""
    (f, x), (g, y) = _parts(a), _parts(b)
    if x == y:
        return _simplified(f + g, x)
    if a == 0 or b == 0:
        return b if a == 0 else a
    for size, number in ((a, b), (b, a)):
        rest, offset = _offset(size)
        if offset and isinstance(number, int):
            return add(rest, offset + number)
    return named(Sum(a, b))


def _offset(a: Size) -> tuple[Size, int]:
    """An unknown without the number added to it, and the number."""
    parts = parts_of(a)
    if parts is not None:
        for rest, number in (parts, parts[::-1]):
            if isinstance(number, int):
                return rest, number
    return a, 0


def subtract(a: Size, b: Size) -> Size:
    """The difference; of `(x + y)` and `y` it is `x`, of unlike unknowns an unknown of its own."""
    (f, x), (g, y) = _parts(a), _parts(b)
    summed = parts_of(a)
    if summed is not None and b in summed:
        return summed[1] if summed[0] == b else summed[0]
    if x == y:
        return _simplified(f - g, x)
    if isinstance(b, int):
        return add(a, -b)
    return named(f"({a}-{b})")


class Equalities:
    """Unknowns that must be equal wherever the model runs, because they were broadcast together."""

    def __init__(self, preferred: Iterable[str] = ()) -> None:
        self._parent: dict[str, str] = {}
        self._preferred = set(preferred)

    def find(self, name: str) -> str:
        """The name that stands for all equal ones."""
        while name in self._parent:
            name = self._parent[name]
        return name

    def assume(self, a: Size, b: Size) -> None:
        """Record that two single unknowns are equal; anything else is ignored."""
        if isinstance(a, int) or isinstance(b, int) or len(a.names) != 1 or len(b.names) != 1 or a.factor != b.factor:
            return
        x, y = self.find(a.names[0]), self.find(b.names[0])
        if x != y:
            representative, merged = (y, x) if y in self._preferred and x not in self._preferred else (x, y)
            self._parent[merged] = representative

    def plain(self, a: Size) -> Size:
        """The size in terms of the representatives."""
        return a if isinstance(a, int) else _simplified(a.factor, (self.find(n) for n in a.names))

    def same(self, a: Size, b: Size) -> bool:
        """Whether two sizes are proved, or assumed, equal."""
        return self.plain(a) == self.plain(b)

    def match(self, a: Sequence[Size], b: Sequence[Size]) -> bool:
        """Whether two shapes are equal axis by axis."""
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))


def is_static(sizes: Iterable[Size]) -> bool:
    """Whether every size is an integer."""
    return all(isinstance(s, int) for s in sizes)
