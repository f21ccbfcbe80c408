"""The command line: thin, every command is one call into the library; heavy imports happen inside the commands."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import onnxcomp
from onnxcomp.cli import failures
from onnxcomp.cli.catalogue import doctor, passes, presets, schema, verify
from onnxcomp.cli.console import Output, parse_memory, parse_seconds, parse_shape
from onnxcomp.cli.generate_text import generate
from onnxcomp.cli.options import (
    AllowCode,
    Batch,
    Budget,
    Calibration,
    ChoicesFile,
    Evaluation,
    ExactRows,
    Gates,
    GraphName,
    Json,
    Junit,
    LabelColumn,
    Model,
    NoHtml,
    NoMeasure,
    Out,
    Preset,
    Progress,
    Quiet,
    ReportFile,
    ReportOnly,
    Samples,
    Seed,
    Sequence_,
    Shapes,
    Standard,
    Summary,
    Target,
    TargetOrRecipes,
    TextColumn,
    Threads,
    Verbose,
)
from onnxcomp.cli.package_model import package
from onnxcomp.cli.pipelines import ForPipelines
from onnxcomp.cli.rank_linears import sensitivity
from onnxcomp.cli.remake_report import report as remake
from onnxcomp.cli.two_models import diff, validate
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="onnxcomp",
    help="Make trained transformers small and fast as ONNX graphs, and prove it.",
    epilog="Exit codes: 0 done, 1 a fault of onnxcomp or a pass, 2 bad usage or input, 3 refused by a gate or check.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnxcomp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A checkpoint: a local folder or a hub id.", show_default=False)],
    out: Out,
    task: Annotated[
        str | None, typer.Option(help="Such as text-classification; by default from the checkpoint.")
    ] = None,
    no_past: Annotated[
        bool, typer.Option("--no-past", help="Models that generate text: without key-value caches.")
    ] = False,
    last_logits: Annotated[
        bool, typer.Option("--last-logits", help="Models that generate text: logits of the last token only.")
    ] = False,
    opset: Annotated[int, typer.Option(help="Operator set of the exported model.")] = 18,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    static: Annotated[str | None, typer.Option(metavar="AXES", help="Fix axes: batch=1,sequence=128.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin checkpoints, which can run code.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a checkpoint into an ONNX model, checked against PyTorch at once."""
    import json as text

    output = Output(json, quiet, verbose)
    fixed = parse_shape(static) if static else None
    with output.progress() as watch:
        folder = onnxcomp.export(
            source, out, task=task, past=not no_past, last_logits=last_logits, opset=opset, dtype=dtype, static=fixed,
            revision=revision, allow_pickle=allow_pickle,
            watch=(lambda label: watch(label, 0, 1)) if watch else None,
        )  # fmt: skip
    record = text.loads((folder / "export.json").read_text(encoding="utf-8"))
    what = record["task"] + (" with caches" if record.get("past") else "")
    output.show({"out": str(folder), **record}, f"exported to {folder}: {what}, {record['dtype']}")


