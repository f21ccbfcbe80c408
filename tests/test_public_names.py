"""The public names with their signatures, as text; `UPDATE_GOLDEN=1 pytest tests/test_public_names.py` writes it."""

import inspect
import os
from enum import EnumType
from pathlib import Path
from types import ModuleType

import onnxcomp
from onnxcomp.stats.statistic import kinds

GOLDEN = Path(__file__).parent / "golden" / "public-names.txt"
# Classes whose public methods and fields are part of the surface as well: what passes implement and call.
WITH_MEMBERS = ("Env", "Graph", "Linear", "Pass", "SequentialPass", "Statistic", "Stats")


PLAIN = (bool, int, float, str, tuple, type(None))


def signature(x: object) -> str:
    """Parameters with types and defaults, as far as those are plain values; an enum's members."""
    if isinstance(x, EnumType):
        return f"({', '.join(x.__members__)})"
    if isinstance(x, type) and issubclass(x, Exception) and "__init__" not in vars(x):
        return ""
    try:
        found = inspect.signature(x).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    parts, kinds = [], [p.kind for p in found]
    for i, p in enumerate(found):
        if p.kind is p.KEYWORD_ONLY and p.KEYWORD_ONLY not in kinds[:i]:
            parts.append("*")
        default = repr(p.default) if isinstance(p.default, PLAIN) else "..."
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = "" if p.annotation is p.empty else f": {p.annotation if isinstance(p.annotation, str) else '...'}"
        parts.append(f"{stars}{p.name}{kind}" + ("" if p.default is p.empty else f" = {default}"))
    return f"({', '.join(parts)})"


def members(cls: type) -> list[str]:
    """Public methods, properties and class variables of a class and of its bases of ours."""
    lines = []
    for name in sorted({n for c in cls.__mro__ if c.__module__.startswith("onnxcomp") for n in vars(c)}):
        if not name.startswith("_"):
            x = inspect.getattr_static(cls, name)
            x = x.__func__ if isinstance(x, (classmethod, staticmethod)) else x
            lines.append(f"    .{name}{signature(x) if callable(x) else ''}")
    return lines


def lines() -> list[str]:
    """One line a name, members indented below it."""
    found = []
    for name in sorted(onnxcomp.__all__):
        x = getattr(onnxcomp, name)
        if isinstance(x, ModuleType):
            found += [f"{name}.{n}{signature(getattr(x, n))}" for n in sorted(x.__all__) if n[0].islower()]
        else:
            found.append(name + signature(x) if callable(x) else name)
            found += members(x) if name in WITH_MEMBERS else []
    return found


def test_public_names_and_signatures_are_those_agreed_on() -> None:
    text = "\n".join(lines()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_pass_authors_have_all_they_need() -> None:
    needed = {"Pass", "SequentialPass", "Stage", "Fidelity", "Env", "Site", "Need", "Group", "Linear"}
    assert needed | {"Stats", "Statistic"} <= set(onnxcomp.__all__)
    ours = [kind for kind, x in kinds().items() if x.__module__.startswith("onnxcomp.stats.")]
    assert len(ours) == 13
    for kind in ours:
        assert callable(getattr(onnxcomp.stats, kind)), f"no function asks for '{kind}'"
