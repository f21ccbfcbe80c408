"""Sessions run where asked, take models of any size without copies, and explain every refusal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import DataError, ModelError, OnnxcompError, TargetError
from onnxcomp.graph import Graph
from onnxcomp.maths import formats
from onnxcomp.runtime import installed, payload, sessions
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.target import CPU, CUDA, TENSORRT
from tests import tiny
from tests.hand import optimized


def matmul(g: Graph) -> ir.Node:
    return next(n for n in g.nodes("MatMul") if g.is_constant(n.inputs[1]))


def run(model: Graph | Path, feeds: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    with Session(model, **options) as s:
        return s.run(feeds)[s.outputs[0]]


# ---- running -------------------------------------------------------------------------------------------------------


def test_runs_a_graph_and_a_file_alike(tmp_path: Path) -> None:
    g = tiny.encoder()
    feeds = tiny.feeds(g)
    path = tiny.external(g, tmp_path)
    from_graph, from_file = run(g, feeds), run(path, feeds)
    assert np.array_equal(from_graph, from_file)
    assert np.isfinite(from_graph).all()


def test_settings_do_not_change_results(tmp_path: Path) -> None:
    g = tiny.decoder()
    feeds = tiny.feeds(g)
    plain = run(g, feeds)
    for options in ({"threads": 1}, {"prepack": False}, {"prepack": True}):
        assert np.allclose(run(g, feeds, **options), plain, atol=1e-5), options


def test_session_says_what_it_takes_and_gives() -> None:
    g = tiny.encoder()
    with Session(g) as s:
        assert s.provider == "CPUExecutionProvider"
        assert [(p.name, p.dtype, p.shape) for p in s.inputs] == [
            ("input_ids", np.dtype(np.int64), ("batch", "sequence")),
            ("attention_mask", np.dtype(np.int64), ("batch", "sequence")),
        ]
        assert s.outputs == ["last_hidden_state"]


def test_taps_show_values_inside_and_inputs_as_they_are() -> None:
    g = tiny.mlp(bias=False)
    first = matmul(g)
    name = str(first.outputs[0].name)
    feeds = tiny.feeds(g)
    edits, outputs = g.edits, [v.name for v in g.outputs]
    with Session(g, taps=[name, "x", "y"]) as s:
        found = s.run(feeds)
        assert set(s.outputs) == {"y", name, "x"} == set(found)
        assert np.allclose(found[name], feeds["x"] @ g.array(first.inputs[1]), atol=1e-5)
        assert found["x"] is feeds["x"]
        assert list(s.run(feeds, [name])) == [name]
    assert (g.edits, [v.name for v in g.outputs]) == (edits, outputs)


def test_nothing_is_written_beside_the_model(tmp_path: Path) -> None:
    g = tiny.encoder()
    path = tiny.external(g, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    loaded = Graph(ir.load(path), path)
    with Session(loaded, taps=[str(matmul(g).outputs[0].name)]) as s:
        s.run(tiny.feeds(g))
    optimized(path)
    integer_check(path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_profile_lands_where_asked(tmp_path: Path) -> None:
    g = tiny.mlp()
    with Session(g, profile=tmp_path / "profile.json") as s:
        s.run(tiny.feeds(g))
    assert any("MatMul" in str(e) for e in json.loads((tmp_path / "profile.json").read_text()))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_closed_session_says_so() -> None:
    g = tiny.mlp()
    with Session(g) as s:
        pass
    s.close()
    with pytest.raises(OnnxcompError, match="closed"):
        s.run(tiny.feeds(g))


# ---- handing over --------------------------------------------------------------------------------------------------


def test_large_constants_stay_out_of_the_message(tmp_path: Path) -> None:
    g = tiny.linear(256, 128, bias=False)
    path = tiny.external(g, tmp_path)
    mapped = payload.payload(Graph(ir.load(path)).model)
    assert mapped.folder == tmp_path.resolve()
    assert not mapped.shared
    held = payload.payload(g.model)
    assert len(held.message) < 2000
    [(shared, _)] = held.shared.values()
    assert shared.ctypes.data == g.array(matmul(g).inputs[1]).ctypes.data


def test_constants_of_two_folders_and_of_memory_meet_in_one_session(tmp_path: Path) -> None:
    g = tiny.encoder(hidden=64, ffn=128)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    feeds = tiny.feeds(g)
    wanted = run(g, feeds)
    mixed = Graph(ir.load(tiny.external(g, tmp_path / "a")))
    other = Graph(ir.load(tiny.external(g, tmp_path / "b")))
    weights = [n.inputs[1] for n in mixed.nodes("MatMul") if mixed.is_constant(n.inputs[1])]
    for i, v in enumerate(weights):
        assert v is not None
        if i % 3 == 1:
            v.const_value = other.model.graph.initializers[str(v.name)].const_value
        if i % 3 == 2:
            v.const_value = ir.tensor(np.array(mixed.array(v)), name=v.name)
    assert len({str(v.const_value.base_dir) for v in weights if isinstance(v.const_value, ir.ExternalTensor)}) == 2
    assert np.array_equal(run(mixed, feeds), wanted)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_constants_beyond_two_gigabytes_are_handed_over(where: str, tmp_path: Path) -> None:
    """Pains rows 18, 19 and 23: other tools serialize weights into one message, which ends at 2 GB."""
    rows, width = 1_100_000, 512
    if where == "file":
        path = tmp_path / "table.bin"
        with path.open("wb") as f:
            f.truncate(rows * width * 4)  # sparse: takes no disk
            f.seek((rows - 1) * width * 4)
            f.write(np.full(width, 3, np.float32).tobytes())
        shape = ir.Shape([rows, width])
        table: Any = ir.ExternalTensor(
            "table.bin", 0, None, ir.DataType.FLOAT, shape=shape, name="t", base_dir=tmp_path
        )
    else:
        table = np.zeros((rows, width), np.float32)  # the pages that nobody writes take no memory
        table[-1] = 3
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10))
    g = tiny.finish(g, g.op("Gather", g.constant(table, "table"), x), "y", ["n", width])
    assert g.nbytes > 2**31
    with Session(g, prepack=False, taps=["x"]) as s:
        y = s.run({"x": np.array([0, rows - 1])})["y"]
    assert np.array_equal(y, np.stack([np.zeros(width), np.full(width, 3)]))


def test_a_large_constant_that_nothing_reads_is_left_behind() -> None:
    """Other tools' quantizers leave the float weights in the file; the runtime drops them, then misses them."""
    g = tiny.linear()
    feeds = tiny.feeds(g, 2, 5)
    with Session(g) as s:
        want = s.run(feeds)["y"]
    g.model.graph.register_initializer(ir.Value(name="left", const_value=ir.tensor(np.ones((128, 128), np.float32))))
    with Session(g) as s:
        np.testing.assert_array_equal(s.run(feeds)["y"], want)
    assert "left" in g.model.graph.initializers


