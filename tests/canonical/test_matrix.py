"""Recognition over architecture x spelling, on the diagonal kept in tests/graphs; `tools/coverage` judges all of it."""

import functools
import json

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import interface
from onnxcomp.runtime.sessions import Session
from tests import matrix, zoo

pytestmark = pytest.mark.no_cover  # the same code runs on smaller graphs elsewhere; counting its lines takes time
KEPT = zoo.kept()


@functools.cache
def cell(name: str) -> matrix.Cell:
    return matrix.judge(KEPT[name][0], name)


def raised(name: str):
    return once_raised(name).clone()


@functools.lru_cache(maxsize=16)
def once_raised(name: str):
    g = matrix.load(name)
    canonicalize(g)
    return g


def test_the_kept_graphs_hold_every_architecture_and_every_spelling():
    assert {p.name.removesuffix(".onnx.gz") for p in zoo.GRAPHS.iterdir()} == set(KEPT)
    assert {a.name for a, _ in KEPT.values()} == set(zoo.BY_NAME)
    unmakeable = {"legacy-sdpa-13"}  # scaled_dot_product_attention starts at opset 14 there
    assert {str(s) for _, s in KEPT.values()} == set(zoo.SPELLINGS) - unmakeable
    assert all(sum(fits(s) for fits in zoo.GROUPS.values()) == 1 for s in zoo.SPELLINGS.values())


@pytest.mark.parametrize("name", KEPT)
def test_everything_is_raised(name):
    assert (cell(name).status, cell(name).why) == ("raised", "")


@pytest.mark.parametrize("name", KEPT)
def test_outputs_are_equal_and_raising_again_edits_nothing(name):
    found = cell(name)
    assert found.faults == []
    assert found.compared or name == "llama.dynamo-sdpa-23"
    assert found.difference <= matrix.tolerance(matrix.load(name))


@pytest.mark.parametrize("architecture", [a for a in zoo.DIAGONAL if len(zoo.DIAGONAL[a].split()) > 1])
def test_exports_of_one_model_end_with_one_signature(architecture):
    names = [n for n, (a, _) in KEPT.items() if a.name == architecture and cell(n).status == "raised"]
    found = {json.dumps(cell(n).signature): n for n in names}
    assert len(found) <= 1, found


@pytest.mark.parametrize("name", ["bert.dynamo-eager-18", "llama.dynamo-eager-18", "vit.dynamo-sdpa-18"])
def test_in_double_precision_only_the_rounding_of_fp32_constants_is_left(name):
    a = KEPT[name][0]
    source, new = (matrix.retyped(g, matrix.DOUBLE) for g in (matrix.load(name), raised(name)))
    x = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in zoo.feeds(a, *matrix.SHAPES[0]).items()}
    want, got = (ReferenceEvaluator(matrix.proto(g)).run(None, matrix.taken(g, x)) for g in (source, new))
    for p, q in zip(want, got, strict=True):
        rows = matrix.defined(a, x, p.shape)
        assert p.dtype == q.dtype == np.float64
        assert np.max(np.abs(p - q)[rows]) <= 2e-7 * np.max(np.abs(p[rows]))


# ---- which rows are compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "padding", "hidden"),
    [
        ("bert", "left", 0),
        ("llama", "left", 3),
        ("llama", "right", 0),
        ("mistral", "left", 3),
        ("mistral", "right", 0),
        ("modernbert", "left", 1),
        ("deberta-v2", "right", 3),
    ],
)
def test_rows_without_keys_are_left_out(name, padding, hidden):
    """Of 9 positions 3 are padding: a causal row before the first key sees none, a window may miss all of them."""
    seen = matrix.visible(zoo.BY_NAME[name], zoo.feeds(zoo.BY_NAME[name], 2, 9, padding))
    assert seen.shape == (2, 9)
    assert seen[0].all()
    assert (~seen[1]).sum() == hidden


def test_a_decoder_behind_an_encoder_always_sees_keys():
    t5 = zoo.BY_NAME["t5"]
    assert matrix.visible(t5, zoo.feeds(t5, 2, 9, "left")) is None


def test_only_a_norm_of_parameters_may_have_been_computed_beforehand():
    a, g = zoo.BY_NAME["deberta-v2"], raised("deberta-v2.dynamo-eager-22")
    fixed, *others = sorted(blocks.norms(g), key=lambda n: not g.is_constant(n.input))
    assert (len(others), matrix.folded(a, g)) == (5, 0)
    g.replace(others[0].output, others[0].input)
    g.sweep()
    assert (matrix.folded(a, g), matrix.counts(g)[2]) == (0, 5)
    g.replace(fixed.output, g.constant(g.array(fixed.input)))
    g.sweep()
    assert matrix.folded(a, g) == 1
    assert {b.name for b in zoo.ALL if b.constant_norms} == {"deberta-v2"}


# ---- masks and operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in KEPT if n.split(".")[0] in ("bert", "llama", "gpt2", "qwen3", "vit")])
def test_masks_are_bool_and_shared(name):
    g = raised(name)
    masks = {a.mask for a in blocks.attentions(g)}
    assert len(masks) == 1
    assert (masks.pop() is None) == name.startswith("vit")


def test_rotary_repairs_torchs_own_operator():
    name = "llama.dynamo-sdpa-23"
    source, new, x = matrix.load(name), raised(name), zoo.feeds(zoo.BY_NAME["llama"], 2, 5)
    with Session(source) as s, pytest.raises(OnnxcompError):
        s.run(x)
    with Session(new) as s:
        assert s.run(x)["logits"].shape == (2, 5, zoo.VOCAB)


def test_the_interface_stays_as_declared():
    """The way up to the new operator set infers shapes; symbols that an exporter made up stay symbols."""
    g = matrix.load("bert.legacy-sdpa-14")
    g.model.graph.outputs[0].shape = ir.Shape(["batch", "made_up_1", "made_up_2"])
    g.interface = interface.interface(g.model.graph)
    canonicalize(g)
    assert interface.interface(g.model.graph) == g.interface


# ---- what the zoo declares, against PyTorch --------------------------------------------------------------------------


CALLS = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")


class Counted:
    """Attention calls and the results of norm modules during one forward pass."""

    def __init__(self, model) -> None:
        import torch

        self.attentions, self.norms, counted = 0, [], self

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                name = getattr(func, "__name__", "")
                counted.attentions += name in (
                    "softmax",
                    "scaled_dot_product_attention",
                    "multi_head_attention_forward",
                )
                return func(*args, **(kwargs or {}))

        self.mode = Mode()
        for module in model.modules():
            if not list(module.children()) and type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
                module.register_forward_hook(lambda _, __, out: self.norms.append(out))


@pytest.mark.export
@pytest.mark.parametrize("name", zoo.BY_NAME)
def test_declared_counts_are_what_pytorch_runs(name):
    """Norms count when the judged output depends on them; a shared layer counts as often as it runs."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    a = zoo.BY_NAME[name]
    model = a.build("eager")
    counted = Counted(model)
    with counted.mode:
        out = model(**{k: torch.from_numpy(v) for k, v in zoo.feeds(a, 2, 9).items()})[a.output]
    reached = torch.autograd.grad(out.sum(), counted.norms, allow_unused=True)
    assert (counted.attentions, sum(x is not None for x in reached)) == (a.attentions, a.norms)
