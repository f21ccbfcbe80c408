"""What `tools/same_bytes` runs in each revision: compressions of one model through the public names of onnxcomp only.

python tools/compressions.py export NAME FOLDER
python tools/compressions.py drive MODEL DATA WORK CASE...     prints JSON: case > file or number > hash or text
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"samples": 16, "batch": 8, "sequence": 32}
# Later gates replace a preset's: a result that few samples judge badly is to be compared all the same.
GATES = ("sqnr>=-200", "accuracy-drop<=1?", "perplexity-rise<=1000000?")
PRESETS = {
    "int8": "cpu",
    "int8-dynamic": "cpu",
    "int8-small": "cpu",
    "fp16": "cuda",
    "bf16": "tensorrt",
    "optimize": "cpu",
}
# Behind canonicalize unless they begin with it or cleanup; " > " separates passes. `half` is in the presets.
TRANSFORMER = (
    "canonicalize",
    "cleanup",
    "drop-layers: {ratio: 0.4}",
    "group-heads",
    "window-attention: {mass: 0.7}",
    "low-rank: {ratio: 0.3, min_size: 0, multiple: 8}",
    "slice",
    "prune-heads",
    "prune-ffn: {score: wanda, ranking: global, repair: gauss-newton}",
    "prune-ffn: {parameters: 0.8, score: fluctuation, repair: bias} > qdq",
    "prune-heads > prune-ffn > refit > qdq > lower",
    "sparsify",
    "quantize-weights: {min_size: 1, embeddings: true}",
    "qdq: {clip: percentile, percentile: 99.9, skip: ['*down_proj*']} > lower",
)
RECIPES = {
    "docs_lm": (
        *TRANSFORMER,
        "prune-hidden",
        "prune-hidden: {score: magnitude, repair: none}",
        "prune-vocab",
        "merge-tokens",  # refused, rotary embedding
    ),
    "vit_digits": (
        *TRANSFORMER,
        "canonicalize: {exact_rows: true} > lower: {exact_rows: true, standard: true}",
        "drop-layers: {ratio: 0.4, part: mlp, score: ablation, repair: gauss-newton}",
        "drop-tokens",
        "merge-tokens",
        "group-heads: {repair: gauss-newton}",
        "low-rank: {ratio: 0.3, min_size: 0, multiple: 8, method: asvd, allocation: uniform}",
        "slice: {basis: shared, repair: none}",
        "prune-heads: {ratio: 0.5, heads: groups, score: ablation, repair: bias}",
        "prune-hidden",  # refused, LayerNorm
        "sparsify: {pattern: '2:4', method: wanda, permute: true, compact: true}",
        "sparsify: {pattern: block 4x1, method: magnitude}",
        "qdq: {clip: entropy, weights: tensor, outputs: true}",
        "dynamic-quant: {weights: tensor}",
    ),
    "cnn": (
        "canonicalize",
        "low-rank: {ratio: 0.3, min_size: 0, multiple: 8}",
        "prune-channels",
        "prune-channels: {score: fluctuation, repair: bias}",
    ),
}
Found = dict[str, str]  # what was written, or "refused" (on purpose) or "broken", and its hash or text


def drive(model: Path, data: Path, cases: list[str], work: Path) -> None:
    """Compress in this process and print one JSON object: case > what was found, with the seconds it took."""
    import onnxcomp as oc

    home = Path(oc.__file__).resolve()
    if not home.is_relative_to(Path(os.environ["PYTHONPATH"]).resolve()):
        raise SystemExit(f"onnxcomp was imported from {home}, not from the revision")
    if threads := int(os.environ.get("SAME_BYTES_THREADS", "1")):
        importlib.import_module("onnxcomp.runtime.sessions").THREADS = threads  # of sessions that nothing times
    evaluation = "eval" if "eval" in inspect.signature(oc.compress).parameters else "evaluation"
    given = {"calibration": str(data / "calibration.npz"), evaluation: str(data / "heldout.npz")} | SIZES
    found = {}
    for i, case in enumerate(cases):
        out, began = work / str(i), time.perf_counter()
        try:
            oc.compress(model, out, **asked(case), **given, seed=0, measure=False)
            result = written(out)
        except Exception as e:  # noqa: BLE001  whatever a revision raises is its result
            text = f"{type(e).__name__}: {e}".replace(str(work), "").replace(str(model.parent), "")
            result = {"refused" if isinstance(e, oc.OnnxcompError) else "broken": text}
        found[case] = result
        print(f"{time.perf_counter() - began:6.1f} s  {model.parent.name}  {case}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def asked(case: str) -> dict[str, Any]:
    """Keyword arguments of `compress` for a preset or a recipe."""
    if case in PRESETS:
        return {"preset": case, "target": PRESETS[case], "gates": GATES}
    passes = case.split(" > ")
    first = [] if passes[0].startswith(("canonicalize", "cleanup")) else ["canonicalize"]
    return {"passes": [*first, *passes]}


def written(out: Path) -> Found:
    """Hashes of all files below a folder, and the numbers of the report that must not change."""
    import onnx

    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        content = path.read_bytes()
        if path.name.endswith("report.html"):  # made of report.json
            continue
        if path.name.endswith("report.json"):
            report = json.loads(content)
            keys = ("name", "eligible", "changed", "edits", "nodes")
            steps = [[*(s[k] for k in keys), len(s["declined"])] for s in report["steps"]]
            found |= {"steps": json.dumps(steps), "values": json.dumps((report["validation"] or {}).get("values"))}
            continue
        if path.suffix == ".onnx":
            proto = onnx.load_from_string(content)
            found[f"metadata of {name}"] = str(sorted((p.key, p.value) for p in proto.metadata_props))
            del proto.metadata_props[:]
            content = proto.SerializeToString(deterministic=True)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def export(name: str, out: Path) -> None:
    """Write the source model: a trained one of models/, or a random CNN on the images of vit_digits."""
    if name != "cnn":
        importlib.import_module(f"models.{name}").export(out)
        return
    import torch
    from torch import nn

    torch.manual_seed(0)
    wide = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2)]
    net = nn.Sequential(*wide, nn.ReLU(), nn.Conv2d(32, 24, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)).eval()
    axes = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
    out.mkdir(parents=True)
    arguments = {"input_names": ["pixel_values"], "output_names": ["logits"], "dynamic_axes": axes, "opset_version": 18}
    torch.onnx.export(net, (torch.zeros(2, 1, 8, 8),), str(out / "model.onnx"), dynamo=False, **arguments)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["drive", model, data, work, *cases]:
            drive(Path(model), Path(data), cases, Path(work))
        case ["export", name, out]:
            export(name, Path(out))
