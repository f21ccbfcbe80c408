"""Symbolic sizes of axes: integers and products of named unknowns, with enough algebra to prove layouts equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Dim",
    "Equalities",
    "Shape",
    "Size",
    "add",
    "difference_of",
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
    """`factor` times the product of named unknowns (sorted); a sum is a single unknown, named by its text."""

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


class Difference(str):
    """The name of an unknown that is `parts[0] - parts[1]`."""

    parts: tuple[Size, Size]

    def __new__(cls, a: Size, b: Size) -> Difference:
        name = super().__new__(cls, f"({a}-{b})")
        name.parts = (a, b)
        return name


def difference_of(a: Size) -> tuple[Size, Size] | None:
    """The minuend and the subtrahend where `a` is a difference, else None."""
    name = a.names[0] if isinstance(a, Dim) and a.factor == 1 and len(a.names) == 1 else None
    return name.parts if isinstance(name, Difference) else None


def parts_of(a: Size) -> tuple[Size, Size] | None:
    """The two summands where `a` is a sum, else None."""
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
    """The quotient where it is exact for all values of the unknowns, else None."""
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
    """Integer division towards minus infinity; a new unknown where it is not exact.

    Multiples of `b` are taken out of the division, `(x - 4) // 4 = x // 4 - 1`, so that equal sizes get equal names.
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
    """The sum; of different unknowns a new unknown."""
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
    """A sum as its unknown part and its integer part."""
    parts = parts_of(a)
    if parts is not None:
        for rest, number in (parts, parts[::-1]):
            if isinstance(number, int):
                return rest, number
    return a, 0


def subtract(a: Size, b: Size) -> Size:
    """The difference; `(x + y) - y` is `x` and `x - (x - y)` is `y`, of different unknowns it is a new unknown."""
    (f, x), (g, y) = _parts(a), _parts(b)
    summed = parts_of(a)
    if summed is not None and b in summed:
        return summed[1] if summed[0] == b else summed[0]
    if x == y:
        return _simplified(f - g, x)
    if isinstance(b, int):
        return add(a, -b)
    subtracted = difference_of(b)
    if subtracted is not None and subtracted[0] == a:
        return subtracted[1]
    return named(Difference(a, b))


class Equalities:
    """Unknowns that must be equal at run time because they were broadcast together (a union-find)."""

    def __init__(self, preferred: Iterable[str] = ()) -> None:
        self._parent: dict[str, str] = {}
        self._preferred = set(preferred)

    def find(self, name: str) -> str:
        """The representative of all equal names."""
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
        """Whether two sizes are equal, by proof or by assumption."""
        return self.plain(a) == self.plain(b)

    def match(self, a: Sequence[Size], b: Sequence[Size]) -> bool:
        """Whether two shapes are equal axis by axis."""
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))


def is_static(sizes: Iterable[Size]) -> bool:
    """Whether every size is an integer."""
    return all(isinstance(s, int) for s in sizes)
