"""The calls of the library: compress a model by a recipe, and make it faster without changing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from onnxcomp.data.arguments import path_of, shapes_of, texts_of, whole
from onnxcomp.engine.asked import check_bisected, check_generated, check_timed
from onnxcomp.engine.job import Job, Watch
from onnxcomp.engine.publish import publish
from onnxcomp.engine.recipe import Recipe, parse_pass, with_option
from onnxcomp.engine.settings import Settings
from onnxcomp.engine.whole import jobs_of
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.storage import chosen_graphs
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Result
from onnxcomp.runtime.encoder_source import pair_of
from onnxcomp.target import Target, find
from onnxcomp.validation.gates import Gate

__all__ = ["compress", "compress_each", "optimize"]

LOWEST = 7  # operator set: the oldest that ONNX Runtime still promises to run
Passes = Iterable[Pass | str | Mapping[str, Any]]
# Options are called as on the command line, in the plural where they can be given several times there (`--gate`,
# `--shape`, `--pass`); `--eval` is short for `--evaluation`, and `--no-measure` is `measure=False`.


def compress(
    model: str | Path,
    out: str | Path | None,
    *,
    preset: str | None = None,
    recipe: Recipe | str | Path | None = None,
    passes: Passes | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    samples: int | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    gates: Iterable[str] = (),
    on_fail: Literal["raise", "rollback"] | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    opset: int | None = None,
    memory: int | None = None,
    plan: bool = False,
    measure: bool = True,
    budget: float | None = None,
    threads: int = 0,
    exact_rows: bool = False,
    standard: bool = False,
    choices: str | Path | None = None,
    cache: str | Path | None = None,
    report: str | Path | None = None,
    html: bool = True,
    graph: str | None = None,
    seed: int = 0,
    allow_code: bool = False,
    bisect: bool = False,
    watch: Watch | None = None,
) -> Result:
    """Compress one model and publish it in the folder (or `.onnx` file) `out`; `compress_each` explains the options.

    Of an encoder-decoder the result is the decoder's, with the report on both graphs. Raises `GateFailed` when a gate
    refuses the result, and `ModelError` for another folder of several graphs of which none is named; nothing is written
    then.
    """
    _one_of(path_of("model", model) or Path(), graph)
    *_, result = compress_each(
        model, out, preset=preset, recipe=recipe, passes=passes, target=target, calibration=calibration,
        evaluation=evaluation, samples=samples, batch=batch, sequence=sequence, text_column=text_column,
        label_column=label_column, gates=gates, on_fail=on_fail,
        shapes=shapes, opset=opset, memory=memory, plan=plan, measure=measure, budget=budget, threads=threads,
        exact_rows=exact_rows, standard=standard, choices=choices, cache=cache, report=report, html=html, graph=graph,
        seed=seed, allow_code=allow_code, bisect=bisect, watch=watch,
    ).values()  # fmt: skip
    return result if result.whole is None else dataclasses.replace(result, report=result.whole)


def compress_each(
    model: str | Path,
    out: str | Path | None,
    *,
    preset: str | None = None,
    recipe: Recipe | str | Path | None = None,
    passes: Passes | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    samples: int | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    gates: Iterable[str] = (),
    on_fail: Literal["raise", "rollback"] | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    opset: int | None = None,
    memory: int | None = None,
    plan: bool = False,
    measure: bool = True,
    budget: float | None = None,
    threads: int = 0,
    exact_rows: bool = False,
    standard: bool = False,
    choices: str | Path | None = None,
    cache: str | Path | None = None,
    report: str | Path | None = None,
    html: bool = True,
    graph: str | None = None,
    seed: int = 0,
    allow_code: bool = False,
    bisect: bool = False,
    watch: Watch | None = None,
) -> dict[str, Result]:
    """Compress every graph of a model and publish all of them or none; returns results by graph name.

    A folder of an encoder and a decoder is one model: the decoder is fitted to, and judged on, what the compressed
    encoder makes of pairs of sources and targets; gates and `report` are on both, as `whole` of its result.

    One of `preset`, `recipe` and `passes` says what to do; `gates` add to the recipe's, other options take the place of
    the recipe's. `out` None and `plan` write nothing; `measure=False` runs no benchmark and takes the target's tables;
    `budget` is the time for measuring in seconds (by default as long as the passes take), `threads` how many what is
    timed uses (0: the runtime's choice); `choices` is a file that `tune` wrote; `exact_rows` and `standard` set these
    options of the passes that have them; `memory` is in bytes; `html` writes report.html beside report.json; `bisect`
    names, where gates refuse, the pass and its sites to blame.
    """
    path, place = path_of("model", model), path_of("out", out)
    chosen_graphs(path or Path(), graph)  # refuses a wrong name before all else
    chosen = _recipe(preset, recipe, passes)
    chosen = with_option(chosen, "exact_rows") if exact_rows else chosen
    chosen = with_option(chosen, "standard") if standard else chosen
    chosen = dataclasses.replace(
        chosen, gates=(*chosen.gates, *texts_of("gates", gates, "sqnr>=20")), on_fail=on_fail or chosen.on_fail
    )
    data = chosen.data
    settings = Settings(
        target=_aim(target or chosen.target, opset),
        calibration=data.calibration if calibration is None else calibration,
        evaluation=data.evaluation if evaluation is None else evaluation,
        samples=data.samples if samples is None else samples,
        batch=next(n for n in (batch, data.batch, 8) if n is not None),
        sequence=data.sequence if sequence is None else sequence,
        text_column=data.text_column if text_column is None else text_column,
        label_column=data.label_column if label_column is None else label_column,
        shapes=shapes_of(shapes),
        memory=memory,
        measure=measure and not plan,
        budget=budget,
        threads=threads,
        cache=path_of("cache", cache),
        choices=path_of("choices", choices),
        allow_code=allow_code,
        seed=seed,
        html=html,
        bisect=bisect,
    )
    _needs_data(chosen, settings.calibration, plan)
    check_generated(Gate(chosen.gates))
    if bisect and not plan:
        check_bisected(Gate(chosen.gates))
    jobs, whole = _jobs(path, graph, chosen, settings)
    if plan or place is None:
        return {name: job.plan(watch) if plan else job.run(watch) for name, job in jobs.items()}
    check_timed(Gate(chosen.gates), settings)
    return publish(jobs, place, path_of("report", report), watch, whole)


def optimize(
    model: str | Path,
    out: str | Path | None,
    *,
    target: str | Target = "cpu",
    shapes: Sequence[Mapping[str, int]] = (),
    opset: int | None = None,
    measure: bool = True,
    budget: float | None = None,
    threads: int = 0,
    exact_rows: bool = False,
    standard: bool = False,
    choices: str | Path | None = None,
    cache: str | Path | None = None,
    report: str | Path | None = None,
    html: bool = True,
    graph: str | None = None,
    watch: Watch | None = None,
) -> Result:
    """Make a model faster without changing its outputs (recipe `optimize`, no data); options as for `compress`."""
    return compress(
        model, out, preset="optimize", target=target, shapes=shapes, opset=opset, measure=measure, budget=budget,
        threads=threads, exact_rows=exact_rows, standard=standard, choices=choices, cache=cache, report=report,
        html=html, graph=graph, watch=watch,
    )  # fmt: skip


def _jobs(
    path: Path | None, graph: str | None, recipe: Recipe, settings: Settings
) -> tuple[dict[str, Job], Job | None]:
    """A job for each graph, and that of the model where two of them, an encoder and a decoder, are one."""
    source = path or Path()
    pair = pair_of(source) if graph is None else None
    if pair is not None and pair.fits():
        whole = Job(source, recipe, settings)
        return jobs_of(pair, whole), whole
    return {name: Job(file, recipe, settings) for name, file in chosen_graphs(source, graph).items()}, None


def _one_of(model: str | Path, graph: str | None) -> None:
    held = storage.graphs_of(model)
    if len(held) > 1 and not graph and not ((pair := pair_of(Path(model))) and pair.fits()):
        raise ModelError(f"{model}: holds the graphs {', '.join(held)}; name one with graph=, or call compress_each")


def _aim(target: str | Target, opset: int | None) -> Target:
    """The target by name or as given, with an older operator set where one is asked for."""
    aim = find(target)
    return aim if opset is None else dataclasses.replace(aim, max_opset=whole("opset", opset, LOWEST, 1000))


def _recipe(preset: str | None, recipe: Recipe | str | Path | None, passes: Passes | None) -> Recipe:
    given = [name for name, x in (("preset", preset), ("recipe", recipe), ("passes", passes)) if x is not None]
    if len(given) != 1:
        raise RecipeError(
            f"say what to do with exactly one of preset, recipe and pass; got {', '.join(given) or 'none'}"
        )
    if preset is not None:
        return Recipe.preset(preset)
    if recipe is not None:
        return recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(path_of("recipe", recipe) or "")
    if isinstance(passes, (str, bytes)) or not isinstance(passes, Iterable):
        raise RecipeError(f"passes is a list of names or of entries of a recipe, not {passes!r:.80}")
    return Recipe(name="custom", passes=tuple(map(parse_pass, passes)))


def _needs_data(recipe: Recipe, calibration: Any, plan: bool) -> None:
    needing = [p.name for p in recipe.every_pass if p.wants_data]
    if needing and calibration is None and not plan:
        raise RecipeError(
            f"pass '{needing[0]}' needs calibration data; give it with --calibration, for example a calib.jsonl with "
            'one {"text": "..."} a line, an .npz of arrays by input name, a folder of images, or the word random'
        )
