"""The runtime's fused operators: each written in standard operators equals its kernel, or stays with a reason."""

import itertools
import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize, sites
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.runtime.sessions import Session

RNG = np.random.default_rng(7)
B, S, N, H = 2, 5, 2, 16
D = N * H
CACHES = {"Attention": 5, "MultiHeadAttention": 4, "GroupQueryAttention": 4}  # axes of their present outputs


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i32(*xs) -> np.ndarray:
    return np.array(xs, np.int32)


class Op:
    """One fused operator as a model: arrays are fed (axes named in `open` are dynamic), `Const` ones are stored."""

    def __init__(self, op, inputs, outputs=1, domain=CONTRIB, opset=18, dims=None, **attrs):
        self.feeds = {}
        dims = dims or {}
        values, args, stored = [], [], []
        for i, x in enumerate(inputs):
            if x is None:
                args.append(None)
            elif isinstance(x, tuple):  # stored
                v = ir.Value(name=f"c{i}", const_value=ir.tensor(x[0], name=f"c{i}"))
                v.type, v.shape = ir.TensorType(v.const_value.dtype), ir.Shape(x[0].shape)
                stored.append(v)
                args.append(v)
            else:
                shape = dims.get(
                    i,
                    [
                        "batch" if a == 0 and n == B else f"s{n}" if a == 1 and x.ndim > 1 else n
                        for a, n in enumerate(x.shape)
                    ],
                )
                v = ir.Value(name=f"x{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.from_numpy(x.dtype)))
                values.append(v)
                args.append(v)
                self.feeds[f"x{i}"] = x
        node = ir.node(
            op,
            args,
            {k: a for k, a in attrs.items() if a is not None},
            domain=domain,
            num_outputs=outputs,
            name="fused",
        )
        first = next(iter(self.feeds.values()))
        for i, v in enumerate(node.outputs):
            embeds = op == "EmbedLayerNormalization"
            dtype = (np.int32 if i == 1 else np.float32) if embeds else first.dtype
            rank = (
                (1 if i == 1 else 3)
                if embeds
                else CACHES.get(op, first.ndim)
                if i
                else 3
                if op in CACHES
                else first.ndim
            )
            v.name, v.type = f"y{i}", ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            v.shape = ir.Shape([f"y{i}.{a}" for a in range(rank)])
        graph = ir.Graph(
            values, node.outputs, nodes=[node], initializers=stored, opset_imports={"": opset, CONTRIB: 1}, name="one"
        )
        self.graph = Graph(ir.Model(graph, ir_version=10))

    def raised(self, **options) -> Graph:
        g = self.graph.clone()
        canonicalize(g, **options)
        again = g.clone()
        canonicalize(again, **options)
        assert again.edits == 0
        return g

    def check(self, *skip: int, rows=None, tolerance=2e-6) -> Graph:
        """The canonical form, proved free of fused operators and equal to the kernel."""
        g = self.raised()
        assert not g.declined
        assert not [n.op_type for n in g.nodes() if n.domain]
        with Session(self.graph) as a, Session(g) as b:
            want, have = a.run(self.feeds), b.run(self.feeds)
        for i, name in enumerate(want):
            x, y = want[name].astype(np.float64), have[name].astype(np.float64)
            assert x.shape == y.shape
            if rows is not None and i == 0:
                x, y = x * rows, y * rows
            if i not in skip:
                assert np.abs(x - y).max() <= tolerance * max(np.abs(x).max(), 1)
        return g

    def stays(self, why: str, **options) -> None:
        """Left exactly as it is, as a site with this reason."""
        g = self.raised(**options)
        assert [n.op_type for n in g.nodes() if n.domain == CONTRIB] == [n.op_type for n in self.graph.nodes()]
        assert why in " ".join(d.why for d in g.declined)
        assert {s.name for s in sites(g)} == {d.site for d in g.declined}


def ops(g: Graph) -> Counter:
    return Counter(n.op_type for n in g.nodes())


# ---- norms, activations, products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.parametrize("total", [False, True])
def test_skip_norms(simple, biased, epsilon, total):
    name = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
    rows = [(1 + 0.1 * f32(8),), *([] if simple else [(f32(8),)]), *([(f32(8),)] if biased else [])]
    op = Op(name, [f32(B, S, 8) * 1e-2, f32(B, S, 8) * 1e-2, *rows], 4 if total else 1, epsilon=epsilon)
    # Mean and deviation, between the two outputs that are read, have no reader.
    if total:
        del op.graph.model.graph.outputs[1:3]
        op.graph = Graph(op.graph.model)
    g = op.check()
    assert ops(g)["RMSNormalization" if simple else "LayerNormalization"] == 1


def test_skip_norm_broadcasts_and_its_statistics_are_not_invented():
    gain, shift = (f32(8),), (f32(8),)
    Op("SkipLayerNormalization", [f32(B, S, 8), f32(S, 8), gain, shift], dims={1: [S, 8]}).check()
    op = Op("SkipLayerNormalization", [f32(B, S, 8), f32(B, S, 8), gain, shift], 3)
    del op.graph.model.graph.outputs[1]
    op.graph = Graph(op.graph.model)
    op.stays("its output 2 is used")


@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("opset", [11, 14, 18])
def test_norms_that_the_runtime_writes_into_the_standard_domain(op, opset):
    inputs = [f32(B, S, 8), (f32(8),), *([(f32(8),)] if op == "LayerNormalization" else [])]
    model = Op(op, inputs, domain="", opset=opset, axis=-1, epsilon=1e-6)
    g = model.check()
    assert g.opset == 23


@pytest.mark.parametrize(("segments", "places", "mask"), [*itertools.product([False, True], repeat=3)])
def test_embeddings(segments, places, mask):
    ids = RNG.integers(0, 9, (B, S)).astype(np.int32)
    kinds = RNG.integers(0, 2, (B, S)).astype(np.int32) if segments else None
    given = (RNG.random((B, S)) > 0.4).astype(np.int32) if mask else None
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(S)[::-1], (B, S))).astype(np.int32) if places else None
    tables = [(f32(9, 8),), (f32(12, 8),), (f32(2, 8),) if segments else None, (f32(8),), (f32(8),)]
    op = Op("EmbedLayerNormalization", [ids, kinds, *tables, given, positions], 2, epsilon=1e-5)
    if not mask:
        op.stays("no mask is given")
        del op.graph.model.graph.outputs[1]
        op.graph = Graph(op.graph.model)
    g = op.check()
    assert ops(g)["Gather"] == 3 if segments else 2


