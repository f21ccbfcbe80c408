"""`onnxcomp package`: a folder that another engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.cli.console import Output
from onnxcomp.cli.options import GraphName, Json, Quiet, Verbose

__all__ = ["package"]


def package(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model with its configuration and tokenizer.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="A new folder.")],
    consumer: Annotated[str, typer.Option("--for", metavar="NAME", help="genai, optimum or transformers.js.")],
    threads: Annotated[int, typer.Option(min=0, help="Threads that genai takes; 0: as many as this machine has.")] = 0,
    graph: GraphName = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the folder that onnxruntime-genai, Optimum or transformers.js loads: model, tokenizer, configuration."""
    from onnxcomp.engine.consumers import package as write

    notes = list[str]()
    folder = write(model, out, consumer, threads=threads, graph=graph, tell=notes.append)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    facts = {"folder": str(folder), "for": consumer, "files": files, "notes": notes}
    told = "".join(f"note: {n}\n" for n in notes)
    Output(json, quiet, verbose).show(facts, f"{told}written to {folder}: {', '.join(files)}")
