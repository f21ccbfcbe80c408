"""What can be told before any work: gates that can never be judged, sizes that the model does not take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxcomp.data import open_axes
from onnxcomp.engine.host import host_of
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.validation.gates import Gate
from onnxcomp.validation.outputs import View

__all__ = ["check_asked", "check_bisected", "check_generated", "check_timed"]


def check_asked(g: Graph, gate: Gate, shapes: Sequence[Mapping[str, int]]) -> None:
    """Raise `RecipeError` for a gate on what is never measured of a model, `DataError` for a shape it does not take."""
    if gate.conditions:
        gate.check(View.of(g).measures())
    for shape in shapes:
        open_axes.shapes_of(g, shape)


def check_timed(gate: Gate, settings: Settings) -> None:
    """Raise `RecipeError` where a gate needs a speed that will not be measured."""
    if gate.wants_latency and not (settings.measure and settings.target.here and not host_of(settings.target)[1]):
        raise RecipeError("a latency gate needs measuring on this machine; drop --no-measure or the gate")


def check_generated(gate: Gate) -> None:
    """Raise `RecipeError` where a gate is on generated texts, which a job makes none of."""
    if gate.generated:
        raise RecipeError(f"gate '{gate.generated[0]}' is on generated texts: give it to onnxcomp validate --generate")


def check_bisected(gate: Gate) -> None:
    """Raise `RecipeError` where no gate is there whose pass can be named: quality is compared behind every pass."""
    if any(not c.on_files for c in gate.conditions):
        return
    texts = ", ".join(c.text for c in gate.conditions)
    why = f"{texts} can only be judged on the written file, behind all passes" if texts else "there is no gate"
    raise RecipeError(f"--bisect names the pass behind which a quality gate fails, but {why}; add one, as sqnr>=20")
