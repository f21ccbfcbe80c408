"""The two calls of the library: compress a model by a recipe, and make it faster without changing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.engine.job import Job, Watch
from onnxcomp.engine.publish import publish
from onnxcomp.engine.recipe import Recipe, with_exact_rows
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.storage import chosen_graphs
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Result
from onnxcomp.target import Target, find

__all__ = ["compress", "compress_each", "optimize"]


def compress(model: str | Path, out: str | Path, **options: Any) -> Result:
    """Compress one model and publish it in the folder (or `.onnx` file) `out`; see `compress_each` for the options.

    Raises `GateFailed` when a gate refuses the result; nothing is written then.
    """
    held = storage.graphs_of(model)
    if len(held) > 1 and not options.get("graph"):
        raise ModelError(f"{model}: holds the graphs {', '.join(held)}; name one with graph=, or call compress_each")
    return next(iter(compress_each(model, out, **options).values()))


def compress_each(
    model: str | Path,
    out: str | Path | None,
    *,
    preset: str | None = None,
    recipe: Recipe | str | Path | None = None,
    passes: Iterable[Pass | str] | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    samples: int | None = None,
    gates: Iterable[str] = (),
    on_fail: str | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    opset: int | None = None,
    memory: int | None = None,
    plan: bool = False,
    measure: bool = True,
    cache: str | Path | None = None,
    report: str | Path | None = None,
    choices: str | Path | None = None,
    allow_code: bool = False,
    graph: str | None = None,
    seed: int = 0,
    batch: int | None = None,
    sequence: int | None = None,
    exact_rows: bool = False,
    watch: Watch | None = None,
) -> dict[str, Result]:
    """Compress every graph of a model and publish all of them or none; returns results by graph name.

    One of `preset`, `recipe` and `passes` says what to do; `gates` add to the recipe's; `plan` writes nothing;
    `measure=False` runs no benchmark and takes the target's tables; `choices` is a file that `tune` wrote;
    `exact_rows` sets that option of the passes that have it.
    """
    chosen = _recipe(preset, recipe, passes)
    chosen = with_exact_rows(chosen) if exact_rows else chosen
    asked: dict[str, Any] = {} if on_fail is None else {"on_fail": on_fail}
    chosen = dataclasses.replace(chosen, gates=(*chosen.gates, *gates), **asked)
    aim = _aim(target or chosen.target, opset)
    data = chosen.data
    calibration = data.calibration if calibration is None else calibration
    evaluation = data.evaluation if evaluation is None else evaluation
    _needs_data(chosen, calibration, plan)
    jobs = {
        name: Job(
            path, chosen, aim, calibration, evaluation, samples or data.samples, batch or data.batch or 8,
            sequence or data.sequence, seed, tuple(shapes), memory,
            Path(cache) if cache else None, measure and not plan, allow_code, Path(choices) if choices else None,
        )
        for name, path in chosen_graphs(Path(model), graph).items()
    }  # fmt: skip
    if plan or out is None:
        return {name: job.plan(watch) if plan else job.run(watch) for name, job in jobs.items()}
    return publish(jobs, Path(out), Path(report) if report else None, watch)


def optimize(model: str | Path, out: str | Path, **options: Any) -> Result:
    """Make a model faster without changing its outputs (recipe `optimize`, no data); options as for `compress`."""
    return compress(model, out, **({"preset": "optimize"} | options))


def _aim(target: str | Target, opset: int | None) -> Target:
    """The target by name or as given, with an older operator set where one is asked for."""
    aim = target if isinstance(target, Target) else find(target)
    return aim if opset is None else dataclasses.replace(aim, max_opset=opset)


def _recipe(preset: str | None, recipe: Recipe | str | Path | None, passes: Iterable[Pass | str] | None) -> Recipe:
    from onnxcomp.engine.recipe import parse_pass

    given = [name for name, x in (("preset", preset), ("recipe", recipe), ("passes", passes)) if x]
    if len(given) != 1:
        raise RecipeError(
            f"say what to do with exactly one of preset, recipe and pass; got {', '.join(given) or 'none'}"
        )
    if preset:
        return Recipe.preset(preset)
    if recipe is not None:
        return recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe))
    return Recipe(name="custom", passes=tuple(p if isinstance(p, Pass) else parse_pass(p) for p in passes or ()))


def _needs_data(recipe: Recipe, calibration: Any, plan: bool) -> None:
    needing = [p.name for p in recipe.passes if p.wants_data]
    if needing and calibration is None and not plan:
        raise RecipeError(
            f"pass '{needing[0]}' needs calibration data; give it with --calibration, for example a calib.jsonl with "
            'one {"text": "..."} a line, an .npz of arrays by input name, a folder of images, or the word random'
        )