def test_activations():
    x = 3 * f32(B, S, 8)
    assert ops(Op("Gelu", [x]).check())["Gelu"] == 1
    assert ops(Op("BiasGelu", [x, (f32(8),)]).check()) == {"Add": 1, "Gelu": 1}
    g = Op("FastGelu", [x, (f32(8),)]).check()
    assert next(g.nodes("Gelu")).attributes.get_string("approximate") == "tanh"
    assert ops(Op("FastGelu", [x]).check()) == {"Gelu": 1}
    assert ops(Op("QuickGelu", [x]).check()) == {"Mul": 2, "Sigmoid": 1}
    assert ops(Op("QuickGelu", [x], alpha=1.0).check()) == {"Mul": 1, "Sigmoid": 1}


def numpy_of(op: Op, feeds: dict) -> np.ndarray:
    g = op.raised()
    assert not g.declined
    assert not [n for n in g.nodes() if n.domain]
    with Session(g) as s:
        return s.run(feeds)["y0"]


def gelu(x: np.ndarray, tanh: bool = False) -> np.ndarray:
    if tanh:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_operators_without_a_cpu_kernel_equal_their_documentation():
    x, bias, skip, w = f32(B, S, 8), f32(8), f32(B, S, 8), f32(8, 6)
    y = numpy_of(Op("BiasAdd", [x, (bias,), skip]), {"x0": x, "x2": skip})
    np.testing.assert_allclose(y, x + bias + skip, atol=1e-6)
    y = numpy_of(Op("BiasSplitGelu", [x, (bias,)]), {"x0": x})
    np.testing.assert_allclose(y, (x + bias)[..., :4] * gelu((x + bias)[..., 4:]), atol=1e-6)
    y = numpy_of(Op("GemmFastGelu", [x, (w,), (f32(6) * 0,)]), {"x0": x})
    np.testing.assert_allclose(y, gelu(x @ w, tanh=True), atol=1e-5)
    scores, add = f32(B, 3, S, S), f32(B, 1, 1, S)
    e = np.exp(scores + add)
    op = Op("BiasSoftmax", [scores, add], axis=3, is_inner_broadcast=1, dims={0: [B, 3, S, S], 1: [B, 1, 1, S]})
    g = op.graph.clone()
    canonicalize(g)
    with Session(g) as s:
        np.testing.assert_allclose(s.run(op.feeds)["y0"], e / e.sum(-1, keepdims=True), atol=1e-6)
    Op("BiasSoftmax", [scores, add], axis=2, is_inner_broadcast=1).stays("softmax is not over the last axis")


