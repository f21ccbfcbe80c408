"""`onnxcomp presets`: what each preset is for, from its file."""

from __future__ import annotations

from typing import Any

from onnxcomp.engine import recipe

__all__ = ["presets"]

DATA = {
    "calibration": "calibration data; a fifth of it judges unless --eval is given",
    "evaluation": "none to make it; --eval to judge it, which its gates need",
    "none": "none",
}


def presets() -> list[dict[str, Any]]:
    """Every preset as plain values."""
    found = []
    for name in recipe.presets():
        r = recipe.Recipe.preset(name)
        facts = {"name": name, "about": r.about, "data": DATA[r.data_needed], "target": r.target}
        found.append(
            facts
            | {"passes": r.plain()["passes"], "rungs": r.plain()["rungs"], "gates": list(r.gates), "advice": r.advice}
        )
    return found
