"""Recognition on what exporters really write: everything raised, one signature per model, idempotent, equal outputs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks, checks
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.runtime import Session
from onnxcomp.structure import canonicalize, sites
from tests import tiny

FILES = sorted((Path(__file__).parent / "graphs").glob("*.onnx"))
SHAPES = ((2, 12, "right"), (3, 17, "left"), (1, 7, "none"))
# Operators of masks, positions and sizes, which exporters may spell differently.
SIDE = {"Shape", "Gather", "GatherND", "GatherElements", "Slice", "Concat", "Squeeze", "Unsqueeze", "Expand", "Cast"}
SIDE |= {"Range", "And", "Or", "Not", "GreaterOrEqual", "LessOrEqual", "Reshape", "Cos", "Sin", "CumSum", "Equal"}


def load(path: Path) -> Graph:
    return Graph(ir.load(path))


def feeds(g: Graph, batch: int, sequence: int, padding: str) -> dict:
    found = tiny.feeds(g, batch, sequence, seed=sequence, padding=padding)
    limits = {"input_ids": 39, "token_type_ids": 1}
    return {name: np.minimum(x, limits[name]) if name in limits else x for name, x in found.items()}


def family(path: Path) -> str:
    return path.stem.split("-")[0]


def signature(g: Graph) -> Counter:
    """Counts of the operators that make floats, outside mask and position arithmetic."""
    g.infer_shapes()
    made = (n for n in g.nodes() if n.op_type not in SIDE and n.outputs[0].dtype == ir.DataType.FLOAT)
    return Counter(n.op_type for n in made)


@pytest.fixture(params=FILES, ids=lambda p: p.stem, scope="module")
def pair(request) -> tuple[Path, Graph, Graph]:
    source = load(request.param)
    raised = load(request.param)
    canonicalize(raised)
    return request.param, source, raised


def test_everything_is_raised(pair):
    path, _, raised = pair
    layers = blocks.layers(raised)
    assert raised.declined == []
    assert list(sites(raised)) == []
    assert [len(layer.attentions) for layer in layers] == [1, 1]
    assert all(layer.mlp is not None for layer in layers)
    assert len(blocks.norms(raised)) == {"qwen3": 9}.get(family(path), 5)
    assert not any(g.op_type in ("Softmax", "Gemm", "Split", "Erf", "IsNaN") for g in raised.nodes())
    assert all(len(a.node.inputs[0].shape or (0, 0, 0)) == 3 for a in blocks.attentions(raised))
    assert raised.opset == 23
    raised.verify()


def test_outputs_are_equal_where_a_row_sees_a_key(pair):
    path, source, raised = pair
    causal = family(path) in ("llama", "gpt2", "qwen3")
    with Session(source) as before, Session(raised) as after:
        for batch, sequence, padding in SHAPES:
            x = feeds(source, batch, sequence, padding)
            try:
                want = before.run(x)
            except OnnxcompError:  # torch's own opset 23 Llama runs at batch 1 only; raising repairs it
                assert path.stem == "llama-sdpa-23"
                assert batch > 1
                want = {}
            got = after.run(x)
            seen = (np.cumsum(x["attention_mask"], 1) > 0)[..., None] if causal else True
            for name, a in want.items():
                assert np.max(np.abs(a - got[name]) * seen) <= 2e-6 * np.max(np.abs(a))


def test_raising_again_edits_nothing(pair):
    again = pair[2].clone()
    canonicalize(again)
    assert again.edits == 0


@pytest.mark.parametrize("name", sorted({family(p) for p in FILES}))
def test_exports_of_one_model_end_with_one_signature(name):
    found = {}
    for path in FILES:
        if family(path) == name:
            g = load(path)
            canonicalize(g)
            found[path.stem] = signature(g)
    assert len({tuple(sorted(s.items())) for s in found.values()}) == 1, found


def test_a_mask_that_allows_everything_is_dropped():
    g = load(Path(__file__).parent / "graphs" / "vit-sdpa-18.onnx")
    canonicalize(g)
    assert all(a.mask is None for a in blocks.attentions(g))


def test_masks_are_bool_and_shared(pair):
    path, _, raised = pair
    masks = {a.mask for a in blocks.attentions(raised)}
    assert len(masks) == 1
    mask = masks.pop()
    assert (mask is None) == (family(path) == "vit")


def test_rotary_repairs_torchs_own_operator():
    g = load(Path(__file__).parent / "graphs" / "llama-sdpa-23.onnx")
    x = feeds(g, 2, 5, "none")
    with Session(g) as s, pytest.raises(OnnxcompError):
        s.run(x)
    canonicalize(g)
    with Session(g) as s:
        assert s.run(x)["logits"].shape == (2, 5, 40)


def test_the_interface_stays_as_declared():
    """The way up to the new operator set infers shapes; symbols that an exporter made up stay symbols."""
    g = load(Path(__file__).parent / "graphs" / "bert-legacy-14.onnx")
    g.model.graph.outputs[0].shape = ir.Shape(["batch", "made_up_1", "made_up_2"])
    g.interface = checks.interface(g.model.graph)
    canonicalize(g)
    assert checks.interface(g.model.graph) == g.interface
