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
from onnxcomp.cli.console import Output, parse_memory, parse_shape
from onnxcomp.errors import OnnxcompError
from onnxcomp.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="onnxcomp",
    help="Make trained transformers small and fast as ONNX graphs, and prove it.",
    epilog="Exit codes: 0 done, 1 a fault of onnxcomp or of a pass, 2 bad usage or input, 3 a gate refused the result.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a folder holding one.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder (or .onnx file) to write.", show_default=False)]
Target = Annotated[
    str, typer.Option(help="Where it will run: cpu, cpu-vnni, cpu-avx2, cpu-arm64, cuda, tensorrt, a file.")
]
Source = "an .npz, .jsonl or .txt file, a folder of images or .npz files, package.module:function, or random"
Calibration = Annotated[str | None, typer.Option(metavar="SRC", help=f"Data for statistics: {Source}.")]
Evaluation = Annotated[
    str | None, typer.Option("--evaluation", "--eval", metavar="SRC", help="Data to judge on, of the same kinds.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Use at most so many samples.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Samples per batch; by default 8.")]
Sequence_ = Annotated[int | None, typer.Option("--sequence", min=1, help="Use at most so many tokens per sample.")]
Gates = Annotated[list[str] | None, typer.Option("--gate", metavar="EXPR", help="Such as sqnr>=20 or size<=0.3x.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="AXES", help="Such as batch=1,sequence=128.")]
GraphName = Annotated[str | None, typer.Option("--graph", help="Only this graph of a folder with several.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let package.module:function sources run code.")]
NoMeasure = Annotated[bool, typer.Option("--no-measure", help="Time nothing; the same bytes on every machine.")]
ChoicesFile = Annotated[Path | None, typer.Option("--choices", help="Forms that onnxcomp tune measured, as a file.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write the report here as well, also when refused.")]
ExactRows = Annotated[
    bool,
    typer.Option(
        "--exact-rows",
        help="Keep the result of queries whose mask hides every key; such attentions stay decomposed.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 lets the runtime choose.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only the result in one line, and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Everything that was left alone; warnings, tracebacks.")]


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
            source, out, task=task, opset=opset, dtype=dtype, static=fixed, revision=revision,
            allow_pickle=allow_pickle, watch=(lambda label: watch(label, 0, 1)) if watch else None,
        )  # fmt: skip
    record = text.loads((folder / "export.json").read_text(encoding="utf-8"))
    output.show({"out": str(folder), **record}, f"exported to {folder}: {record['task']}, {record['dtype']}")


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
    from onnxcomp.reports import tables

    output = Output(json, quiet, verbose)
    found = inspect_model.inspect(model, graph, exact_rows=exact_rows)
    shown = [t for facts in found["graphs"].values() for t in tables.anatomy(facts, verbose=verbose)]
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
    exact_rows: ExactRows = False,
    choices: ChoicesFile = None,
    cache: Annotated[Path | None, typer.Option(help="Remember measured forms and finished passes here.")] = None,
    report: ReportFile = None,
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
        measure=not no_measure, report=report, exact_rows=exact_rows, choices=choices, cache=cache,
    )  # fmt: skip
    show(Output(json, quiet, verbose), out, lambda watch: run(watch=watch))


