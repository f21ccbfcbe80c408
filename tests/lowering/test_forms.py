"""Every form of every kind of site is equal to the standard one, run by ONNX Runtime; illegal ones say why."""

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.canonical import canonicalize
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering import mask_kinds
from onnxcomp.lowering.forms import KINDS, Context, default, legal
from onnxcomp.passes.window_attention import WindowAttention
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny
from tests.hand import f32, graph, i64, ops, optimized, weight

B, S, H, N, D, PAST = 2, 7, 32, 4, 8, 5
RNG = np.random.default_rng(3)
GAIN, BETA = f32(1 + 0.1 * RNG.standard_normal(H)), f32(0.1 * RNG.standard_normal(H))


def data(*shape: int) -> np.ndarray:
    return f32(RNG.standard_normal(shape))


# ---- graphs with one site each; `(graph, feeds, what is known of masks)` ---------------------------------------------


def linear(g: Graph, x: ir.Value, width: int = H, bias: bool = True, op: str = "Add") -> ir.Value:
    y = g.op("MatMul", x, weight(H, width))
    return g.op(op, y, f32(0.3 * RNG.standard_normal(width))) if bias else y


def residual(norm: str, stream: bool = False):
    g = graph(23, x=("b", "s", H), z=("b", "s", H))
    total = g.op("Add", *g.model.graph.inputs)
    args = (total, GAIN, BETA) if norm == "LayerNormalization" else (total, GAIN)
    y = g.op(norm, *args, axis=-1, epsilon=1e-5)
    y = g.op("Add", total, y) if stream else y
    return tiny.finish(g, y, "y", ["b", "s", H]), {"x": data(B, S, H), "z": data(B, S, H)}, {}


def one_linear(rank: int = 3, after: str = ""):
    shape = ("b", "s", H)[3 - rank :]
    g = graph(23, x=shape)
    y = linear(g, g.model.graph.inputs[0], 16)
    if after == "silu":
        y = g.op("Mul", y, g.op("Sigmoid", y))
    elif after == "quick":
        y = g.op("Mul", y, g.op("Sigmoid", g.op("Mul", y, f32(1.702))))
    elif after:
        y = g.op("Gelu", y, approximate=after)
    return tiny.finish(g, y, "y", [*shape[:-1], 16]), {"x": data(B, S, H)[(0,) * (3 - rank)]}, {}


def tied(rank: int = 3, bias: bool = False):
    """A head that reads the embedding table through a Transpose."""
    shape = ("b", "s", H)[3 - rank :]
    g = graph(23, x=shape)
    table = g.constant(weight(H, 40).T.copy(), "table")
    y = g.op("MatMul", g.inputs[0], g.op("Transpose", table, perm=[1, 0]))
    y = g.op("Add", y, f32(RNG.standard_normal(40))) if bias else y
    return tiny.finish(g, y, "y", [*shape[:-1], 40]), {"x": data(B, S, H)[(0,) * (3 - rank)]}, {}


def mask_of(kind: str, s: int = S, t: int = S) -> np.ndarray:
    seen = np.ones((B, 1, s, t), bool)
    if kind.startswith(("causal", "window")):
        seen &= np.tri(s, t, t - s, dtype=bool)
    if kind.startswith("window"):
        seen &= ~np.tri(s, t, t - s - int(kind.split()[1]), dtype=bool)
    if kind in ("padding", "causal+"):
        seen[1, ..., t - 2 :] = False
        seen[1, ..., 0] = True
    return seen


def attention(kind: str, kv: int = N, flat: bool = False, cap: float = 0.0, number: bool = False):
    """An attention behind inputs; `flat` masks are `(b, 1, 1, t)`, `number` ones are floats with -inf."""
    rows = 1 if flat else "s"
    shape = () if kind == "none" else (("b", 1, rows, "s") if number else ("b", 1, rows, "s", bool))
    g = graph(23, q=("b", "s", N * D), k=("b", "s", kv * D), v=("b", "s", kv * D), **({"mask": shape} if shape else {}))
    more = {"softcap": cap} if cap else {}
    y = g.op("Attention", *g.model.graph.inputs, q_num_heads=N, kv_num_heads=kv, scale=D**-0.5, **more)
    feeds = {"q": data(B, S, N * D), "k": data(B, S, kv * D), "v": data(B, S, kv * D)}
    if shape:
        seen = mask_of(kind)[:, :, : 1 if flat else S]
        feeds["mask"] = f32(np.where(seen, 0.5, -np.inf)) if number else seen
    return tiny.finish(g, y, "y", ["b", "s", N * D]), feeds, {"mask": kind}


