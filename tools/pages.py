"""The pages that measuring commands write their tables into, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "cache_bits": "passes/README.md",
    "cnn": "passes/README.md",
    "coverage": "onnxcomp/README.md",
    "coverage-wider": "onnxcomp/README.md",
    "decoder_passes": "passes/README.md",
    "curves": "passes/README.md",
    "curves-minilm": "passes/README.md",
    "cuts": "passes/README.md",
    "cuts-wider": "passes/README.md",
    "builder": "passes/README.md",
    "format_speed": "passes/README.md",
    "int8": "passes/README.md",
    "autopilot": "passes/README.md",
    "generation": "onnxcomp/README.md",
    "generation-pairs": "onnxcomp/README.md",
    "frontier": "passes/README.md",
    "interactions": "passes/README.md",
    "low_bits": "passes/README.md",
    "node_tests": "onnxcomp/README.md",
    "planted": "onnxcomp/README.md",
    "rewrites": "passes/README.md",
    "window_memory": "passes/README.md",
}


def write_table(name: str, text: str, root: Path = ROOT) -> None:
    """Replace the table of that name on its page; `ValueError` where the page has lost a marker."""
    page = root / PAGES[name]
    whole, begin = page.read_text("utf-8"), f"<!-- {name} -->"
    before = whole.index(begin) + len(begin)
    after = whole.index(f"<!-- /{name} -->", before)
    page.write_text(f"{whole[:before]}\n{text}\n{whole[after:]}", "utf-8")
