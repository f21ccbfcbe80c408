"""Numbers of a report as the page shows them, and as JSON pointers find them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcomp.machine import size_text

__all__ = ["KINDS", "Figure", "at", "clean", "exact", "pointer", "shown"]

NOTHING = "-"  # what stands for null


# The characters that neither XML nor HTML can hold, written or escaped, and lone surrogates, which no file can.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """A text without characters that no page can hold."""
    return _FORBIDDEN.sub("\ufffd", text)


@dataclass(frozen=True)
class Figure:
    """A figure of the report: where in report.json it is, and the kind of quantity, one of `KINDS`."""

    where: str
    kind: str


def pointer(*keys: str | int) -> str:
    """A JSON pointer (RFC 6901) from keys and indices."""
    return "".join("/" + str(k).replace("~", "~0").replace("/", "~1") for k in keys)


def at(report: Mapping[str, Any], where: str) -> Any:
    """What a JSON pointer finds; raises `KeyError`, `IndexError` or `ValueError` where that is nothing."""
    found: Any = report
    for key in where.split("/")[1:]:
        name = key.replace("~1", "/").replace("~0", "~")
        found = found[int(name)] if isinstance(found, Sequence) else found[name]
    return found


def exact(value: object) -> str:
    """A number as JSON writes it."""
    return "null" if value is None else repr(value)


def _significant(x: float, digits: int = 3) -> str:
    """At least so many digits that count, whole numbers of any size in full."""
    if x == 0:
        return "0"
    if abs(x) < 1e-4:
        return f"{x:.{digits - 1}e}"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


KINDS: Mapping[str, Callable[[float], str]] = {
    "bytes": lambda x: size_text(x) if x else "0 MB",
    "ms": lambda x: f"{_significant(x)} ms",
    "s": lambda x: f"{x:.1f} s",
    "mib": lambda x: size_text(x * (1 << 20)),
    "times": lambda x: f"{x:.2f}x",
    "percent": lambda x: f"{x:.2%}" if abs(x) < 0.1 else f"{x:.1%}",
    "share": lambda x: f"{x:.2%}" if not 0 < x < 1e-4 else "< 0.01%",
    "signed": lambda x: f"{x:+.2%}",
    "dB": lambda x: f"{x:.1f} dB" if x else "0 dB",
    "nats": lambda x: f"{_significant(x)} nats",
    "count": lambda x: f"{x:,.0f}",
    "number": lambda x: _significant(x, 4),
    "per-s": lambda x: f"{_significant(x)}/s",
}


def shown(value: float | None, kind: str) -> str:
    """A value for people; `kind` is one of `KINDS`."""
    return NOTHING if value is None else KINDS[kind](value)