def cached(s: int, kv: int = N):
    """Attention over a cache of five and `s` new tokens; with it the new cache is returned."""
    shapes = {
        "q": ("b", "s", N * D),
        "k": ("b", "s", kv * D),
        "v": ("b", "s", kv * D),
        "mask": ("b", 1, "s", "t", bool),
    }
    shapes |= {"past_k": ("b", kv, "p", D), "past_v": ("b", kv, "p", D)}
    g = graph(23, **(shapes if s > 1 else {**shapes, "q": ("b", 1, N * D)}))
    y = g.op("Attention", *g.model.graph.inputs, q_num_heads=N, kv_num_heads=kv, scale=D**-0.5, outputs=3)
    for v, name in zip(y.producer().outputs[1:], ("present_k", "present_v"), strict=True):
        v.name, v.type, v.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", kv, "t", D])
        g.model.graph.outputs.append(v)
    feeds = {"q": data(B, s, N * D), "k": data(B, s, kv * D), "v": data(B, s, kv * D)}
    feeds |= {"past_k": data(B, kv, PAST, D), "past_v": data(B, kv, PAST, D)}
    feeds["mask"] = np.broadcast_to(np.tri(s, PAST + s, PAST, dtype=bool), (B, 1, s, PAST + s)).copy()
    feeds["mask"][0, ..., 1] = False
    return tiny.finish(g, y, "y", ["b", "s", N * D]), feeds, {"mask": "causal+" if s > 1 else "padding"}


def projections(bias: bool = True, mask: bool = True):
    g = graph(23, x=("b", "s", H), **({"mask": ("b", 1, "s", "s", bool)} if mask else {}))
    x, *rest = g.model.graph.inputs
    three = [linear(g, x, N * D, bias) for _ in range(3)]
    y = g.op("Attention", *three, *rest, q_num_heads=N, kv_num_heads=N, scale=0.3)
    feeds = {"x": data(B, S, H)} | ({"mask": mask_of("padding")} if mask else {})
    return tiny.finish(g, y, "y", ["b", "s", N * D]), feeds, {"mask": "padding"}


def siblings(bias: bool, quantized: bool = False):
    g = graph(23, x=("b", "s", H))
    x = g.model.graph.inputs[0]
    if not quantized:
        a, b = linear(g, x, 16, bias), linear(g, x, 24, bias)
    else:
        x = through_codes(g, x)
        a, b = (integer(g, x, n, bias) for n in (16, 24))
    y = g.op("Concat", a, b, axis=-1)
    return tiny.finish(g, y, "y", ["b", "s", 40]), {"x": data(B, S, H)}, {}