@app.command()
def compress(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder (or .onnx file) to write.")] = None,
    preset: Annotated[str | None, typer.Option(help="int8, int8-dynamic, int8-small, fp16, bf16 or optimize.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe as YAML.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="SPEC", help="qdq, or 'qdq: {clip: mse}'.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Where it will run; by default the recipe's.")] = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    samples: Samples = None,
    batch: Batch = None,
    sequence: Sequence_ = None,
    gate: Gates = None,
    on_fail: Annotated[str | None, typer.Option(help="raise, or rollback to undo a refused pass.")] = None,
    shape: Shapes = None,
    opset: Annotated[int | None, typer.Option(help="Highest operator set to write.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Limit for statistics, such as 4GiB.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done; write nothing.")] = False,
    no_measure: NoMeasure = False,
    exact_rows: ExactRows = False,
    choices: ChoicesFile = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep statistics, measured forms and finished passes here.")
    ] = None,
    report: ReportFile = None,
    graph: GraphName = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
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
        samples=samples, batch=batch, sequence=sequence, gates=gate or (), on_fail=rule,
        shapes=[parse_shape(s) for s in shape or ()], opset=opset, memory=parse_memory(memory) if memory else None,
        plan=plan, measure=not no_measure, cache=cache, report=report, graph=graph, seed=seed, allow_code=allow_code,
        exact_rows=exact_rows, choices=choices,
    )  # fmt: skip
    show(Output(json, quiet, verbose), out, lambda watch: run(watch=watch))


@app.command()
def validate(
    reference: Model,
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The model to judge.")],
    evaluation: Annotated[
        str, typer.Option("--evaluation", "--eval", metavar="SRC", help=f"Data to judge on: {Source}.")
    ],
    metric: Annotated[list[str] | None, typer.Option(help="agreement, accuracy, f1, perplexity, ...")] = None,
    gate: Gates = None,
    target: Target = "cpu",
    samples: Samples = None,
    batch: Batch = None,
    sequence: Sequence_ = None,
    graph: GraphName = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a model with its original on data: drift and task metrics with intervals."""
    from onnxcomp.cli import validate_models
    from onnxcomp.engine.settings import Settings
    from onnxcomp.reports import tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    settings = Settings(
        target=find(target), evaluation=evaluation, samples=samples, batch=batch or 8, sequence=sequence, seed=seed,
        allow_code=allow_code,
    )  # fmt: skip
    result = validate_models.compare(
        reference, candidate, settings, metrics=metric or (), gates=gate or (), graph=graph
    )
    shown = [tables.validation(result.validation), *([tables.verdicts(result.verdicts)] if result.verdicts else [])]
    if len(result.validation.outputs) > 1:
        shown.append(tables.outputs(result.validation, every=verbose))
    output.show(result.json(), result.headline(), *shown)
    if result.refused:
        sys.stderr.write(f"refused: {result.refused}\n")
        raise typer.Exit(failures.REFUSED)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Models to time; the first is what others are compared with.")],
    target: Target = "cpu",
    shape: Shapes = None,
    runs: Annotated[int, typer.Option(min=1, help="Undisturbed runs of each model at each shape, at least.")] = 30,
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time models against each other, each in its own process, interleaved."""
    from onnxcomp.reports import json_report as report
    from onnxcomp.reports import tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    shapes = [parse_shape(s) for s in shape or ()]
    with output.progress() as watch:
        step = (lambda done, total: watch("measuring", done, total)) if watch else None
        found = onnxcomp.bench(models, find(target), shapes, runs=runs, threads=threads, watch=step)
    notes = [f"note: {w}" for w in found.warnings]
    output.show(report.finite(found.json()), report.speed_headline(found), tables.benchmark(found), *notes)


@app.command()
def tune(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file of choices to write.", show_default=False)],
    target: Target = "cpu",
    preset: Annotated[str, typer.Option(help="Measure what this preset leaves of the model.")] = "optimize",
    recipe: Annotated[Path | None, typer.Option(help="A recipe as YAML, in place of a preset.")] = None,
    shape: Shapes = None,
    graph: GraphName = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the equivalent forms of each site on this machine; optimize and compress take the file as --choices."""
    from onnxcomp.cli.tune_model import tune as measure
    from onnxcomp.reports import json_report as report
    from onnxcomp.reports import tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    shapes = [parse_shape(s) for s in shape or ()]
    choices, found = measure(model, out, target=find(target), preset=preset, recipe=recipe, shapes=shapes, graph=graph)
    changed = sum(c.form != c.default for c in found)
    line = f"{len(found)} kinds of sites, {changed} in another form than the table's; written to {out}"
    output.show(report.finite(choices.json()), line, tables.choices(found, every=verbose))


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass with its options.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List all available passes, or explain one."""
    import dataclasses

    from onnxcomp.engine import catalog
    from onnxcomp.reports import tables

    output = Output(json, quiet, verbose)
    if name is None:
        known = catalog.listing()
        found = [catalog.describe(n) for n in known.passes]
        names = "\n".join(known.passes) if quiet else ""
        facts = {"passes": [dataclasses.asdict(i) for i in found], "left_out": known.problems}
        output.show(facts, names, tables.pass_table(found))
        _left_out(known.problems)
        return
    info = catalog.describe(name)
    line = f"{info.name}: stage {info.stage}, {info.fidelity}, from {info.origin}"
    output.show(dataclasses.asdict(info), line, f"\n{info.doc}\n", tables.option_table(info))


def _left_out(problems: Sequence[str]) -> None:
    """Warn of passes that were left out of what is shown."""
    for problem in problems:
        sys.stderr.write(f"warning: {problem}; it is left out\n")


@app.command()
def schema(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the JSON schemas of recipes, of report.json and of what `inspect --json` prints."""
    from onnxcomp.cli import inspect_model
    from onnxcomp.engine import catalog, recipe
    from onnxcomp.reports import json_report as report

    _left_out(catalog.listing().problems)
    whole = {"recipe": recipe.schema(), "report": report.schema(), "inspect": inspect_model.schema()}
    Output(json=True).show(whole, "")


@app.command()
def doctor(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Check this machine and installation; exit code 1 if something is broken."""
    from onnxcomp.cli.diagnosis import diagnose
    from onnxcomp.reports import tables

    found = diagnose()
    broken = [c["check"] for c in found["checks"] if c["status"] == "broken"]
    line = f"broken: {', '.join(broken)}" if broken else "everything needed works"
    Output(json, quiet, verbose).show(found, line, tables.checks(found["checks"]))
    if broken:
        raise typer.Exit(failures.FAULT)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if args is None else args)
    json, verbose = "--json" in given, bool({"-v", "--verbose"} & set(given))
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("onnxcomp").setLevel(logging.DEBUG)  # the runtime's own warnings as well
    if args is None:
        sys.excepthook = functools.partial(failures.crash, json, verbose)
    try:
        typer.main.get_command(app).main(args=given, prog_name="onnxcomp")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else failures.FAULT
        if json and code == failures.USAGE:
            failures.as_json("UsageError", "bad usage, see stderr", code)
        return code
    except OnnxcompError as e:
        return failures.explain(e, json=json, verbose=verbose)
    return 0
