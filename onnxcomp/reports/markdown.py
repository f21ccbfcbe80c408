"""Text in Markdown that shows strings of models, files and users as they are, whatever is in them."""

from __future__ import annotations

import re

__all__ = ["code", "fenced", "text"]

# Marks anywhere; an underscore where it is at an end of a word; at the start what begins a heading, a quote or a list.
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#>+-]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")
_TICKS = re.compile("`+")


def text(said: str) -> str:
    """One line of plain text: nothing in it is markup, nor HTML."""
    return _MARKS.sub(r"\\\g<0>", _line(said)).replace("&", "&amp;").replace("<", "&lt;")


def code(said: str) -> str:
    """Code in a line; its fence is longer than any run of backticks inside.

    With a bar it is HTML: no code span shows one alike inside and outside of a table.
    """
    line = _line(said)
    if "|" in line:
        return f"<code>{re.sub('[^a-zA-Z0-9 ]', lambda mark: f'&#{ord(mark[0])};', line)}</code>"
    fence = "`" * (1 + max(map(len, _TICKS.findall(line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _line(said: str) -> str:
    """One line, without the control characters that neither Markdown nor HTML has."""
    return re.sub("[\x00-\x1f\x7f]", "?", " ".join(said.split()))


def fenced(language: str, lines: str) -> str:
    """A block of code; its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, _TICKS.findall(lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"