@app.command()
def inspect(
    model: Model,
    graph: GraphName = None,
    exact_rows: ExactRows = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a model is: layers, heads, masks, parameters by part, and what was not recognised and why."""
    from onnxcomp.cli import inspect_model
    from onnxcomp.reports.anatomy_tables import anatomy

    output = Output(json, quiet, verbose)
    found = inspect_model.inspect(model, graph, exact_rows=exact_rows)
    shown = [t for facts in found["graphs"].values() for t in anatomy(facts, verbose=verbose)]
    output.show(found, inspect_model.headline(found), *shown)


@app.command()
def optimize(
    model: Model,
    out: Out,
    target: Target = "cpu",
    shape: Shapes = None,
    opset: Annotated[int | None, typer.Option(help="Highest operator set to write.")] = None,
    graph: GraphName = None,
    no_measure: NoMeasure = False,
    budget: Budget = None,
    threads: Threads = 0,
    exact_rows: ExactRows = False,
    standard: Standard = False,
    choices: ChoicesFile = None,
    cache: Annotated[Path | None, typer.Option(help="Remember measured forms and finished passes here.")] = None,
    report: ReportFile = None,
    no_html: NoHtml = False,
    junit: Junit = None,
    summary: Summary = None,
    progress: Progress = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a model faster without changing what it computes; needs no data."""
    from onnxcomp.cli.compress_model import show
    from onnxcomp.engine.compress import compress_each

    shapes = [parse_shape(s) for s in shape or ()]
    run = functools.partial(
        compress_each, model, out, preset="optimize", target=target, shapes=shapes, opset=opset, graph=graph,
        measure=not no_measure, budget=parse_seconds(budget) if budget else None, threads=threads, report=report,
        html=not no_html, exact_rows=exact_rows, standard=standard, choices=choices, cache=cache,
    )  # fmt: skip
    files = ForPipelines("optimize", junit, summary)
    show(Output(json, quiet, verbose, progress), out, files, lambda watch: run(watch=watch))


@app.command()
def compress(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder (or .onnx file) to write.")] = None,
    preset: Preset = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe as YAML.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="SPEC", help="qdq, or 'qdq: {clip: mse}'.")
    ] = None,
    target: TargetOrRecipes = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    samples: Samples = None,
    batch: Batch = None,
    sequence: Sequence_ = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    gate: Gates = None,
    on_fail: Annotated[str | None, typer.Option(help="raise, or rollback to undo a refused pass.")] = None,
    shape: Shapes = None,
    opset: Annotated[int | None, typer.Option(help="Highest operator set to write.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Limit for statistics, such as 4GB.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done; write nothing.")] = False,
    no_measure: NoMeasure = False,
    budget: Budget = None,
    threads: Threads = 0,
    exact_rows: ExactRows = False,
    standard: Standard = False,
    choices: ChoicesFile = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep statistics, measured forms and finished passes here.")
    ] = None,
    report: ReportFile = None,
    no_html: NoHtml = False,
    junit: Junit = None,
    summary: Summary = None,
    progress: Progress = "auto",
    graph: GraphName = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    bisect: Annotated[bool, typer.Option("--bisect", help="Where gates refuse, name the pass and the sites.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compress a model, judge it on held-out data, measure it; a result that a gate refuses is not written."""
    from onnxcomp.cli.compress_model import show
    from onnxcomp.engine.compress import compress_each

    if out is None and not plan:
        raise typer.BadParameter("say where to write the result with -o, or use --plan", param_hint="-o")
    out = None if plan else out
    rule: Any = on_fail  # typer before 0.19 knows no Literal; the recipe refuses other words
    run = functools.partial(
        compress_each, model, out,
        preset=preset, recipe=recipe, passes=passes, target=target, calibration=calibration, evaluation=evaluation,
        samples=samples, batch=batch, sequence=sequence, text_column=text_column, label_column=label_column,
        gates=gate or (), on_fail=rule,
        shapes=[parse_shape(s) for s in shape or ()], opset=opset, memory=parse_memory(memory) if memory else None,
        plan=plan, measure=not no_measure, budget=parse_seconds(budget) if budget else None, threads=threads,
        cache=cache, report=report, html=not no_html, graph=graph, seed=seed, allow_code=allow_code,
        exact_rows=exact_rows, standard=standard, choices=choices, bisect=bisect,
    )  # fmt: skip
    files = ForPipelines("compress", junit, summary)
    show(Output(json, quiet, verbose, progress), out, files, lambda watch: run(watch=watch))


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Models to time; the first is what others are compared with.")],
    target: Target = "cpu",
    shape: Shapes = None,
    generate: Annotated[
        str | None, typer.Option("--generate", metavar="prompt=128,new=64", help="Time decoders token by token.")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Undisturbed runs of each, at least; by default until ratios are sure.")
    ] = None,
    budget: Budget = None,
    threads: Threads = 0,
    graph: GraphName = None,
    report: ReportOnly = None,
    no_html: NoHtml = False,
    progress: Progress = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time models against each other, each in its own process, interleaved."""
    from onnxcomp.cli import bench_models

    output = Output(json, quiet, verbose, progress)
    shapes = [parse_shape(s) for s in shape or ()]
    limit = parse_seconds(budget) if budget else None
    tokens = parse_shape(generate) if generate is not None else None
    bench_models.show(
        output, models, target, shapes, tokens, runs=runs, budget=limit, threads=threads, graph=graph, report=report,
        html=not no_html,
    )  # fmt: skip


@app.command()
def tune(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file of choices to write.", show_default=False)],
    target: Target = "cpu",
    preset: Preset = "optimize",
    recipe: Annotated[Path | None, typer.Option(help="A recipe as YAML, in place of a preset.")] = None,
    shape: Shapes = None,
    budget: Budget = None,
    threads: Threads = 0,
    graph: GraphName = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the equivalent forms of each site on this machine; optimize and compress take the file as --choices."""
    from onnxcomp.cli.tune_model import tune as measure
    from onnxcomp.engine.settings import Settings
    from onnxcomp.reports import json_report as report
    from onnxcomp.reports import tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    settings = Settings(
        target=find(target), shapes=tuple(parse_shape(s) for s in shape or ()), threads=threads,
        budget=2 * parse_seconds(budget) if budget else None,  # choosing forms gets half of it
    )  # fmt: skip
    with output.progress() as watch:
        choices, found = measure(model, out, settings, preset=preset, recipe=recipe, graph=graph, watch=watch)
    changed = sum(c.form != c.default for c in found)
    line = f"{len(found)} kinds of sites, {changed} in another form than the table's; written to {out}"
    output.show(report.finite(choices.json()), line, tables.choices(found, every=verbose))


for _command in (validate, diff, verify, package, generate, sensitivity, presets, passes, schema, doctor):
    app.command()(_command)
app.command("report")(remake)


def _none_empty(given: Sequence[str]) -> None:
    """Refuse empty arguments: as a path one would be the current folder."""
    for before, arg in zip(["", *given], given, strict=False):
        if not arg or (arg.startswith("--") and arg.endswith("=")):
            name = arg.rstrip("=") or (before if before.startswith("-") else "an argument")
            raise RecipeError(f"{name} is empty: give a value, or leave it out")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if args is None else args)
    json, verbose = "--json" in given, bool({"-v", "--verbose"} & set(given))
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("onnxcomp").setLevel(logging.DEBUG)  # the runtime's own warnings as well
    if args is None:
        sys.excepthook = functools.partial(failures.crash, json, verbose)
    before, OnnxcompError.on_command_line = OnnxcompError.on_command_line, True
    try:
        _none_empty(given)
        typer.main.get_command(app).main(args=given, prog_name="onnxcomp")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else failures.FAULT
        if json and code == failures.USAGE:
            failures.as_json("UsageError", "bad usage, see stderr", code)
        return code
    except OnnxcompError as e:
        return failures.explain(e, json=json, verbose=verbose)
    except (OSError, MemoryError) as e:
        return failures.explain(failures.of_the_system(e), json=json, verbose=verbose)
    finally:
        OnnxcompError.on_command_line = before
    return 0
