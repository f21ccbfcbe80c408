"""minilm: the real all-MiniLM-L6-v2 encoder (BERT, 6 layers of width 384), from the folder `tools/fetch_minilm` fills.

Not shipped; the sentences under `data/minilm` are our own, those of `examples.jsonl` WordNet's. It has no task head:
judge it by agreement with its original embeddings (mean over the tokens, then cosine).

    python -m models.minilm --examples FOLDER    write examples.jsonl from the files data.* of WordNet 3.0
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

CACHE = Path(__file__).parent / "cache" / "minilm"
DATA = Path(__file__).parent / "data" / "minilm"
EXAMPLES = 4000  # enough for draws of 2,200 that differ
LEAST_WORDS = 10  # shorter examples are often phrases, not sentences


def checkpoint(folder: str | Path = CACHE) -> Path:
    """The folder with config, tokenizer and weights, or an error that says how to get it."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no MiniLM weights in {folder}; run `tools/fetch_minilm --out {folder}` to download and check them (84 MB)"
        )
    return folder


def export(out: str | Path, seed: int = 0, folder: str | Path = CACHE) -> Path:
    """Write the encoder as an ONNX folder; the weights are given, so `seed` changes nothing."""
    source = checkpoint(folder)
    import onnxcomp as oc

    return oc.export(source, out)


def write_examples(wordnet: str | Path) -> Path:
    """Draw examples of usage from the glosses of WordNet (files `data.noun` and so on), as `{"text": ...}` a line."""
    found = set[str]()
    for file in Path(wordnet).glob("data.*"):
        for line in file.read_text("utf-8").splitlines():
            gloss = line.partition("|")[2]
            found |= {x.strip() for x in re.findall(r'"([^"]+)"', gloss) if len(x.split()) >= LEAST_WORDS}
    if len(found) < EXAMPLES:
        raise FileNotFoundError(f"{wordnet}: holds {len(found)} examples of usage; WordNet 3.0 has some 6,000")
    drawn = sorted(random.Random(0).sample(sorted(found), EXAMPLES))
    out = DATA / "examples.jsonl"
    out.write_text("".join(json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in drawn), encoding="utf-8")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True, metavar="FOLDER", help="such as /usr/share/wordnet")
    print(write_examples(parser.parse_args().examples))
