"""What the command line shares: where output goes, progress, and how its values are read. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from onnxcomp.errors import RecipeError

__all__ = ["Output", "parse_memory", "parse_seconds", "parse_shape", "show"]

Watch = Callable[[str, int, int], None]
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}b": n for u, n in list(_UNITS.items()) if u not in ("", "b")}
_UNITS |= {f"{u}ib": 2 ** (10 * (i + 1)) for i, u in enumerate("kmgt")}
WIDE = 140  # columns where output is no terminal, so that nothing is cut off
# Seconds before the first line of progress and between two, where output is no terminal: short commands print none.
SILENT, EVERY = 3.0, 5.0


@dataclass(frozen=True)
class Output:
    """Where a command's results go: tables, or one JSON object, on stdout; everything else on stderr."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    lines: str = "auto"  # how progress is told: `json` is one object a line

    def __post_init__(self) -> None:
        if self.lines not in ("auto", "json"):
            raise RecipeError(f"--progress is auto or json, not '{self.lines[:80]}'")

    def show(self, data: Any, headline: str, *tables: Any) -> None:
        """The result: `data` with `--json`, else the headline and, unless quiet, the tables."""
        if self.json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
            return
        console = _console(sys.stdout)
        if headline:
            console.print(headline, markup=False, highlight=False, soft_wrap=True)
        for table in () if self.quiet else tables:
            show(console, table)

    def note(self, text: str) -> None:
        """A remark on stderr, unless quiet."""
        if not self.quiet:
            sys.stderr.write(f"{text}\n")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Watch | None]:
        """Progress on stderr: a bar on a terminal, else now and then a line; yields what takes (label, done, total)."""
        if self.lines == "json":
            yield _objects()
            return
        if self.quiet:
            yield None
            return
        if not sys.stderr.isatty():
            yield _lines()
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=None)

            def watch(label: str, done: int, total: int) -> None:
                if not total:
                    bar.console.print(f"note: {label}", markup=False, soft_wrap=True)
                    return
                bar.update(task, description=label, completed=done, total=total)

            yield watch


def _objects() -> Watch:
    """Progress as JSON objects, one a line: every change, with the seconds since the beginning."""
    began = time.monotonic()

    def watch(label: str, done: int, total: int) -> None:
        event: dict[str, Any] = {"event": "note" if not total else "progress", "text": label}
        event |= {"done": done, "total": total} if total else {}
        sys.stderr.write(json.dumps({**event, "seconds": round(time.monotonic() - began, 3)}) + "\n")
        sys.stderr.flush()

    return watch


def _lines() -> Watch:
    """Progress as plain lines, few enough for a log."""
    began, last = time.monotonic(), -math.inf

    def watch(label: str, done: int, total: int) -> None:
        nonlocal last
        if not total:
            sys.stderr.write(f"note: {label}\n")
            return
        now = time.monotonic()
        if now - began >= SILENT and now - last >= EVERY:
            sys.stderr.write(f"[{now - began:.0f} s] {label}: {done} of {total}\n")
            sys.stderr.flush()
            last = now

    return watch


def show(console: Any, item: Any) -> None:
    """Print a table with an empty line before it, or a line of text."""
    if not isinstance(item, str):
        console.print()
    console.print(item, soft_wrap=isinstance(item, str), markup=False)


def _console(stream: Any) -> Any:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def parse_shape(text: str) -> dict[str, int]:
    """Axes and sizes from `batch=1,sequence=128`; raises `RecipeError`."""
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (x.strip() for x in part.partition("="))
        if not (name and equals and number.isdecimal()) or name in shape:
            raise RecipeError(f"shape '{text}' is not AXIS=SIZE,..., such as batch=1,sequence=128")
        shape[name] = int(number)
    return shape


def parse_memory(text: str) -> int:
    """Bytes from `4GB`, `500MiB` or a plain number; raises `RecipeError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).lower() if match else "?"
    if match is None or unit not in _UNITS or (size := int(float(match.group(1)) * _UNITS[unit])) <= 0:
        raise RecipeError(f"memory '{text}' is not a size such as 4GB or 500MB")
    return size


def parse_seconds(text: str) -> float:
    """Seconds from `60s`, `1.5m` or a plain number; raises `RecipeError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h)?\s*", text)
    seconds = float(match.group(1)) * {"s": 1, "m": 60, "h": 3600}[match.group(2) or "s"] if match else 0.0
    if seconds <= 0:
        raise RecipeError(f"time '{text}' is not a duration such as 60s or 2m")
    return seconds