def test_types_numpy_does_not_know_are_handed_over_as_bytes() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 256]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10))
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(ml_dtypes.bfloat16)
    y = g.op("MatMul", x, g.op("Cast", g.constant(w, "w"), to=1))
    g = tiny.finish(g, y, "y", ["n", 256])
    feeds = {"x": np.ones((2, 256), np.float32)}
    assert [kind for _, kind in payload.payload(g.model).shared.values()] == [ir.DataType.BFLOAT16]
    assert np.allclose(run(g, feeds), feeds["x"] @ w.astype(np.float32), atol=1e-3)


@pytest.mark.parametrize("fmt", ["uint4", "int4"])
def test_codes_of_four_bits_stand_beside_weights_in_files(tmp_path: Path, fmt: str) -> None:
    g = tiny.mlp(256, 512)
    feeds = tiny.feeds(g)
    g = Graph(ir.load(tiny.external(g, tmp_path)))
    node = matmul(g)
    q = formats.fit(g.array(node.inputs[1]), fmt, axis=0, block=32, symmetric=fmt == "int4")
    plain = g.clone()
    plain.set_input(matmul(plain), 1, plain.constant(q.array(), "numbers"))
    zero = None if fmt == "int4" else g.constant(q.zero, "zero")
    args = (g.constant(q.codes, "codes"), g.constant(q.scale, "scale"), zero)
    g.set_input(node, 1, g.op("DequantizeLinear", *args, axis=0, block_size=32))
    load = payload.payload(g.model)
    assert load.folder is not None  # the other weights
    assert any(kind.bitwidth == 4 for _, kind in load.shared.values())
    got, want = run(g, feeds, optimized=False), run(plain, feeds)  # optimized, inputs are rounded to 8 bits
    assert np.allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


