"""Skip patterns, an option of most passes."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["skipped"]


def skipped(patterns: Iterable[str], *names: str) -> str | None:
    """The first pattern (`*`, `?`, `[...]`, case counts) that matches one of the names, None where none does."""
    return next((p for p in patterns if any(fnmatchcase(n, p) for n in names)), None)
