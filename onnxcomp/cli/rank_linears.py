"""`onnxcomp sensitivity`: the linears of a model by what quantizing each costs, with an entry that spares the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxcomp.cli.console import Output, Watch
from onnxcomp.cli.options import (
    AllowCode,
    Batch,
    GraphName,
    Json,
    LabelColumn,
    Model,
    Quiet,
    Samples,
    Seed,
    Sequence_,
    Source,
    Target,
    TextColumn,
    Verbose,
)

__all__ = ["rank", "sensitivity"]

SHOWN = 12  # linears in the table, the worst, unless all are asked for


def rank(model: Path, settings: Any, options: Mapping[str, Any], watch: Watch | None) -> dict[str, Any]:
    """What each linear loses by each form, the worst first, and the entry, as plain values; canonicalized on a copy."""
    from onnxcomp.engine.manager import PassManager
    from onnxcomp.engine.recipe import parse_pass
    from onnxcomp.errors import ModelError
    from onnxcomp.files import storage

    source = storage.read(model)
    data = settings.dataset(settings.calibration, source.graph, source.path.parent)
    passes = [parse_pass("canonicalize"), parse_pass({"sensitivity": options})]
    step = PassManager(passes, settings, watch=watch).run(source, data).report.steps[-1]
    if not step.noted:
        raise ModelError(f"{model}: has no float linears of the size that quantizers take")
    *sites, entry = step.noted
    return {
        "sites": [{"site": n.site, "losses": dict(n.values)} for n in sites],
        "recipe": f"- {entry.what}",
    }


def _rows(sites: Sequence[Mapping[str, Any]], by: str) -> list[tuple[str, ...]]:
    total = sum(x["losses"][by] for x in sites) or 1.0
    return [
        (x["site"], *(f"{loss:.3g}" for loss in x["losses"].values()), f"{x['losses'][by] / total:.1%}") for x in sites
    ]


def sensitivity(
    model: Model,
    calibration: Annotated[str, typer.Option(metavar="SRC", help=f"Data, a fifth of which judges: {Source}.")],
    by: Annotated[str, typer.Option(help="Order by int8, 8 bits, 4 bits, 3 bits or 2 bits.")] = "4 bits",
    metric: Annotated[str | None, typer.Option(help="Loss: a gate's name; by default kl or rel-l2.")] = None,
    block: Annotated[int, typer.Option(help="In-channels that share a scale of weights.")] = 32,
    target: Target = "cpu",
    samples: Samples = None,
    batch: Batch = None,
    sequence: Sequence_ = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    graph: GraphName = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank the linears by what quantizing each costs the outputs, with a recipe's entry that spares the worst."""
    from onnxcomp.engine.settings import Settings
    from onnxcomp.files import storage
    from onnxcomp.reports import tables
    from onnxcomp.target import find

    output = Output(json, quiet, verbose)
    settings = Settings(
        target=find(target), calibration=calibration, samples=samples, batch=batch or 8, sequence=sequence,
        text_column=text_column, label_column=label_column, seed=seed, allow_code=allow_code, measure=False,
    )  # fmt: skip
    options = {"by": by, "block": block} | ({"metric": metric} if metric else {})
    with output.progress() as watch:
        found = rank(storage.one_graph(model, graph), settings, options, watch)
    sites = found["sites"]
    shown = sites if verbose else sites[:SHOWN]
    columns = ("linear", *sites[0]["losses"], "share")
    table = tables.table(f"Loss of each alone, by {by}", columns, _rows(sites, by)[: len(shown)])
    rest = [] if len(shown) == len(sites) else [f"and {len(sites) - len(shown)} that lose less (-v)"]
    line = f"{sites[0]['site']} loses most by {by}, of {len(sites)} linears"
    output.show(
        found, line, table, *rest, f"As a recipe's entry, to spare those that make half of it:\n{found['recipe']}"
    )
