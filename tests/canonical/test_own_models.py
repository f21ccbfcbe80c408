"""A user's own PyTorch modules, of no model family: everything raised, equal outputs, one form of both exporters."""

import io
import warnings

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import torch

from onnxcomp import blocks
from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests.matrix import signature

pytestmark = [pytest.mark.export, pytest.mark.no_cover]  # raising is counted on smaller graphs
nn, F = torch.nn, torch.nn.functional
B, S, H, HEADS, FF = 2, 6, 16, 4, 24


class Residual(nn.Module):
    """Pre-norm layer around an attention module."""

    def __init__(self, attention, activation=F.gelu):
        super().__init__()
        self.attention, self.activation = attention, activation
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, FF), nn.Linear(FF, H)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class PackedAttention(nn.Module):
    """As in timm: one linear, cut by reshape, permute and unbind."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, H)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, HEADS, H // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        p = (q * (H // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(b, s, H))


class SplitAttention(nn.Module):
    """As in nanoGPT: one linear, split in the last axis, under a causal mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)
        self.register_buffer("bias", torch.tril(torch.ones(S * 4, S * 4)).view(1, 1, S * 4, S * 4))

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, HEADS, H // HEADS).transpose(1, 2) for t in self.qkv(x).split(H, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / (H // HEADS) ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :s, :s] == 0, float("-inf"))
        return self.out((F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(b, s, H))


class EinsumPerHead(nn.Module):
    """As in a JAX port: heads stay in the third axis, the products turn them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (HEADS, H // HEADS)) for p in (self.q, self.k, self.v))
        p = torch.einsum("bqnh,bknh->bnqk", q * (H // HEADS) ** -0.5, k).softmax(-1)
        return self.out(torch.einsum("bnqk,bknh->bqnh", p, v).flatten(-2))


class Multihead(nn.Module):
    """torch's own module, its packed projection and its products of three axes."""

    def __init__(self, weights):
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(H, HEADS, batch_first=True), weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.weights)[0]


def torch_encoder(norm_first=True, batch_first=True):
    layer = nn.TransformerEncoderLayer(
        H, HEADS, FF, dropout=0.0, activation="gelu", norm_first=norm_first, batch_first=batch_first
    )
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


# Three layers of different kinds in one module each, since an export takes ten seconds whatever it holds.
MODELS = {
    "own": lambda: nn.Sequential(
        Residual(PackedAttention()),
        Residual(EinsumPerHead()),
        Residual(SplitAttention(), lambda x: F.gelu(x, approximate="tanh")),
    ),
    "torch": lambda: nn.Sequential(
        Residual(Multihead(weights=True)), torch_encoder(norm_first=False), torch_encoder(batch_first=False)
    ),
}


def made(name: str):
    """The module with distinct random weights, biases and gains included."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, float(p.detach().mean().round()), 0.1)
    return model


def exports(name: str):
    """Two exporters; the legacy one bakes the sequence into torch's own module, so that graph is no witness."""
    return (("dynamo", 18),) if name == "torch" else (("dynamo", 18), ("legacy", 17))


def exported(model, route: str, opset: int) -> Graph:
    """The ONNX graph of a module of one input `[batch, sequence, H]`, both axes open."""
    x = torch.randn(B, S, H)
    torch.backends.mha.set_fastpath_enabled(False)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if route == "legacy":
            axes = {"x": {0: "batch", 1: "sequence"}, "y": {0: "batch", 1: "sequence"}}
            names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
            torch.onnx.export(model, (x,), out, dynamo=False, opset_version=opset, **names)
        else:
            open_axes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
            names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": open_axes, "verbose": False}
            torch.onnx.export(model, (x,), dynamo=True, opset_version=opset, **names).save(out)
    return Graph(ir.from_proto(onnx.load_from_string(out.getvalue())))


@pytest.mark.parametrize("name", MODELS)
def test_a_users_own_model(name):
    model = made(name)
    signatures = {}
    for route, opset in exports(name):
        g = exported(model, route, opset)
        canonicalize(g)
        assert g.declined == []
        assert (len(blocks.attentions(g)), len(blocks.mlps(g)), len(blocks.norms(g))) == (3, 3, 6), (route, opset)
        again = g.clone()
        canonicalize(again)
        assert again.edits == 0
        with Session(g) as s:
            for shape in ((B, S, H), (3, 9, H), (1, 1, H)):
                x = np.random.default_rng(0).standard_normal(shape, np.float32)
                with torch.no_grad():
                    want = model(torch.from_numpy(x)).numpy()
                assert np.max(np.abs(s.run({"x": x})["y"] - want)) <= 3e-6 * np.max(np.abs(want))
        signatures[route, opset] = signature(g)
    assert len({tuple(sorted(s.items())) for s in signatures.values()}) == 1, signatures
