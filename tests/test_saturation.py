"""Int8 sums on CPUs without VNNI: the pair rule, where targets are resolved, and the check of the written file.

`emulated` is the other kind of machine in numpy, so that either kind notices a broken rule.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxcomp as oc
from onnxcomp import pipeline, target
from onnxcomp.blocks import linears
from onnxcomp.engine.job import Job
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import DataError, GateFailed
from onnxcomp.files import storage
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering import costs
from onnxcomp.maths import Array, formats, rounding, saturation
from onnxcomp.maths.formats import FORMATS
from onnxcomp.methods.quantize import linears as quantize
from onnxcomp.passes.dynamic_quant import DynamicQuant
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.runtime.integer import saturating
from onnxcomp.runtime.sessions import Session
from onnxcomp.stats import Stats
from tests import tiny

INT8 = FORMATS["int8"]
KINDS = {"avx2": frozenset({"avx2"}), "vnni": frozenset({"avx2", "vnni"})}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of machine in turn."""
    monkeypatch.setattr(target, "cpu_features", lambda: KINDS[request.param])
    return str(request.param)


def emulated(x: Array, w: Array) -> Array:
    """`x` (uint8 `[M, K]`) @ `w` (int8 `[K, N]`) as AVX2 does it: pairs of products saturate at int16, then int32."""
    total = np.zeros((len(x), w.shape[1]), np.int32)
    for k in range(0, len(w), 2):
        pair = x[:, k : k + 2].astype(np.int32) @ w[k : k + 2].astype(np.int32)
        total += np.clip(pair, -(2**15), 2**15 - 1)
    return total


def exact(x: Array, w: Array) -> Array:
    return x.astype(np.int32) @ w.astype(np.int32)


def plain(w: Array) -> Array:
    return formats.fit(w, INT8, axis=1).codes


def limited(w: Array, axis: int | None = 1) -> Array:
    return formats.quantize(w, *saturation.scales(w, INT8, axis=axis), INT8, axis=axis)


