"""The commands about two models: how far one is from the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxcomp.cli import failures
from onnxcomp.cli.console import Output, parse_shape
from onnxcomp.cli.options import (
    AllowCode,
    Batch,
    Gates,
    GraphName,
    Json,
    Junit,
    LabelColumn,
    Model,
    NoHtml,
    Quiet,
    ReportOnly,
    Samples,
    Seed,
    Sequence_,
    Source,
    Summary,
    Target,
    TextColumn,
    Verbose,
)
from onnxcomp.cli.pipelines import ForPipelines

__all__ = ["diff", "validate"]


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
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    graph: GraphName = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    through_caches: Annotated[
        int, typer.Option(min=0, metavar="N", help="Decoders read N tokens at a time, behind their own caches.")
    ] = 0,
    generate: Annotated[
        str | None, typer.Option(metavar="prompt=16,new=32", help="Also compare greedy text behind so many tokens.")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Compare value by value: where the models begin to differ, and why.")
    ] = False,
    node_data: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Write that for model-explorer, by nodes of CANDIDATE.")
    ] = None,
    report: ReportOnly = None,
    no_html: NoHtml = False,
    junit: Junit = None,
    summary: Summary = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a model with its original on data: drift and task metrics with intervals."""
    from onnxcomp.cli import validate_models
    from onnxcomp.engine.report_file import check_report_file, write_report
    from onnxcomp.engine.settings import Settings
    from onnxcomp.reports import layer_tables, tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    check_report_file(report, html=not no_html)
    settings = Settings(
        target=find(target), evaluation=evaluation, samples=samples, batch=batch or 8, sequence=sequence,
        text_column=text_column, label_column=label_column, seed=seed,
        allow_code=allow_code, html=not no_html,
    )  # fmt: skip
    with ForPipelines("validate", junit, summary).recording() as tell:
        result = validate_models.compare(
            reference, candidate, settings, metrics=metric or (), gates=gate or (), graph=graph,
            through_caches=through_caches, generate=parse_shape(generate) if generate is not None else None,
            by_layer=by_layer, node_data=node_data,
        )  # fmt: skip
        if report is not None:
            write_report(result.report, report, html=not no_html)
        tell({"": result.report}, result.refused, refused=True)
    shown: list[Any] = [
        tables.validation(result.validation),
        *([tables.verdicts(result.verdicts)] if result.verdicts else []),
    ]
    if len(result.validation.outputs) > 1:
        shown.append(tables.outputs(result.validation, every=verbose))
    if result.layers is not None:
        shown += layer_tables.layer_tables(result.layers, every=verbose)
    output.show(result.json(), result.headline(), *shown)
    if result.refused:
        sys.stderr.write(f"refused: {result.refused}\n")
        raise typer.Exit(failures.REFUSED)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    raised: Annotated[
        bool,
        typer.Option("--raised", help="Compare the canonical forms, so that exporters' spelling is no difference."),
    ] = False,
    graph: GraphName = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what two models have otherwise: nodes, constants, shapes, types, bytes; by structure, not by name."""
    from onnxcomp.engine.model_diff import diff as compare
    from onnxcomp.files import storage
    from onnxcomp.reports import diff_tables

    a, b = (storage.load(storage.one_graph(x, graph)) for x in (first, second))
    found = compare(a, b, raised=raised)
    shown = diff_tables.diff_tables(found, every=verbose)
    Output(json, quiet, verbose).show(found.json(), diff_tables.diff_headline(found), *shown)
