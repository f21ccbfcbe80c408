"""What each rewrite looks like, as text; `UPDATE_GOLDEN=1 pytest tests/passes/test_golden.py` writes the files anew."""

import os
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.graph import Graph
from onnxcomp.target import CPU, TENSORRT
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "canonicalize-encoder": (lambda: tiny.encoder(layers=1, spelled="dynamo"), ["canonicalize"], CPU),
    "canonicalize-decoder": (lambda: tiny.decoder(layers=1, spelled="dynamo"), ["canonicalize"], CPU),
    "cleanup-encoder": (lambda: tiny.encoder(layers=1, spelled="dynamo"), ["cleanup"], CPU),
    "lower-encoder": (lambda: tiny.encoder(layers=1), ["lower"], CPU),
    "qdq-decoder": (lambda: tiny.decoder(layers=1), ["qdq: {min_size: 1}", "lower"], CPU),
    "qdq-encoder-siblings": (lambda: tiny.encoder(layers=1), ["qdq: {min_size: 1, weights: tensor}"], CPU),
    "qdq-gemm-rank-2": (
        lambda: tiny.encoder(layers=1, classes=3, spelled="dynamo"),
        ["canonicalize", "qdq: {min_size: 1}", "lower"],
        CPU,
    ),
    "qdq-tensorrt": (lambda: tiny.mlp(hidden=8, ffn=16), ["qdq: {min_size: 1}"], TENSORRT),
    "dynamic-quant-encoder": (lambda: tiny.encoder(layers=1), ["dynamic-quant: {min_size: 1}", "lower"], CPU),
}


def text(g: Graph) -> str:
    """One line a node: operator, inputs (constants as type and shape), attributes, output with its shape."""
    names: dict[object, str] = {v: str(v.name) for v in g.inputs}

    def show(v):
        if v is None:
            return "-"
        if v not in names and g.is_constant(v):
            t = g.tensor(v)
            small = (
                f"={np.asarray(t.numpy()).tolist()}"
                if t.dtype.is_integer() and t.size <= 4 and t.dtype.bitwidth > 8
                else ""
            )
            return f"{t.dtype.name.lower()}{list(t.shape)}{small}"
        return names.setdefault(v, f"%{len(names)}")

    lines = []
    for node in g.nodes():
        attrs = {k: a.value for k, a in sorted(node.attributes.items()) if k not in ("value",)}
        shown = ", ".join(show(x) for x in node.inputs)
        outs = ", ".join(f"{v.name if v.is_graph_output() else show(v)} {v.shape}" for v in node.outputs)
        prefix = f"{node.domain}::" if node.domain else ""
        lines.append(f"{prefix}{node.op_type}({shown}){attrs or ''} -> {outs}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_rewrite_reads_as_recorded(case):
    build, specs, target = CASES[case]
    g = build()
    if not any(s.startswith(("canonicalize", "cleanup")) for s in specs):
        canonicalize(g)
    batches = [Batch(tiny.feeds(g, 2, 7, seed=i)) for i in range(2)]
    run = PassManager([parse_pass(s) for s in specs], target=target, allow_unchanged=True).run(
        g, as_dataset(batches, g)
    )
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text(run.model))
    assert path.read_text() == text(run.model)
