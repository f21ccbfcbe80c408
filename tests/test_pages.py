"""The README's own blocks run as they stand, in order, in a fresh folder with the checkout's models beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.export
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text())


def test_blocks_run_in_order(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "models").symlink_to(ROOT / "models")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    assert shutil.which("onnxcomp", path=environment["PATH"]), "the command line is not installed"
    ran = 0
    for language, text in blocks():
        command = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": [sys.executable, "-c", text]}.get(
            language
        )
        if command is None:
            continue
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran >= 2
    assert (tmp_path / "my-int8" / "report.json").exists()
    assert (tmp_path / "my-int8" / "tokenizer.json").exists()


def test_recipe_block_is_a_recipe():
    from onnxcomp.engine.recipe import Recipe

    [text] = [t for language, t in blocks() if language == "yaml"]
    recipe = Recipe.from_yaml(text)
    assert [p.name for p in recipe.passes] == ["canonicalize", "cleanup", "qdq", "lower"]
    assert yaml.safe_load(text)["on_fail"] == recipe.on_fail
