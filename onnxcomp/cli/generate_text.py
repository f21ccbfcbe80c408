"""`onnxcomp generate`: text from a decoder, to look at what compression left."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.cli.console import Output
from onnxcomp.cli.options import GraphName, Json, Quiet, Verbose

__all__ = ["generate"]


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A decoder with its tokenizer.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token, 1 draws as trained.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that hold this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    draft: Annotated[
        Path | None, typer.Option(metavar="SMALLER", help="A model of the same words that proposes tokens.")
    ] = None,
    lookahead: Annotated[int, typer.Option(min=1, help="Tokens that the draft proposes at once.")] = 4,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0: as it likes.")] = 0,
    graph: GraphName = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Go on from a prompt, token by token; the text on stdout as it comes, its speed on stderr."""
    from onnxcomp.engine.generate import generate as run

    said = list[str]()

    def tell(piece: str) -> None:
        said.append(piece)
        sys.stdout.write(piece if said[1:] else prompt + piece)
        sys.stdout.flush()

    found = run(
        model, prompt, max_new=max_new, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, threads=threads,
        graph=graph, draft=draft, lookahead=lookahead,
        tell=None if json else tell,
    )  # fmt: skip
    output = Output(json, quiet, verbose)
    if json:
        output.show(dataclasses.asdict(found) | {"per_second": found.per_second}, "")
        return
    tell("\n")
    speed = f", then {found.per_second:.0f} tokens/s" if found.per_second else ""
    memory = f"caches of {found.cache_bytes / 1e6:.2f} MB" if found.cached else "no caches: every token reads all again"
    output.note(
        f"{len(found.prompt_tokens)} tokens read and the first made in {found.first_seconds * 1e3:.0f} ms{speed} "
        f"({len(found.tokens)} in all{', ended by the model' if found.ended else ''}), {memory}"
    )
    if draft is not None:
        rate = f"{found.accepted / found.proposed:.0%}" if found.proposed else "none"
        alone = f"; without it {found.alone_per_second:.0f} tokens/s" if found.alone_per_second else ""
        output.note(f"{found.accepted} of {found.proposed} tokens that the draft proposed were taken ({rate}){alone}")