@pytest.mark.parametrize(("a", "b", "alpha"), [*itertools.product([0, 1], [0, 1], [None, 0.25])])
def test_fused_products(a, b, alpha):
    x, w = (f32(B, 4, S) if a else f32(B, S, 4)), (f32(6, 4) if b else f32(4, 6))
    g = Op("FusedMatMul", [x, (w,)], transA=a or None, transB=b or None, alpha=alpha).check()
    assert ops(g)["MatMul"] == 1
    y = f32(B, 3, 6, 4) if b else f32(B, 3, 4, 6)
    x = f32(B, 3, 4, S) if a else f32(B, 3, S, 4)
    Op(
        "FusedMatMul",
        [x, y],
        transA=a or None,
        transB=b or None,
        alpha=alpha,
        dims={0: ["batch", 3, *x.shape[2:]], 1: ["batch", 3, *y.shape[2:]]},
    ).check()


@pytest.mark.parametrize(("a", "b"), [*itertools.product([0, 1], [0, 1])])
def test_fused_products_that_move_the_first_axis(a, b):
    x, w = (f32(5, B, 4, S) if a else f32(S, B, 4, 5)), (f32(6, B, 4, 5) if b else f32(5, B, 4, 6))
    dims = {0: [*x.shape], 1: [*w.shape]}
    Op("FusedMatMul", [x, w], transBatchA=1, transBatchB=1, transA=a, transB=b, alpha=0.5, dims=dims).check()


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Tanh", "Softplus"])
def test_fused_gemm(activation):
    g = Op("FusedGemm", [f32(B, 4), (f32(6, 4),), (f32(6),)], transB=1, activation=activation).check()
    assert ops(g) == {"MatMul": 1, "Add": 1, activation: 1}
    # The runtime takes no slope as its default, so only the reading of a written one can be compared.
    g = Op(
        "FusedGemm", [f32(B, 4), (f32(6, 4),), (f32(6),)], transB=1, activation="LeakyRelu", activation_alpha=0.2
    ).check()
    assert ops(g)["LeakyRelu"] == 1
    Op("FusedGemm", [f32(B, 4), (f32(4, 6),)], activation="Selu").stays("activation Selu")


@pytest.mark.parametrize("op", ["MatMulNBits", "QAttention", "PackedAttention"])
def test_operators_of_other_tools_are_left_with_a_reason(op):
    x = f32(B, S, 16)
    packed = RNG.integers(0, 255, (6, 1, 8)).astype(np.uint8)
    inputs = {"MatMulNBits": [x, (packed,), (f32(6, 1),)], "QAttention": [x, (f32(16, 48),)]}.get(op, [x])
    sizes = {"K": 16, "N": 6, "bits": 4, "block_size": 16} if op == "MatMulNBits" else {"num_heads": 2}
    Op(op, inputs, **sizes).stays(
        "stay as they were written" if op != "PackedAttention" else "it has no exact standard form"
    )


# ---- attention -------------------------------------------------------------------------------------------------------