def planted(k: int = 65, n: int = 6) -> Array:
    """A weight whose columns have pairs of two large numbers of one sign."""
    w = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
    w[4:6] = np.sign(w[4]) * 5
    return w


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_plain_codes_are_wrong_where_pairs_saturate_and_limited_ones_exact() -> None:
    w = planted()
    full = np.full((1, len(w)), 255, np.uint8)
    inputs = np.concatenate([full, np.random.default_rng(1).integers(0, 256, (50, len(w))).astype(np.uint8)])
    assert np.abs(emulated(inputs, plain(w)) - exact(inputs, plain(w)))[0].min() > 30000
    for codes in (limited(w), limited(w, None)):
        assert np.array_equal(emulated(inputs, codes), exact(inputs, codes))


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, None]),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.sampled_from([0.2, 1.0, 8.0]),
)
@settings(max_examples=200, deadline=None)
def test_codes_obey_the_rule_within_half_a_step(
    k: int, n: int, seed: int, axis: int | None, dtype: type, tail: float
) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.choice([-1, 1], (k, n)) * rng.random((k, n)) ** tail * 10 ** rng.uniform(-3, 3)).astype(dtype)
    scale, zero = saturation.scales(w, INT8, axis=axis, scale_type=dtype)
    codes = formats.quantize(w, scale, zero, INT8, axis=axis)
    assert saturation.pair_sums(codes).max() <= saturation.PAIR_LIMIT
    assert not saturation.breaks(codes).any()
    x = np.stack([np.where(np.arange(k) % 2 < m, 255, 0) for m in (1, 2)]).astype(np.uint8)  # one of each pair, both
    x = np.concatenate([x, *(np.where(s * codes.T > 0, 255, 0).astype(np.uint8) for s in (1, -1))])
    assert np.array_equal(emulated(x, codes), exact(x, codes))
    step = scale.astype(np.float64)
    error = np.abs(codes * step - w.astype(np.float64))
    assert (error <= step * (0.5 + 1e-4)).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rounded_codes_use_what_the_rule_leaves(seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((64, 8)).astype(np.float32)
    codes = limited(w)
    top = np.maximum(np.abs(codes.astype(int)).max(axis=0), saturation.pair_sums(codes))
    assert (top >= 126).all()  # a coarser scale than needed would leave room in every pair


def test_pairs_are_rows_zero_and_one_and_an_odd_last_row_is_alone() -> None:
    assert saturation.pair_sums(np.array([[1], [100], [100], [1], [127]], np.int8)) == [127]
    assert saturation.pair_sums(np.array([[-128], [-1], [127], [-128]], np.int8)) == [129]
    assert saturation.breaks(np.array([[64, 64, -128], [64, 65, 127]], np.int8)).tolist() == [False, True, False]


def test_columns_that_obey_keep_their_scale_and_wide_weights_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = planted()
    w[:, 2] = 0
    w[3, 2] = 1.0
    scale, _ = saturation.scales(w, INT8, axis=1)
    assert scale[2] == np.float32(1 / 127)
    assert scale[0] == pytest.approx(10 / 127.9)
    assert saturation.scales(w, INT8, axis=None)[0] == scale.max()
    monkeypatch.setattr(saturation, "CHUNK", 2 * len(w))
    assert np.array_equal(saturation.scales(w, INT8, axis=1)[0], scale)


def test_empty_and_broken_weights() -> None:
    scale, zero = saturation.scales(np.zeros((3, 2), np.float32), INT8, axis=1)
    assert (scale.tolist(), zero.tolist()) == ([1, 1], [0, 0])
    with pytest.raises(DataError, match="not finite"):
        saturation.scales(np.array([[1.0], [np.nan]], np.float32), INT8, axis=1)


def test_a_scale_that_its_type_rounds_down_grows_until_codes_obey() -> None:
    rng = np.random.default_rng(0)
    w = rng.uniform(0.3, 1, (64, 400)).astype(np.float32)
    first = np.maximum(np.abs(w).max(axis=0) / 127, saturation.pair_sums(w) / saturation.PAIR_STEPS)
    rounded = first.astype(ml_dtypes.bfloat16)
    assert saturation.breaks(formats.quantize(w, rounded, np.zeros(400, np.int8), INT8, axis=1)).any()
    scale, zero = saturation.scales(w, INT8, axis=1, scale_type=ml_dtypes.bfloat16)
    assert not saturation.breaks(formats.quantize(w, scale, zero, INT8, axis=1)).any()
    assert (scale.astype(np.float32) / first).max() < 1.01


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_mended_codes_obey_and_others_stay(k: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-128, 128, (k, 40)).astype(np.int8)
    mended = saturation.mended(codes)
    assert not saturation.breaks(mended).any()
    assert (np.sign(mended) == np.sign(codes)).all()
    kept = ~saturation.breaks(codes)
    assert np.array_equal(mended[:, kept], codes[:, kept])
    wide = codes.astype(int)[: k // 2 * 2].reshape(-1, 2, 40)
    over = sum(np.maximum(np.maximum(s * wide, 0).sum(axis=1) - 128, 0) for s in (1, -1)) if k > 1 else 0
    assert np.abs(mended.astype(int) - codes).sum() == np.sum(over)  # no unit more than the rule asks for


@pytest.mark.parametrize("refits", [0, 2])
def test_gptq_codes_obey_and_err_less_than_nearest_ones(refits: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 24))
    w = rng.uniform(0.2, 1, (24, 300)).astype(np.float32)
    found = rounding.round_weights(x.T @ x, w, "int8", limited=True, refits=refits)
    assert not saturation.breaks(found.quantized.codes).any()
    assert saturation.pair_sums(found.quantized.codes).max() == 128
    assert found.loss < 0.9 * found.rounding_loss


# ---- where targets are resolved --------------------------------------------------------------------------------------


def adversarial() -> Graph:
    """One linear with a planted weight, 64 to 48."""
    g = tiny.linear(64, 48)
    g.put(linears(g)[0].weight, planted(64, 48))
    return g


def batches(g: Graph) -> list[dict[str, Array]]:
    return [tiny.feeds(g, 2, 9, seed=i) for i in range(4)]


def codes_of(g: Graph) -> Array:
    [codes] = [g.array(v) for v in g.model.graph.initializers.values() if str(v.name).endswith("_int8")]
    return np.asarray(codes)


@pytest.mark.parametrize("made", [[Qdq()], [Qdq(weights="tensor"), Lower()], [DynamicQuant(), Lower()]], ids=str)
@pytest.mark.parametrize("given_target", [{}, {"target": oc.CPU}], ids=["default", "oc.CPU"])
def test_the_manager_resolves_its_target(kind: str, made: list[pipeline.Pass], given_target: dict) -> None:
    manager = oc.PassManager(made, **given_target)
    assert manager.target.quantized.saturates is (kind == "avx2")
    g = adversarial()
    codes = codes_of(manager.run(g, batches(g)).model)
    assert saturation.breaks(codes).any() == (kind == "vnni")


def test_an_environment_by_hand_resolves_its_target(kind: str, tmp_path: Path) -> None:
    g = adversarial()

    def refuse(*_: object) -> None:
        raise AssertionError("not asked for")

    env = pipeline.Env(
        oc.CPU, Stats({}), g, np.random.default_rng(0), None, tmp_path, refuse, refuse, refuse, refuse  # type: ignore[arg-type]
    )  # fmt: skip
    assert env.target.quantized.saturates is (kind == "avx2")
    assert dataclasses.replace(env, dry=True).target == env.target
    DynamicQuant().run(g, env)
    assert saturation.breaks(codes_of(g)).any() == (kind == "vnni")
    codes, _ = quantize.WeightCodes(g := adversarial(), "channel", oc.CPU)(linears(g)[0])
    assert saturation.breaks(g.array(codes)).any() == (kind == "vnni")


def test_jobs_costs_and_keys_tell_the_kinds_of_machine_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = storage.save(tiny.linear(64, 64), tmp_path)
    hashes, seconds = set(), set()
    for features in KINDS.values():
        monkeypatch.setattr(target, "cpu_features", lambda now=features: now)
        job = Job(path, Recipe.preset("int8"))
        assert job.settings.target == target.resolved(target.resolved(oc.CPU)) == job.manager().target
        hashes.add(job.hash())
        [cost] = costs.costs({"a": tiny.linear()}, {"x": (2, 5, 8)}, oc.CPU, measure=False)
        seconds.add(cost.seconds)
    assert len(hashes) == len(seconds) == 2


def test_only_this_machines_cpu_is_resolved(kind: str) -> None:
    for other in (oc.CUDA, target.CPU_VNNI, target.CPU_ARM64, target.CPU_AVX2):
        assert target.resolved(other) is other
    changed = dataclasses.replace(oc.CPU, name="mine", gflops={"fp32": 1.0}, max_opset=20)
    found = target.resolved(changed)
    assert (found.quantized.saturates, found.gflops, found.max_opset) == (kind == "avx2", {"fp32": 1.0}, 20)


@pytest.mark.parametrize("made", [[Qdq()], [Qdq(), Lower()], [Qdq(), Lower(standard=True)]], ids=str)
def test_the_runtime_here_gives_the_exact_integer_product(made: list[pipeline.Pass]) -> None:
    g = adversarial()
    model = PassManager(made).run(g, batches(g)).model
    scale, zero, steps = (model.array(model.value(n)) for n in ("x_scale", "x_zero", "linear.weight_scale"))
    top = np.full((1, 3, 64), (255.0 - float(zero)) * float(scale), np.float32)  # every code is 255
    q = (np.clip(np.rint(top / scale) + zero, 0, 255) - zero).astype(np.int64)
    assert (q + zero == 255).all()
    want = (q @ codes_of(model).astype(np.int64)) * (float(scale) * steps.astype(np.float64))
    with Session(model) as session:
        got = session.run({"x": top})["y"] - g.array(linears(g)[0].bias)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# ---- the written file ------------------------------------------------------------------------------------------------

OBEY, BREAK = np.full((8, 4), 60, np.int8), np.full((8, 4), 90, np.int8)


def product(op: str, codes: Array, *, signed: bool = False) -> ir.Model:
    """One quantized linear `[8, 4]` written as an operator, weight called `w`."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 8]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21, CONTRIB: 1}, name="g"), ir_version=10))
    scale, zero = np.float32(0.1), np.array(0 if signed else 128, np.int8 if signed else np.uint8)
    q = g.op("QuantizeLinear", x, np.array(scale), zero)
    if op in ("MatMul", "Gemm", "transposed"):
        w = g.constant(codes if op == "MatMul" else codes.T.copy(), "w")
        b = g.op("DequantizeLinear", w, np.array(scale))
        b = g.op("Transpose", b, perm=[1, 0]) if op == "transposed" else b
        a, more = g.op("DequantizeLinear", q, np.array(scale), zero), {"transB": 1} if op == "Gemm" else {}
        y = g.op("Gemm" if op == "Gemm" else "MatMul", a, b, **more)
    elif op == "MatMulInteger":
        y = g.op(op, q, g.constant(codes, "w"), zero)
    elif op == "QLinearMatMul":
        s, none = np.array(scale), np.array(0, np.int8)
        y = g.op(op, q, s, zero, g.constant(codes, "w"), s, none, s, zero)
    else:
        y = g.op(op, q, g.constant(codes, "w"), np.array(scale), np.array(scale), zero, domain=CONTRIB)
    g.model.graph.outputs.append(y)
    return g.model


@pytest.mark.parametrize(
    "op", ["MatMul", "Gemm", "transposed", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"]
)
def test_a_weight_that_can_saturate_is_found_in_every_spelling(op: str) -> None:
    assert saturating(product(op, OBEY)) == []
    assert saturating(product(op, BREAK)) == ["w"]
    column = OBEY.copy()
    column[::2, 3], column[1::2, 3] = 127, 0  # large, but alone in its pair: fine along K, not along N
    assert saturating(product(op, column)) == []
    assert saturating(product(op, BREAK, signed=True)) == []  # s8 x s8 is another kernel


def test_weights_of_the_source_do_not_count_by_name_or_by_content() -> None:
    cut = BREAK[2:].copy()
    assert saturating(product("MatMul", BREAK), product("transposed", BREAK)) == []
    assert saturating(product("MatMul", cut), product("MatMul", BREAK)) == []
    float_only = tiny.linear(8, 4).model
    assert saturating(product("MatMul", BREAK), float_only) == ["w"]


def quantized_by_others(folder: Path) -> Path:
    """A Q/DQ model on disk whose plain 8-bit weight breaks the rule."""
    g = adversarial()
    made = PassManager([Qdq()], target=target.CPU_VNNI).run(g, batches(g)).model
    assert saturating(made.model)
    return storage.save(made, folder)


def test_a_source_that_can_saturate_is_compressed_with_a_warning(kind: str, tmp_path: Path) -> None:
    source = quantized_by_others(tmp_path / "in")
    before = codes_of(storage.load(source))
    report = oc.optimize(source, tmp_path / "out", measure=False).report
    said = [w for w in report.warnings if "is int8 in the source already" in w]
    assert len(said) == (kind == "avx2")
    assert all("linear.weight_int8" in w for w in said)
    assert np.array_equal(codes_of(storage.load(tmp_path / "out")), before)


def test_a_result_that_can_saturate_is_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = adversarial()
    storage.save(g, tmp_path)
    asked = {"passes": ["qdq", "lower"], "calibration": batches(g), "measure": False}
    oc.compress(tmp_path / "model.onnx", tmp_path / "good", **asked)

    def careless(w: Array, fmt: formats.Format, *, axis: int | None, scale_type: type) -> tuple[Array, Array]:
        limit = np.abs(w).max(axis=0)
        return formats.affine(-limit, limit, fmt, symmetric=True, scale_type=scale_type)

    monkeypatch.setattr(saturation, "scales", careless)
    if kind == "vnni":
        oc.compress(tmp_path / "model.onnx", tmp_path / "bad", **asked)
        return
    with pytest.raises(GateFailed, match=r"weight 'linear.weight_int8'.*saturate at 16 bits"):
        oc.compress(tmp_path / "model.onnx", tmp_path / "bad", **asked)
    assert not (tmp_path / "bad").exists()
