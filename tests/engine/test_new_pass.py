"""A new pass is one file: what is dropped into the folder or installed by a stranger is known everywhere at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcomp.engine import catalog

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "round_quiet.py"
LAWS = ("tests/passes/test_every_pass.py", "tests/stats/test_stats.py")
DROPPED = """
import importlib, sys
importlib.import_module("onnxcomp.passes").__path__.append({folder!r})
"""
# What a process says of a pass that nobody told it of: catalogue, recipe, schema, statistics, command line, laws.
TELL = """
import json, sys
import pytest
from onnxcomp import stats
from onnxcomp.cli import main
from onnxcomp.engine import catalog, recipe
p = recipe.parse_pass("round-quiet: {{steps: 16}}")
known = json.dumps(recipe.schema())
origin, there = catalog.describe("round-quiet").origin, '"round-quiet": {{' in known
print(json.dumps([origin, str(p), p.steps, there]))
assert main(["passes", "round-quiet"]) == 0
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{laws!r}, "-k", {chosen!r}]))
"""


def told(tmp_path: Path, chosen: str, start: str = "") -> str:
    """What a fresh process prints that has this folder on its path, with the laws of the chosen tests."""
    code = start + TELL.format(laws=LAWS, chosen=chosen)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def ran(text: str) -> int:
    """How many tests passed in a process."""
    return int(text.rpartition(" passed")[0].split()[-1])


@pytest.mark.slow
def test_a_file_in_the_folder_is_a_pass(tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path)
    first, *rest = told(tmp_path, "round-quiet or fourth", DROPPED.format(folder=str(tmp_path))).splitlines()
    assert json.loads(first) == ["onnxcomp", "round-quiet: {steps: 16}", 16, True]
    text = "\n".join(rest)
    assert "stage weights, lossy, from onnxcomp" in text
    assert "How many values the largest weight has" in text
    assert ran(text) >= 24


@pytest.mark.slow
def test_an_installed_package_offers_a_pass(tmp_path: Path) -> None:
    package, info = tmp_path / "stranger", tmp_path / "stranger-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    shutil.copy(SOURCE, package)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{catalog.GROUP}]\nround-quiet = stranger.round_quiet:RoundQuiet\n")
    first, *rest = told(tmp_path, "(round-quiet and (grouped or identity or error)) or fourth").splitlines()
    assert json.loads(first) == ["the package 'stranger'", "round-quiet: {steps: 16}", 16, True]
    assert ran("\n".join(rest)) >= 10