CAUSAL = np.arange(S)[None] <= np.arange(S)[:, None]
KEYS = np.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]], np.int32)
ROWS = (RNG.random((B, S, S)) > 0.3).astype(np.int32)
ROWS[:, :, 0] = 1
MASKS = {"none": None, "lengths": i32(3, 5), "keys": KEYS, "rows": ROWS}


def see(kind: str, causal: int) -> np.ndarray:
    """`[b, s, 1]`: rows that see a key."""
    seen = {"keys": KEYS[:, None] > 0, "rows": ROWS > 0}.get(kind, np.ones((B, 1, S), bool))
    return np.broadcast_to((seen & CAUSAL) if causal else seen, (B, S, S)).any(-1, keepdims=True)


def open_axes(kind: str) -> list:
    return {"lengths": ["batch"], "keys": ["batch", "seq"], "rows": ["batch", "seq", "seq"]}.get(kind, [])


@pytest.mark.parametrize("kind", [*MASKS, "spans"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_attention(kind, causal, bias):
    mask = i32(4, 5, 1, 2) if kind == "spans" else MASKS[kind]
    dims = {0: ["batch", "seq", 6], 3: open_axes(kind), 5: [1, N, "seq", "seq"]}
    if kind == "spans":
        dims = {0: [B, S, 6], 3: [2 * B], 5: [1, N, S, S]}
    added = f32(1, N, S, S) if bias else None
    inputs = [f32(B, S, 6), (f32(6, 3 * D),), (f32(3 * D),), mask, None, added]
    rows = see(kind, causal)
    if kind == "spans":
        inside = np.arange(S)[None] >= np.array([[1], [2]])
        rows = np.broadcast_to(inside[:, None] & (CAUSAL if causal else True), (B, S, S)).any(-1, keepdims=True)
    op = Op("Attention", inputs, num_heads=N, unidirectional=causal, scale=0.3 if bias else None, dims=dims)
    g = op.check(rows=rows)
    assert ops(g)["Attention"] == 1
    assert ops(g)["MatMul"] == 3
    if kind not in ("none", "spans"):
        op.stays("rows without visible keys would change", exact_rows=True)


def test_packed_attention_with_other_value_width_soft_masks_and_no_bias():
    x = f32(B, S, 6)
    Op(
        "Attention",
        [x, (f32(6, 2 * D + 8),), (f32(2 * D + 8),)],
        num_heads=N,
        qkv_hidden_sizes=[D, D, 8],
        dims={0: ["b", "s", 6]},
    ).check()
    Op(
        "Attention",
        [x, (f32(6, 3 * D),), None, KEYS],
        num_heads=N,
        mask_filter_value=-3.0,
        dims={0: ["b", "s", 6], 3: ["b", "s"]},
    ).check()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("kind", ["none", "keys"])
def test_packed_attention_with_cache(causal, kind):
    mask = (RNG.random((B, S + 4)) > 0.3).astype(np.int32) if kind == "keys" else None
    if mask is not None:
        mask[:, 0] = 1
    dims = {0: ["b", "s", 6], 3: ["b", "t"], 4: [2, "b", N, "p", H]}
    inputs = [f32(B, S, 6), (f32(6, 3 * D),), (f32(3 * D),), mask, f32(2, B, N, 4, H)]
    g = Op("Attention", inputs, 2, num_heads=N, unidirectional=causal, dims=dims).raised()
    assert not [n for n in g.nodes() if n.domain]
    source = Op("Attention", inputs, 2, num_heads=N, unidirectional=causal, dims=dims)
    g = source.raised()
    with Session(source.graph) as a, Session(g) as b:
        for x, y in zip(a.run(source.feeds).values(), b.run(source.feeds).values(), strict=True):
            np.testing.assert_allclose(x, y, atol=3e-6)


def test_packed_attention_that_stays():
    x, w = f32(B, S, 6), (f32(6, 3 * D),)
    dims = {0: ["b", "s", 6]}
    Op("Attention", [x, w], num_heads=N, do_rotary=1, dims=dims).stays("applies a rotary embedding")
    Op("Attention", [x, w], num_heads=5, dims=dims).stays("do not fit its heads")
    Op("Attention", [x, w, None, np.ones((B, 1, 8, 8), np.int32)], num_heads=N, dims=dims).stays("4 axes")
    Op("Attention", [x, w, None, i32(3, 5, 1)], num_heads=N, dims=dims | {3: ["k"]}).stays("hold lengths")


@pytest.mark.parametrize("kind", list(MASKS))
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("added", [None, (1, 1), (1, N), (B, N)])
def test_multi_head_attention(kind, causal, added):
    x = ["batch", "seq", D]
    dims = {
        0: x,
        1: x,
        2: x,
        4: open_axes(kind),
        5: ["batch" if added == (B, N) else 1, added[1] if added else 1, "seq", "seq"],
    }
    bias = f32(*added, S, S) if added else None
    inputs = [f32(B, S, D), f32(B, S, D), f32(B, S, D), None, MASKS[kind], bias]
    g = Op("MultiHeadAttention", inputs, num_heads=N, unidirectional=causal, dims=dims).check(rows=see(kind, causal))
    assert ops(g)["Attention"] == 1


def packed(*parts: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.stack([x.reshape(B, -1, N, H) for x in parts], 3))


def test_multi_head_attention_with_biases_and_packed_or_split_inputs():
    q, k, v, bias = f32(B, 3, D), f32(B, S, D), f32(B, S, D), f32(3 * D)
    three = {0: ["b", "q", D], 1: ["b", "k", D], 2: ["b", "k", D]}
    Op("MultiHeadAttention", [q, k, v, (bias,)], num_heads=N, dims=three, scale=0.4).check()
    Op("MultiHeadAttention", [q, k, v, bias], num_heads=N, dims=three).check()
    bias[D : 2 * D] = 0
    g = Op("MultiHeadAttention", [q, k, v, (bias,)], num_heads=N, dims=three).check()
    assert ops(g)["Add"] == 2
    heads = [np.ascontiguousarray(x.reshape(B, S, N, H).transpose(0, 2, 1, 3)) for x in (k, v)]
    four = {0: ["b", "q", D], 1: ["b", N, "k", H], 2: ["b", N, "k", H]}
    Op("MultiHeadAttention", [q, *heads, (bias,)], num_heads=N, dims=four).check()
    # No CPU kernel takes packed inputs: equal to the same attention with separate ones.
    with Session(Op("MultiHeadAttention", [q, k, v], num_heads=N, dims=three).graph) as s:
        want = s.run({"x0": q, "x1": k, "x2": v})["y0"]
    op = Op("MultiHeadAttention", [q, packed(k, v)], num_heads=N, dims={0: ["b", "q", D], 1: ["b", "k", N, 2, H]})
    np.testing.assert_allclose(numpy_of(op, op.feeds), want, atol=2e-6)
    with Session(
        Op("MultiHeadAttention", [k, k, v], num_heads=N, dims={i: ["b", "k", D] for i in range(3)}).graph
    ) as s:
        want = s.run({"x0": k, "x1": k, "x2": v})["y0"]
    op = Op("MultiHeadAttention", [packed(k, k, v)], num_heads=N, dims={0: ["b", "k", N, 3, H]})
    np.testing.assert_allclose(numpy_of(op, op.feeds), want, atol=2e-6)


@pytest.mark.parametrize("causal", [0, 1])
def test_multi_head_attention_with_cache(causal):
    x, p = ["b", "s", D], ["b", N, "p", H]
    inputs = [f32(B, S, D), f32(B, S, D), f32(B, S, D), None, None, None, f32(B, N, 4, H), f32(B, N, 4, H)]
    op = Op("MultiHeadAttention", inputs, 3, num_heads=N, unidirectional=causal, dims={0: x, 1: x, 2: x, 6: p, 7: p})
    g = op.raised()
    assert not [n for n in g.nodes() if n.domain]
    with Session(op.graph) as a, Session(g) as b:
        for want, have in zip(a.run(op.feeds).values(), b.run(op.feeds).values(), strict=True):
            np.testing.assert_allclose(want, have, atol=2e-6)
    Op("MultiHeadAttention", inputs[:3], 3, num_heads=N, dims={0: x, 1: x, 2: x}).check()


def test_multi_head_attention_that_stays():
    q, k = f32(B, 3, D), f32(B, S, D)
    dims = {0: ["b", "q", D], 1: ["b", "k", D], 2: ["b", "k", D]}
    Op("MultiHeadAttention", [q, k, k], num_heads=N, unidirectional=1, dims=dims).stays(
        "possibly more keys than queries"
    )
    index = [q, k, k, None, i32(*range(3 * B + 2))]
    Op("MultiHeadAttention", index, num_heads=N, dims=dims | {4: [3 * B + 2]}).stays("hold lengths")


@pytest.mark.parametrize("rotary", ["no", "half", "interleaved"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("groups", "form"), [(1, "plain"), (2, "packed"), (1, "bias"), (2, "softcap")])
def test_grouped_attention(rotary, window, groups, form):
    q, k, v = f32(B, S, D), f32(B, S, groups * H), f32(B, S, groups * H)
    parts = [np.concatenate([q, k, v], -1), None, None] if form == "packed" else [q, k, v]
    tables = [(f32(9, H // 2),), (f32(9, H // 2),)] if rotary != "no" else [None, None]
    bias = f32(1, N, S, S) if form == "bias" else None
    inputs = [*parts, None, None, i32(2, S - 1), np.array(S, np.int32), *tables, None, bias]
    dims = {i: ["batch", "seq", x.shape[-1]] for i, x in enumerate(parts) if x is not None}
    dims |= {5: ["batch"], 6: [], 10: [1, N, "seq", "seq"]}
    options = {"do_rotary": int(rotary != "no"), "rotary_interleaved": int(rotary == "interleaved")}
    options |= {"local_window_size": window, "softcap": 2.0 if form == "softcap" else None}
    op = Op("GroupQueryAttention", inputs, 3, num_heads=N, kv_num_heads=groups, dims=dims, **options)
    del op.graph.model.graph.outputs[2]
    op.graph = Graph(op.graph.model)
    g = op.check(rows=(np.arange(S) < np.array([[3], [S]]))[..., None])
    assert ops(g)["Attention"] == 1
    assert ops(g)["RotaryEmbedding"] == (0 if rotary == "no" else 2)


def test_grouped_attention_that_stays():
    x = ["batch", "seq", D]
    q, past = f32(1, 1, D), f32(1, N, 4, H)
    tail = [i32(4), np.array(5, np.int32)]
    dims = {0: x, 1: x, 2: x, 3: ["batch", N, "p", H], 4: ["batch", N, "p", H], 5: ["batch"], 6: []}
    op = Op("GroupQueryAttention", [q, q, q, past, past, *tail], 3, num_heads=N, kv_num_heads=N, dims=dims)
    op.stays("past keys whose place depends on the lengths")
    free = [q, q, q, None, None, *tail]
    op = Op("GroupQueryAttention", free, 3, num_heads=N, kv_num_heads=N, smooth_softmax=1, dims=dims)
    op.stays("softmax is smoothed")


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("places", ["from", "each"])
@pytest.mark.parametrize("part", [None, 8])
def test_rotary(rank, interleaved, places, part):
    x = f32(B, S, D) if rank == 3 else f32(B, N, S, H)
    width = (part or H) // 2
    where = np.array([2], np.int64) if places == "from" else RNG.integers(0, 9, (B, S))
    dims = {0: ["b", "s", D] if rank == 3 else ["b", N, "s", H], 1: [1] if places == "from" else ["b", "s"]}
    attrs = {"interleaved": interleaved, "rotary_embedding_dim": part, "num_heads": N if part else None}
    g = Op("RotaryEmbedding", [x, where, (f32(9, width),), (f32(9, width),)], dims=dims, **attrs).check()
    assert ops(g)["RotaryEmbedding"] == 1


def test_rotary_that_stays():
    inputs = [f32(B, S, D), np.array([0], np.int64), (f32(9, H // 2),), (f32(9, H // 2),)]
    Op("RotaryEmbedding", inputs, scale=2.0).stays("it scales")
