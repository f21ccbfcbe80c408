"""The commands that say what there is: presets, passes, schemas, this machine, and whether a result is whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.cli import failures
from onnxcomp.cli.console import Output
from onnxcomp.cli.options import Json, Quiet, Verbose

__all__ = ["doctor", "passes", "presets", "schema", "verify"]


def presets(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the presets of compress: what each is for, which data it needs, and its target."""
    from onnxcomp.cli import preset_list
    from onnxcomp.reports import tables

    found = preset_list.presets()
    names = "\n".join(p["name"] for p in found) if quiet else ""
    Output(json, quiet, verbose).show({"presets": found}, names, tables.preset_table(found, every=verbose))


def _names() -> list[str]:
    from onnxcomp.engine import catalog

    return catalog.names()


def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass with its options.", autocompletion=_names)] = None,
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


def schema(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the JSON schemas of recipes, of report.json and of what `inspect --json` prints."""
    from onnxcomp.cli import inspect_model
    from onnxcomp.engine import catalog, recipe
    from onnxcomp.reports import json_report as report

    _left_out(catalog.listing().problems)
    whole = {"recipe": recipe.schema(), "report": report.schema(), "inspect": inspect_model.schema()}
    Output(json=True).show(whole, "")


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


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a result.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a result's files with its manifest, load its models and run them; exit code 3 if something differs."""
    import dataclasses

    from onnxcomp.engine.verified_result import verify as check

    found = check(folder)
    facts = {"folder": str(folder), "ok": found.ok, **dataclasses.asdict(found)}
    line = f"{folder}: {found.files} files are as they were written; {', '.join(found.models)} runs"
    others = f"not listed, so not compared: {', '.join(found.unlisted)}"
    Output(json, quiet, verbose).show(facts, line if found.ok else "", *([others] if found.unlisted else []))
    if not found.ok:
        sys.stderr.write("".join(f"refused: {p}\n" for p in found.problems))
        raise typer.Exit(failures.REFUSED)