def test_nodes_added_at_the_end_are_sorted_first() -> None:
    g = tiny.mlp()
    node = matmul(g)
    doubled = g.op("Mul", node.inputs[0], np.array(2, np.float32))
    g.set_input(node, 0, doubled)
    feeds = tiny.feeds(g)
    plain = tiny.mlp()
    assert np.allclose(run(g, feeds), run(plain, {"x": feeds["x"] * 2}), atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("attention_mask"), "needs input 'attention_mask'"),
        (lambda f: f.update(extra=np.ones(1)), "no input 'extra'"),
        (lambda f: f.update(input_ids=f["input_ids"].astype(np.int32)), "is int64, the data has int32"),
        (lambda f: f.update(input_ids=f["input_ids"][0]), r"has shape \['batch', 'sequence'\], the data has \[7\]"),
        (lambda f: f.update(input_ids=f["input_ids"] + 10**6), "outside its embedding table"),
    ],
)
def test_feeds_that_do_not_fit_are_data_errors(change: Any, message: str) -> None:
    g = tiny.encoder()
    feeds = tiny.feeds(g)
    change(feeds)
    with Session(g) as s, pytest.raises(DataError, match=message):
        s.run(feeds)


def test_a_static_axis_is_checked() -> None:
    g = tiny.mlp()
    with Session(g) as s, pytest.raises(DataError, match="the data has"):
        s.run({"x": np.ones((1, 2, 9), np.float32)})


