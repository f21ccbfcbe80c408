"""Text in Markdown that shows strings of models, files and users as they are, whatever is in them."""

from __future__ import annotations

import re

__all__ = ["code", "fenced", "text"]

_MARKS = re.compile(r"([\\`*\[\]|])")
_TICKS = re.compile("`+")


def text(said: str) -> str:
    """One line of plain text: nothing in it is markup, nor HTML."""
    return _MARKS.sub(r"\\\1", " ".join(said.split())).replace("&", "&amp;").replace("<", "&lt;")


def code(said: str) -> str:
    """A code span; its fence is longer than any run of backticks inside. Table cells end at no bar of it."""
    line = " ".join(said.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, _TICKS.findall(line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def fenced(language: str, lines: str) -> str:
    """A block of code; its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, _TICKS.findall(lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"
