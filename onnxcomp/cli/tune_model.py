"""`onnxcomp tune`: the measured choices of a model's sites as a file, for machines that only build."""

from __future__ import annotations

from pathlib import Path

from onnxcomp.cli.console import Watch
from onnxcomp.data.datasets import Dataset, load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.engine.settings import Settings
from onnxcomp.engine.smoke import prove
from onnxcomp.errors import RecipeError
from onnxcomp.files import storage
from onnxcomp.files.storage import chosen_graphs
from onnxcomp.lowering.choices import Choice, Choices
from onnxcomp.reports.outcome import Report

__all__ = ["tune"]

SAMPLES = 4


def tune(
    model: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    preset: str | None = "optimize",
    recipe: Path | None = None,
    graph: str | None = None,
    watch: Watch | None = None,
) -> tuple[Choices, list[Choice]]:
    """Measure the forms of every site that a recipe leaves, and write the choices; nothing else is kept.

    Data that the recipe's passes need is made up: a time depends on sizes and types alone. Raises `RecipeError` where
    the target does not run here.
    """
    chosen = Recipe.from_yaml(recipe) if recipe is not None else Recipe.preset(preset or "optimize")
    chosen = chosen.steps[0]
    choices, found, target = None, [], settings.target
    for path in chosen_graphs(Path(model), graph).values():
        source = storage.read(path)
        g = source.graph
        manager = PassManager(
            chosen.passes, settings, allow_unchanged=True, any_order=chosen.any_order, watch=watch,
        )  # fmt: skip
        if manager.host_note or not target.here:
            raise RecipeError(f"'{target.name}' cannot be measured here: run tune on the machine it stands for")
        prove(source, target)
        if choices is not None:
            manager.choices = choices
        data: Dataset | tuple[()] = ()
        if any(p.wants_data for p in chosen.passes):
            data = load_data("random", g, path.parent, batch=2, samples=SAMPLES, sequence=32)
        report: Report = manager.run(g, data).report
        choices = manager.choices
        found += [c for s in report.steps for c in s.choices]
    assert choices is not None
    choices.save(Path(out))
    return choices, found
