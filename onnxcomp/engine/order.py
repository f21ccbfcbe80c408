"""Which passes may run, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from onnxcomp.engine.blame import blaming
from onnxcomp.errors import RecipeError
from onnxcomp.pipeline import Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["advice", "allowed", "check_order"]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise `RecipeError` where a pass comes after one of a later stage."""
    for a, b in itertools.pairwise(p for p in passes if not p.any_place):
        if a.stage > b.stage:
            raise RecipeError(
                f"'{b.name}' ({b.stage.name.lower()}) must come before '{a.name}' ({a.stage.name.lower()}); "
                "reorder them, or say any_order: true in the recipe"
            )


def advice(passes: Sequence[Pass]) -> list[str]:
    """What a recipe lacks for its lossy passes to find and to pay for all that they could, by stages."""
    lossy = [p for p in passes if p.fidelity is Fidelity.LOSSY]
    stages, notes = {p.stage for p in passes}, []
    first, last = Stage.CANONICALIZE.name.lower(), Stage.LOWER.name.lower()
    if lossy and Stage.CANONICALIZE not in stages:
        notes.append(
            f"no pass of the stage {first} comes before '{lossy[0].name}': it finds only what is written in standard "
            f"operators already; put one first, as the presets do"
        )
    typed = [p for p in lossy if p.stage is Stage.ACTIVATIONS]
    if typed and Stage.LOWER not in stages:
        notes.append(
            f"no pass of the stage {last} comes after '{typed[0].name}': the result is not in the operators that the "
            f"target runs fastest; put one last, as the presets do"
        )
    return notes


def allowed(passes: Iterable[Pass], allow_code: bool, target: Target) -> None:
    """Raise `RecipeError` where a pass runs code that is not allowed or not there, or is not for the target."""
    for p in passes:
        with blaming(p):
            p.require(target)
        if p.runs_code and not allow_code:
            raise RecipeError(f"pass '{p}' runs code of yours; allow it with --allow-code")
        _ = p.content
