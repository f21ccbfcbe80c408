"""Which passes may run, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from onnxcomp.errors import RecipeError
from onnxcomp.pipeline import Pass

__all__ = ["allowed", "check_order"]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise `RecipeError` where a pass comes after one of a later stage."""
    for a, b in itertools.pairwise(p for p in passes if not p.any_place):
        if a.stage > b.stage:
            raise RecipeError(
                f"'{b.name}' ({b.stage.name.lower()}) must come before '{a.name}' ({a.stage.name.lower()}); "
                "reorder them, or say any_order: true in the recipe"
            )


def allowed(passes: Iterable[Pass], allow_code: bool) -> None:
    """Raise `RecipeError` where a pass runs code that is not allowed, or that is not there."""
    for p in passes:
        if p.runs_code and not allow_code:
            raise RecipeError(f"pass '{p}' runs code of yours; allow it with --allow-code")
        _ = p.content
