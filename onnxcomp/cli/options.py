"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp.engine import recipes
from onnxcomp.target import TARGETS

__all__ = [
    "AllowCode",
    "Batch",
    "Budget",
    "Calibration",
    "ChoicesFile",
    "Evaluation",
    "ExactRows",
    "Gates",
    "GraphName",
    "Json",
    "Junit",
    "LabelColumn",
    "Model",
    "NoHtml",
    "NoMeasure",
    "Out",
    "Preset",
    "Progress",
    "Quiet",
    "ReportFile",
    "ReportOnly",
    "Samples",
    "Seed",
    "Sequence_",
    "Shapes",
    "Source",
    "Standard",
    "Summary",
    "Target",
    "TargetOrRecipes",
    "TextColumn",
    "Threads",
    "Verbose",
]


def _presets() -> list[str]:
    return [*recipes.names()]


def _targets() -> list[str]:
    return [*TARGETS]


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a folder holding one.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder (or .onnx file) to write.", show_default=False)]
Target = Annotated[
    str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}, or a YAML file.", autocompletion=_targets)
]
TargetOrRecipes = Annotated[
    str | None, typer.Option("--target", help="Where it will run; by default the recipe's.", autocompletion=_targets)
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(recipes.names())}; see onnxcomp presets.", autocompletion=_presets),
]
Source = "an .npz, .jsonl or .txt file, a folder of images or .npz files, package.module:function, or random"
Calibration = Annotated[str | None, typer.Option(metavar="SRC", help=f"Data for statistics: {Source}.")]
Evaluation = Annotated[
    str | None, typer.Option("--evaluation", "--eval", metavar="SRC", help="Data to judge on, of the same kinds.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Use at most so many samples.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Samples per batch; by default 8.")]
Sequence_ = Annotated[int | None, typer.Option("--sequence", min=1, help="Use at most so many tokens per sample.")]
TextColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The field of .jsonl with the text; of pairs, or of source and target, A,B."),
]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="The field of .jsonl that holds the label.")]
Gates = Annotated[list[str] | None, typer.Option("--gate", metavar="EXPR", help="Such as sqnr>=20 or size<=0.3x.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="AXES", help="Such as batch=1,sequence=128.")]
GraphName = Annotated[str | None, typer.Option("--graph", help="Only this graph of a folder with several.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let package.module:function sources run code.")]
NoMeasure = Annotated[bool, typer.Option("--no-measure", help="Time nothing; the same bytes on every machine.")]
ChoicesFile = Annotated[Path | None, typer.Option("--choices", help="Forms that onnxcomp tune measured, as a file.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write the report here as well, also when refused.")]
ReportOnly = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a report: this JSON file and its page beside it.")
]
NoHtml = Annotated[bool, typer.Option("--no-html", help="Write no page (.html) beside the report.")]
ExactRows = Annotated[
    bool,
    typer.Option(
        "--exact-rows",
        help="Keep the result of queries whose mask hides every key; such attentions stay decomposed.",
    ),
]
Standard = Annotated[
    bool, typer.Option("--standard", help="Write no operators of ONNX Runtime's own; for other consumers.")
]
SEED = "Seed of everything random; with --no-measure one seed gives the same bytes on any number of threads of one CPU."
Seed = Annotated[int, typer.Option(min=0, help=SEED)]
Threads = Annotated[int, typer.Option(min=0, help="Threads of what is timed; 0 lets the runtime choose.")]
Budget = Annotated[str | None, typer.Option(metavar="TIME", help="Stop measuring after so long, such as 60s or 2m.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Junit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="F.xml", help="Write JUnit XML, a case for each gate, also if refused."),
]
Summary = Annotated[
    Path | None, typer.Option("--summary", metavar="F.md", help="Append a summary in Markdown, also if refused.")
]
Progress = Annotated[
    str, typer.Option("--progress", metavar="KIND", help="auto, or json: a JSON object a line on stderr.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only the result in one line, and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Everything that was left alone; warnings, tracebacks.")]