def coded_siblings(zeros: bool):
    """Codes of 4 bits in blocks of 16 in-channels."""
    g = graph(23, x=("b", "s", H))
    x, parts = g.model.graph.inputs[0], []
    for n in (16, 24):
        codes = RNG.integers(0, 16, (H, n)).astype(ml_dtypes.uint4)
        sides = [f32(RNG.uniform(0.01, 0.1, (H // 16, n)))]
        sides += [RNG.integers(4, 12, (H // 16, n)).astype(ml_dtypes.uint4)] if zeros else []
        parts.append(g.op("MatMul", x, g.op("DequantizeLinear", codes, *sides, axis=0, block_size=16)))
    return tiny.finish(g, g.op("Concat", *parts, axis=-1), "y", ["b", "s", 40]), {"x": data(B, S, H)}, {}


def through_codes(g: Graph, x: ir.Value) -> ir.Value:
    scale, zero = f32(0.03), np.array(121, np.uint8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)


# Codes of at most 64: pairs of them cannot saturate, so that forms are equal on every kind of machine.
def integer(g: Graph, x: ir.Value, n: int, bias: bool) -> ir.Value:
    codes = RNG.integers(-64, 65, (H, n)).astype(np.int8)
    w = g.op("DequantizeLinear", codes, f32(RNG.uniform(0.001, 0.01, n)), axis=1)
    y = g.op("MatMul", x, w)
    return g.op("Add", y, f32(RNG.standard_normal(n))) if bias else y


def quantized(rank: int, bias: bool):
    shape = ("b", "s", H)[3 - rank :]
    g = graph(23, x=shape)
    y = integer(g, through_codes(g, g.model.graph.inputs[0]), 16, bias)
    return tiny.finish(g, y, "y", [*shape[:-1], 16]), {"x": data(B, S, H)[(0,) * (3 - rank)]}, {}


def requantized(rank: int, columns: bool = True):
    """A product on integers whose result is quantized; with `columns` one weight scale each, else by rows."""
    shape = ("b", "s", H)[3 - rank :]
    g = graph(23, x=shape)
    codes, steps = RNG.integers(-64, 65, (H, H)).astype(np.int8), f32(RNG.uniform(0.001, 0.01, H))
    w = g.op("DequantizeLinear", codes, steps, axis=1 if columns else 0)
    y = g.op("MatMul", through_codes(g, g.model.graph.inputs[0]), w)
    scale, zero = f32(0.11), np.array(117, np.uint8)
    y = g.op("DequantizeLinear", g.op("QuantizeLinear", y, scale, zero), scale, zero)
    return tiny.finish(g, y, "y", [*shape[:-1], H]), {"x": data(B, S, H)[(0,) * (3 - rank)]}, {}


def dynamic(bias: bool):
    """Two products behind one run-time quantization."""
    g = graph(23, x=("b", "s", H))
    q = g.op("DynamicQuantizeLinear", g.model.graph.inputs[0], outputs=3).producer()
    parts = []
    for n in (16, 24):
        codes, scale = RNG.integers(-64, 65, (H, n)).astype(np.int8), f32(RNG.uniform(0.001, 0.01, n))
        total = g.op("Cast", g.op("MatMulInteger", q.outputs[0], codes, q.outputs[2]), to=1)
        total.type = ir.TensorType(ir.DataType.FLOAT)
        y = g.op("Mul", total, g.op("Mul", q.outputs[1], scale))
        parts.append(g.op("Add", y, f32(RNG.standard_normal(n))) if bias else y)
    return tiny.finish(g, g.op("Concat", *parts, axis=-1), "y", ["b", "s", 40]), {"x": data(B, S, H)}, {}


def table(rows: bool = True, shared: bool = False):
    """An int8 embedding table with one scale per row or in all; `shared` with a quantized head that reads its codes."""
    g = graph(23, ids=("b", "s", int))
    codes = g.constant(RNG.integers(-64, 65, (40, H)).astype(np.int8), "codes")
    scale = g.constant(f32(RNG.uniform(0.001, 0.01, 40 if rows else ())), "scale")
    shape, kind = ir.Shape(["b", "s", H]), ir.TensorType(ir.DataType.FLOAT)
    x = g.op("Gather", g.op("DequantizeLinear", codes, scale, axis=0 if rows else None), g.inputs[0])
    x.type, x.shape = kind, shape
    if shared:
        w = g.op("DequantizeLinear", g.op("Transpose", codes, perm=[1, 0]), scale, axis=1 if rows else None)
        x = g.op("MatMul", through_codes(g, x), w)
    feeds = {"ids": RNG.integers(0, 40, (B, S))}
    return tiny.finish(g, x, "y", ["b", "s", 40 if shared else H]), feeds, {}


# Per case: how it is made, its kind, the forms that must be legal on the CPU.
FLOAT = ("residual", "linear", "activation", "silu", "siblings", "tied")
OWN = {"MultiHeadAttention", "decomposed", "Attention"}
CASES = {
    "layer-norm": (lambda: residual("LayerNormalization"), "residual", {"Add", "Sum", "Skip"}),
    "layer-norm-stream": (lambda: residual("LayerNormalization", True), "residual", {"Add", "Sum", "Skip"}),
    "rms-norm": (lambda: residual("RMSNormalization"), "residual", {"Add", "Sum", "Skip"}),
    "rms-norm-stream": (lambda: residual("RMSNormalization", True), "residual", {"Add", "Sum", "Skip"}),
    "linear": (one_linear, "linear", {"Add", "Sum", "Gemm"}),
    "linear-rows": (lambda: one_linear(2), "linear", {"Add", "Sum", "Gemm"}),
    "tied": (tied, "tied", {"MatMul", "Gemm"}),
    "tied-rows": (lambda: tied(2, True), "tied", {"MatMul", "Gemm"}),
    "gelu": (lambda: one_linear(after="none"), "activation", {"Add", "Sum", "Gemm", "BiasGelu"}),
    "gelu-tanh": (lambda: one_linear(after="tanh"), "activation", {"Add", "Sum", "Gemm", "FastGelu"}),
    "silu": (lambda: one_linear(after="silu"), "silu", {"spelled", "QuickGelu"}),
    "quick-gelu": (lambda: one_linear(after="quick"), "silu", {"spelled", "QuickGelu"}),
    "attention": (lambda: attention("none"), "attention", OWN),
    "attention-padding": (lambda: attention("padding"), "attention", OWN | {"MultiHeadAttention padding"}),
    "attention-flat": (lambda: attention("padding", flat=True), "attention", OWN | {"MultiHeadAttention padding"}),
    "attention-causal": (lambda: attention("causal"), "attention", OWN | {"GroupQueryAttention"}),
    "attention-window": (lambda: attention("window 3"), "attention", OWN | {"GroupQueryAttention"}),
    "attention-both": (lambda: attention("causal+"), "attention", OWN | {"GroupQueryAttention"}),
    "attention-number": (lambda: attention("other", number=True), "attention", OWN),
    "attention-grouped": (
        lambda: attention("causal+", 2),
        "attention",
        {"Attention", "decomposed", "GroupQueryAttention"},
    ),
    "attention-capped": (lambda: attention("padding", cap=5.0), "attention", {"Attention", "decomposed"}),
    "decode": (lambda: cached(1), "attention", OWN | {"GroupQueryAttention"}),
    "decode-grouped": (lambda: cached(1, 2), "attention", {"Attention", "decomposed", "GroupQueryAttention"}),
    "cache-several": (lambda: cached(3), "attention", OWN),
    "projections": (projections, "projections", {"separate", "joined", "packed", "bias inside", "scale merged"}),
    "projections-no-bias": (
        lambda: projections(False, False),
        "projections",
        {"separate", "joined", "packed", "scale merged"},
    ),
    "siblings": (lambda: siblings(True), "siblings", {"separate", "joined"}),
    "siblings-no-bias": (lambda: siblings(False), "siblings", {"separate", "joined"}),
    "siblings-quantized": (lambda: siblings(True, True), "siblings", {"separate", "joined"}),
    "siblings-blocks": (lambda: coded_siblings(True), "coded siblings", {"separate", "joined"}),
    "siblings-symmetric": (lambda: coded_siblings(False), "coded siblings", {"separate", "joined"}),
    "quantized": (lambda: quantized(3, True), "quantized", {"Add", "Sum", "MatMulIntegerToFloat"}),
    "quantized-rows": (lambda: quantized(2, True), "quantized", {"Add", "Sum", "MatMulIntegerToFloat"}),
    "quantized-no-bias": (lambda: quantized(2, False), "quantized", {"Add", "Sum", "MatMulIntegerToFloat", "QGemm"}),
    "requantized": (
        lambda: requantized(3),
        "quantized",
        {"Add", "Sum", "MatMulIntegerToFloat", "QLinearMatMul"},
    ),
    "requantized-rows": (
        lambda: requantized(2),
        "quantized",
        {"Add", "Sum", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"},
    ),
    "requantized-by-rows": (lambda: requantized(3, columns=False), "quantized", {"Add", "Sum"}),
    "dynamic": (lambda: dynamic(True), "dynamic", {"standard", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}),
    "dynamic-no-bias": (
        lambda: dynamic(False),
        "dynamic",
        {"standard", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"},
    ),
    "table": (table, "table", {"gathered", "GatherBlockQuantized", "dequantized"}),
    "table-one-scale": (lambda: table(rows=False), "table", {"gathered", "dequantized"}),
    "table-shared": (lambda: table(shared=True), "table", {"gathered", "dequantized"}),
    "head-shared": (lambda: table(shared=True), "quantized", {"Add", "Sum", "MatMulIntegerToFloat"}),
}
PAIRS = [(case, form) for case, (_, _, forms) in CASES.items() for form in sorted(forms)]


def written(case: str, form: str, target=CPU) -> tuple[Graph, Graph, dict]:
    """The graph as it was and with its one site in the form."""
    make, kind, _ = CASES[case]
    g, feeds, known = make()
    new = g.clone()
    ctx = Context(new, target, known)
    (spot,) = KINDS[kind].find(new)
    KINDS[kind].form(form).rewrite(ctx, spot)
    new.sweep()
    new.verify()
    return g, new, feeds


def outputs(g: Graph, feeds: dict) -> dict[str, np.ndarray]:
    with Session(g) as session:
        return session.run(feeds)


def expected(case: str, g: Graph, feeds: dict) -> dict[str, np.ndarray]:
    """What the standard form gives; the kernel takes no mask with one row for all queries, plain products do."""
    if case == "attention-flat":
        plain = KINDS["attention"].form("decomposed")
        plain.rewrite(Context(g, CPU), KINDS["attention"].find(g)[0])
        g.sweep()
    return outputs(g, feeds)


@pytest.mark.parametrize("case", CASES)
def test_just_these_forms_are_legal_on_the_cpu(case):
    make, kind, forms = CASES[case]
    g, _, known = make()
    (spot,) = KINDS[kind].find(g)
    assert set(legal(Context(g, CPU, known), spot, standard=False, approximate=False)) == forms
    plain = set(legal(Context(g, CPU, known), spot, standard=True, approximate=False))
    for name in forms:
        own = any(domain == CONTRIB for domain, _ in KINDS[kind].form(name).ops)
        assert (name in plain) is not own


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_a_form_is_equal_to_the_standard_one(case, form):
    g, new, feeds = written(case, form)
    want, got = expected(case, g, feeds), outputs(new, feeds)
    assert list(want) == list(got)
    for name, a in want.items():
        assert got[name].shape == a.shape
        assert np.abs(got[name] - a).max() <= 3e-6 * np.abs(a).max(), name


@pytest.mark.parametrize("case", [c for c, (_, kind, _) in CASES.items() if kind in FLOAT and "quantized" not in c])
def test_a_form_of_another_runtime_is_equal_to_float64(case):
    """The plain forms against ONNX's own reference, in float64."""
    onnx = pytest.importorskip("onnx.reference")
    for form in sorted(CASES[case][2]):
        g, new, feeds = written(case, form)
        for v in g.model.graph.initializers.values():
            if v.dtype is ir.DataType.FLOAT:
                v.const_value, v.type = ir.tensor(g.array(v).astype(np.float64)), ir.TensorType(ir.DataType.DOUBLE)
        doubled = {k: v.astype(np.float64) for k, v in feeds.items()}
        (want,) = onnx.ReferenceEvaluator(ir.to_proto(g.model)).run(None, doubled)
        assert np.abs(outputs(new, feeds)["y"] - want).max() <= 2e-5 * np.abs(want).max()


# ---- what the runtime makes of forms ---------------------------------------------------------------------------------


def after_the_runtime(case: str, form: str) -> dict[str, int]:
    return dict(ops(optimized(written(case, form)[1])))


def test_the_runtime_fuses_add_and_leaves_sum_alone():
    assert "SkipLayerNormalization" in after_the_runtime("layer-norm", "Add")
    assert after_the_runtime("layer-norm", "Sum") == {"Sum": 1, "LayerNormalization": 1}
    assert "BiasGelu" in after_the_runtime("gelu", "Add")
    assert after_the_runtime("gelu", "Sum") == {"MatMul": 1, "Sum": 1, "Gelu": 1}


def test_a_gemm_stays_one():
    assert after_the_runtime("linear", "Gemm")["Gemm"] == 1
    assert "Gelu" in after_the_runtime("gelu", "Gemm")


def test_decomposed_attention_costs_no_separate_scale():
    found = after_the_runtime("attention", "decomposed")
    assert found["FusedMatMul"] == 1
    assert "Mul" not in found


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("form", ["Sum", "MatMulIntegerToFloat"])
def test_a_quantized_product_stays_an_integer_one(rank, form):
    case = "quantized" if rank == 3 else "quantized-rows"
    assert integer_check(written(case, form)[1]).ok


def test_codes_in_and_out_are_one_integer_product():
    found = ops(written("requantized", "QLinearMatMul")[1])
    assert (found["QLinearMatMul"], found["MatMul"], found["QuantizeLinear"]) == (1, 0, 1)
    assert integer_check(written("requantized", "QLinearMatMul")[1]).ok


def test_a_gemm_reads_the_shared_table_as_it_is_stored():
    g, new, _ = written("tied", "Gemm")
    (gemm,) = new.nodes("Gemm")
    assert "Transpose" not in ops(new)
    assert gemm.inputs[1].name == next(g.nodes("Transpose")).inputs[0].name


def test_add_behind_a_quantized_product_of_rows_is_the_trap():
    assert not integer_check(written("quantized-rows", "Add")[1]).ok


# ---- legality --------------------------------------------------------------------------------------------------------


def names(case: str, target, **rules) -> list[str]:
    make, kind, _ = CASES[case]
    g, _, known = make()
    (spot,) = KINDS[kind].find(g)
    return legal(Context(g, target, known), spot, **{"standard": False, "approximate": False, **rules})


def first(case: str, target, **rules) -> str:
    make, kind, _ = CASES[case]
    g, _, known = make()
    return default(Context(g, target, known), kind, names(case, target, **rules))


def test_tables_of_targets():
    assert first("attention-padding", CPU) == "Attention"
    assert first("attention-padding", CUDA) == "MultiHeadAttention"
    assert first("attention-grouped", CUDA) == "GroupQueryAttention"
    assert first("attention-capped", CUDA) == "decomposed"
    assert first("attention-padding", TENSORRT) == "decomposed"
    assert first("quantized", CPU) == "MatMulIntegerToFloat"
    assert first("quantized", CPU, standard=True) == "Sum"
    assert first("quantized", TENSORRT) == "Add"
    assert first("layer-norm", CPU) == "Sum"
    assert first("layer-norm", CUDA) == "Add"
    assert first("table", CPU) == "gathered"
    assert first("table", TENSORRT) == "dequantized"


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=lambda t: t.name)
@pytest.mark.parametrize("case", CASES)
def test_the_default_of_other_targets_is_valid_and_equal_where_the_cpu_has_a_kernel(case, target):
    form = first(case, target)
    g, new, feeds = written(case, form, target)
    lacking = [n.op_type for n in new.nodes() if n.domain == CONTRIB and n.op_type not in target.contrib]
    assert not lacking
    for a, b in zip(expected(case, g, feeds).values(), outputs(new, feeds).values(), strict=True):
        assert np.abs(a - b).max() <= 3e-6 * np.abs(a).max()


def test_approximations_need_leave():
    assert "FastGelu approximated" not in names("gelu", CPU)
    assert "FastGelu approximated" in names("gelu", CPU, approximate=True)
    g, new, feeds = written("gelu", "FastGelu approximated")
    error = np.abs(outputs(g, feeds)["y"] - outputs(new, feeds)["y"]).max()
    assert 1e-6 < error < 2e-3
    assert "QGemm rounded bias" in names("quantized-rows", CPU, approximate=True)
    g, new, feeds = written("quantized-rows", "QGemm rounded bias")
    np.testing.assert_allclose(outputs(g, feeds)["y"], outputs(new, feeds)["y"], atol=1e-3)


def test_half_precision_masks_stay_finite():
    g, _, known = attention("padding")
    for v in (*g.inputs[:3], *g.outputs):
        v.type = ir.TensorType(ir.DataType.FLOAT16)
    ctx = Context(g, CUDA, known)
    KINDS["attention"].form("MultiHeadAttention").rewrite(ctx, KINDS["attention"].find(g)[0])
    fills = [t.numpy() for n in g.nodes("Where") for v in n.inputs if (t := g.tensor(v)) is not None]
    assert all(f.dtype == np.float16 and np.isfinite(f) for f in fills)
    assert min(float(f) for f in fills) == float(np.finfo(np.float16).min) / 2


def test_a_mask_becomes_numbers_once_per_model():
    g = tiny.encoder(layers=3)
    ctx = Context(g, CUDA)
    for spot in KINDS["attention"].find(g):
        KINDS["attention"].form("MultiHeadAttention").rewrite(ctx, spot)
    g.sweep()
    assert ops(g)["MultiHeadAttention"] == 3
    assert ops(g)["Where"] == 1


def test_joined_weights_are_read_only_when_they_are_needed():
    g, new, _ = written("siblings", "joined")
    (product,) = new.nodes("MatMul")
    held = new.tensor(product.inputs[1])
    assert isinstance(held, ir.LazyTensor)
    parts = [g.array(n.inputs[1]) for n in g.nodes("MatMul")]
    np.testing.assert_array_equal(held.numpy(), np.concatenate(parts, 1))


# ---- masks -----------------------------------------------------------------------------------------------------------


def probed(g: Graph) -> set[str]:
    values = [n.inputs[3] for n in g.nodes("Attention")]
    return set(mask_kinds.probe(g, list(dict.fromkeys(values))).values())


def test_masks_are_named_by_what_they_do():
    assert probed(tiny.encoder()) == {"padding"}
    assert probed(tiny.decoder()) == {"causal+"}


@pytest.mark.parametrize("width", [3, 64, 4096])
def test_windows_too_long_for_the_samples_are_seen(width):
    """Short inputs do not show a window, so the forms of padding and of plain causal masks would drop it."""
    models = [PassManager([WindowAttention(width=width)]).run(m()).model for m in (tiny.encoder, tiny.decoder)]
    assert probed(models[0]) == {"other"}
    assert probed(models[1]) == {"causal+"}
    g = graph(23, x=("b", "s", H))
    x, place = g.model.graph.inputs[0], g.op("Shape", g.model.graph.inputs[0], start=1, end=2)
    place = g.op("Range", np.array(0), g.op("Squeeze", place, i64(0)), np.array(1))
    back = g.op("Sub", g.op("Unsqueeze", place, i64(1)), g.op("Unsqueeze", place, i64(0)))
    near = g.op("And", g.op("Less", back, np.array(width)), g.op("GreaterOrEqual", back, np.array(0)))
    y = g.op("Attention", x, x, x, near, q_num_heads=2, kv_num_heads=2)
    assert probed(tiny.finish(g, y, "y", ["b", "s", H])) == {f"window {width}"}


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder])
def test_masks_of_an_export_are_named_alike(build):
    g = build(spelled="dynamo")
    canonicalize(g)
    assert probed(g) == probed(build())


def test_names_of_mask_samples():
    tri = [np.tri(n, dtype=bool)[None, None] for n in (4, 6)]
    assert mask_kinds.name_of(tri, fixed=True) == "causal"
    assert mask_kinds.name_of(tri, fixed=False) == "causal+"
    band = [np.tril(np.triu(np.ones((n, n), bool), -2))[None, None] for n in (4, 6)]
    assert mask_kinds.name_of(band, fixed=True) == "causal+"
    later = [np.tri(2, 6, 4, dtype=bool)[None, None]]
    assert mask_kinds.name_of(later, fixed=True) == "causal"
    assert mask_kinds.name_of([np.tri(2, 6, dtype=bool)], fixed=True) == "causal+"
    assert mask_kinds.name_of([np.ones((1, 1, 3, 3), bool)], fixed=True) == "all"
    assert mask_kinds.name_of([np.ones((1, 1, 3, 3), bool)], fixed=False) == "other"
    assert mask_kinds.name_of([np.eye(3, dtype=bool)[::-1]], fixed=True) == "other"
    assert mask_kinds.name_of([f32(np.where(np.tri(4), 0, -math.inf))], fixed=True) == "causal"
    assert mask_kinds.name_of([f32(np.where(np.tri(4), 0.5, -math.inf))], fixed=True) == "causal+"
    assert mask_kinds.name_of([f32(np.full((4, 4), 0.5))], fixed=True) == "other"
    assert mask_kinds.name_of([np.array([[True, False, True]]), np.ones((1, 3), bool)], fixed=False) == "padding"


def test_spots_do_not_overlap_in_a_model():
    g = tiny.encoder(layers=2)
    for wide in ({"projections", "siblings"}, set(KINDS) - {"projections", "siblings"}):
        seen: list[ir.Node] = [n for k in wide for s in KINDS[k].find(g) for n in s.nodes]
        assert len(seen) == len(set(seen))


def test_int64_helper():
    assert i64(1, 2).dtype == np.int64
