"""The command that does a job again, to copy from its report."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.engine.recipe import Recipe, presets
from onnxcomp.engine.settings import Settings

if TYPE_CHECKING:
    from onnxcomp.engine.job import Job

__all__ = ["command_of", "settings_words"]

FILE = "recipe.yaml"  # where the command looks for a recipe that is no preset
OUT = "result"  # where it writes
# Settings that are options of the same name.
SAME = ("samples", "batch", "sequence", "text_column", "label_column", "memory", "budget", "threads", "seed")


def command_of(job: Job) -> str:
    """A shell command; data that came from Python, which no command can name, stands as NAME.npz."""
    s = job.settings
    words = ["onnxcomp", "compress", str(job.model), "-o", OUT, *_recipe(job.recipe)]
    for option, given in (("--calibration", s.calibration), ("--eval", s.evaluation)):
        if given is not None:
            words += [option, str(given) if isinstance(given, (str, Path)) else f"{option.lstrip('-')}.npz"]
    return shlex.join(words + settings_words(s))


def settings_words(s: Settings) -> list[str]:
    """The options of a command for settings that are not those it has anyhow; its data are named elsewhere."""
    plain, words = Settings(), list[str]()
    for option, given, default in (
        ("--target", s.target.name, plain.target.name),
        *((f"--{k.replace('_', '-')}", getattr(s, k), getattr(plain, k)) for k in SAME),
    ):
        if given != default:
            words += [option, str(given)]
    for shape in s.shapes:
        words += ["--shape", ",".join(f"{k}={n}" for k, n in shape.items())]
    for option, wanted in (("--no-measure", not s.measure), ("--no-html", not s.html), ("--allow-code", s.allow_code)):
        words += [option] if wanted else []
    return words


def _recipe(recipe: Recipe) -> Iterator[str]:
    """The preset that a recipe is, with the gates that were added, or the file it is to be written to."""
    own = Recipe.preset(recipe.name) if recipe.name in presets() else None
    if own is not None and dataclasses.replace(recipe, gates=(), data=own.data) == dataclasses.replace(own, gates=()):
        yield from ("--preset", recipe.name)
        for gate in recipe.gates:
            if gate not in own.gates:
                yield from ("--gate", gate)
        return
    yield from ("--recipe", FILE)