def test_broken_models_are_model_errors(tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model" * 20)
    with pytest.raises(ModelError, match=r"junk\.onnx"):
        Session(junk)
    with pytest.raises(ModelError, match=r"none\.onnx"):
        Session(tmp_path / "none.onnx")
    g = tiny.mlp()
    with pytest.raises(ModelError, match="no computed value named 'nope'"):
        Session(g, taps=["nope"])
    g.replace(g.outputs[0], g.op("NoSuchOperator", matmul(g).outputs[0], like=g.outputs[0]))
    with pytest.raises(ModelError, match="NoSuchOperator") as e:
        Session(g)
    assert len(str(e.value)) < 400
    assert "onnxruntime_src" not in str(e.value)


def test_a_failing_run_names_the_shapes() -> None:
    g = tiny.encoder(positions=5)
    with Session(g) as s, pytest.raises(OnnxcompError, match=r"input_ids \[2, 7\]"):
        s.run(tiny.feeds(g))


# ---- targets -------------------------------------------------------------------------------------------------------


def test_the_cpu_target_runs_here() -> None:
    sessions.check_target(CPU)
    assert len(installed.installed_runtimes()) == 1


@pytest.mark.parametrize(("target", "package"), [(CUDA, "onnxcomp[gpu]"), (TENSORRT, "onnxcomp[tensorrt]")])
def test_a_build_without_the_provider_is_refused_with_the_package_to_install(
    target: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed.ort_module(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(TargetError, match=package.replace("[", r"\[")):
        Session(tiny.mlp(), target)


class Fallback:
    """A GPU build without a GPU: it lists the provider, then quietly takes the CPU."""

    __version__ = "1.31.1"

    def __init__(self, real: Any, fail: str = "") -> None:
        self.real, self.fail = real, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def set_default_logger_severity(self, level: int) -> None:
        assert level == 4

    def preload_dlls(self) -> None:
        print("Failed to load libcublas")  # noqa: T201

    def InferenceSession(self, source: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        if self.fail:
            raise RuntimeError(self.fail)
        self.asked = providers
        return self.real.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=lambda t: t.name)
def test_a_silent_fallback_to_the_cpu_is_an_error(
    target: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fallback(installed.ort_module())
    monkeypatch.setattr(installed, "ort_module", lambda: fake)
    with pytest.raises(TargetError, match="does not run on this machine") as e:
        sessions.check_target(target)
    assert "onnxruntime-gpu[cuda,cudnn]" in str(e.value)
    assert ("tensorrt-cu13>=10.13,<11" in str(e.value)) == (target is TENSORRT)
    assert dict(fake.asked)["CUDAExecutionProvider"] == {"use_tf32": "0"}
    assert [p for p, _ in fake.asked] == list(target.providers)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_fails_to_start_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fallback(installed.ort_module(), "CUDA failure 35: CUDA driver version is insufficient")
    monkeypatch.setattr(installed, "ort_module", lambda: fake)
    monkeypatch.setattr(installed, "_missing", lambda provider: [])
    with pytest.raises(TargetError, match="CUDA failure 35"):
        Session(tiny.mlp(), CUDA)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed.LIBRARIES, "CUDAExecutionProvider", ("libc.so.6", "libsurely-not-there.so.1"))
    assert installed._missing("CUDAExecutionProvider") == ["libsurely-not-there.so.1"]
    assert "libsurely-not-there.so.1" in str(installed.unavailable(CUDA, ""))


def test_an_old_runtime_is_refused() -> None:
    with pytest.raises(TargetError, match=r"99\.1 or newer"):
        Session(tiny.mlp(), dataclasses.replace(CPU, min_runtime="99.1"))


def test_two_runtimes_at_once_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("onnxruntime", "onnxruntime-gpu"):
            return "1.31.1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed.installed_runtimes() == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    installed.ort_module.cache_clear()
    with pytest.raises(TargetError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        Session(tiny.mlp())


@pytest.mark.parametrize(
    ("module", "message"), [(None, "not installed"), (SimpleNamespace(), "package onnxruntime is empty")]
)
def test_a_missing_or_empty_runtime_is_a_target_error(
    module: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.ort_module.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", module)
    with pytest.raises(TargetError, match=message) as e:
        Session(tiny.mlp())
    assert "pip install 'onnxcomp[cpu]'" in str(e.value)


# ---- what the runtime makes of a graph -----------------------------------------------------------------------------


def test_the_optimized_graph_computes_the_same() -> None:
    g = tiny.encoder()
    feeds = tiny.feeds(g)
    o = optimized(g)
    assert o.model.graph.num_nodes() < g.model.graph.num_nodes()
    assert np.allclose(run(o, feeds), run(g, feeds), atol=1e-4)


def quantized(g: Graph, bias: str = "keep") -> Graph:
    """Static u8 x s8 Q/DQ on every linear, by hand; a bias may become a Sum."""
    for node in g.nodes("MatMul"):
        if not g.is_constant(node.inputs[1]):
            continue
        q = formats.fit(g.array(node.inputs[1]), "int8", axis=1)
        s, z = np.array(0.05, np.float32), np.array(128, np.uint8)
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", node.inputs[0], s, z), s, z)
        w = g.op("DequantizeLinear", q.codes, q.scale, q.zero, axis=1)
        g.set_input(node, 0, x)
        g.set_input(node, 1, w)
        for user, _ in tuple(node.outputs[0].uses()):
            if user.op_type == "Add" and bias == "sum":
                g.replace(user.outputs[0], g.op("Sum", *user.inputs, like=user.outputs[0]))
    g.sweep()
    return g


@pytest.mark.parametrize("rank", [2, 3])
def test_integer_check_counts_quantized_linears(rank: int) -> None:
    check = integer_check(quantized(tiny.linear(64, 64, bias=False, rank=rank)))
    assert check == sessions.IntegerCheck(1, 1, 0, True, "")
    assert integer_check(tiny.linear()) == sessions.IntegerCheck(0, 0, 0, True, "")


def test_integer_check_sees_the_bias_trap_of_rank_two() -> None:
    trapped = integer_check(quantized(tiny.linear(64, 64, rank=2)))
    assert not trapped.ok
    assert trapped.quantized_linears == 1
    assert trapped.dequantized_weights == 1
    assert "dequantized on every run" in trapped.detail
    assert integer_check(quantized(tiny.linear(64, 64, rank=2), "sum")).ok


def test_integer_check_counts_dynamic_quantization(tmp_path: Path) -> None:
    g = tiny.linear(64, 64, bias=False)
    node = matmul(g)
    q = formats.fit(g.array(node.inputs[1]), "int8")
    dynamic = g.op("DynamicQuantizeLinear", node.inputs[0], outputs=3)
    _, scale, zero = dynamic.producer().outputs
    product = g.op("MatMulInteger", dynamic, q.codes, zero, q.zero)
    float_ = g.op("Mul", g.op("Cast", product, to=1), g.op("Mul", scale, q.scale))
    g.replace(node.outputs[0], float_)
    g.sweep()
    g.sort()
    path = tmp_path / "dynamic.onnx"
    ir.save(g.model, path)
    assert integer_check(path) == sessions.IntegerCheck(1, 1, 0, True, "")


def test_the_codes_of_the_runtime_are_ours() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 16]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10))
    data = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    scale, zero = formats.affine(data.min() * 0.9, data.max() * 0.9, "uint8")
    y = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
    g = tiny.finish(g, y, "y", ["n", 16])
    ours = formats.dequantize(formats.quantize(data, scale, zero, "uint8"), scale, zero)
    assert np.array_equal(run(g, {"x": data}), ours)


def test_only_small_weights_are_prepacked_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcomp.runtime import payload

    g = tiny.encoder()
    path = tiny.external(g, tmp_path)
    assert payload.prepacks(g, None)
    assert payload.prepacks(path, None)
    monkeypatch.setattr(payload, "PREPACK_BELOW", g.nbytes)
    assert not payload.prepacks(g, None)
    assert not payload.prepacks(path, None)
    assert payload.prepacks(g, True)
    with Session(path) as s:
        assert np.isfinite(s.run(tiny.feeds(g))["last_hidden_state"]).all()
