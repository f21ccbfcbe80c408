"""What callers give, from Python as from the command line: checked once, before any file is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxcomp.errors import RecipeError

__all__ = ["MOST", "MOST_THREADS", "path_of", "shapes_of", "texts_of", "whole"]

MOST_THREADS = 1 << 10  # a runtime that is asked for more than a machine gives takes its process down
MOST = 1 << 62  # of any number: larger ones do not fit the integers of ONNX


def whole(name: str, value: Any, least: int, most: int = MOST) -> Any:
    """A whole number in a range, or None; raises `RecipeError` naming the option."""
    if value is None:
        return None
    number = value if isinstance(value, int) else getattr(value, "__index__", lambda: None)()  # numpy's are welcome
    if isinstance(value, bool) or number is None or not least <= number <= most:
        span = f"of at least {least}" if most == MOST else f"from {least} to {most}"
        raise RecipeError(f"{name} is a whole number {span}, not {_shown(value)}")
    return int(number)


def texts_of(name: str, value: Any, example: str) -> tuple[str, ...]:
    """A list of texts; a single text would be taken for a list of letters."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RecipeError(f"{name} is a list of texts such as ['{example}'], not {_shown(value)}")
    given = tuple(value)
    if wrong := [x for x in given if not isinstance(x, str)]:
        raise RecipeError(f"{name} is a list of texts such as ['{example}'], and holds {_shown(wrong[0])}")
    return given


def shapes_of(value: Any) -> tuple[dict[str, int], ...]:
    """A list of axes with their sizes."""
    like = "shapes is a list such as [{'batch': 1, 'sequence': 128}]"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RecipeError(f"{like}, not {_shown(value)}")
    given = tuple(value)
    if wrong := [s for s in given if not isinstance(s, Mapping) or not all(isinstance(k, str) for k in s)]:
        raise RecipeError(f"{like}, and holds {_shown(wrong[0])}")
    return tuple({axis: whole(f"the size of axis '{axis}'", n, 0) for axis, n in s.items()} for s in given)


def path_of(name: str, value: Any) -> Path | None:
    """A path, or None."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise RecipeError(f"{name} is a path, not {_shown(value)}")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:
        raise RecipeError(f"{name}: {_shown(str(value))}: {e.strerror or e}") from e
    return Path(value)


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."
