"""Laws of model files: what was saved is what is loaded, nothing unsafe is read, nothing is ever half-written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.canonical.opset import convert
from onnxcomp.errors import ModelError
from onnxcomp.files import atomic, external, storage
from onnxcomp.files import weights as datafile
from onnxcomp.graph import Graph, mapped
from tests import tiny

Change = Callable[[onnx.ModelProto, Path], None]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is big enough for external data."""
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)


def holding(*arrays: np.ndarray, dtype: ir.DataType | None = None) -> Graph:
    """A model whose outputs are its constants."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": onnx.defs.onnx_opset_version()}, name="holding")
    g = Graph(ir.Model(graph, ir_version=10))
    for i, a in enumerate(arrays):
        tensor = ir.tensor(a, dtype=dtype, name=f"w{i}")
        v = g.op("Identity", g.constant(tensor, f"w{i}"))
        v.type, v.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        graph.outputs.append(v)
    return Graph(g.model)


def weights(g: Graph) -> dict[str, bytes]:
    return {str(v.name): Graph.tensor(v).tobytes() for v in g.model.graph.initializers.values()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, storage.INLINE_LIMIT])
def test_a_saved_model_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(storage, "INLINE_LIMIT", limit)
    g = tiny.encoder()
    file = storage.save(g, tmp_path / "out", metadata={"task": "feature-extraction"})
    again = storage.load(tmp_path / "out")
    assert file == tmp_path / "out" / "model.onnx"
    assert again.path == file
    assert weights(again) == weights(g)
    assert again.interface == g.interface
    assert [n.op_type for n in again.nodes()] == [n.op_type for n in g.nodes()]
    assert again.model.metadata_props["task"] == "feature-extraction"
    assert (again.opset, again.model.ir_version) == (23, 10)
    again.verify()


TYPES = [
    (ir.DataType.BFLOAT16, ml_dtypes.bfloat16, 10),
    (ir.DataType.FLOAT16, np.float16, 10),
    (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 10),
    (ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2, 10),
    (ir.DataType.INT4, ml_dtypes.int4, 10),
    (ir.DataType.UINT4, ml_dtypes.uint4, 10),
    (ir.DataType.FLOAT4E2M1, ml_dtypes.float4_e2m1fn, 11),
    (ir.DataType.INT2, ml_dtypes.int2, 13),
    (ir.DataType.INT8, np.int8, 10),
]


@pytest.mark.parametrize("limit", [0, storage.INLINE_LIMIT], ids=["external", "inline"])
@pytest.mark.parametrize(("kind", "dtype", "version"), TYPES, ids=[k.name for k, _, _ in TYPES])
def test_low_precision_types_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: ir.DataType, dtype: type, version: int, limit: int
) -> None:
    """Row 49 of pains.md; an odd count, so that packed types end inside a byte."""
    monkeypatch.setattr(storage, "INLINE_LIMIT", limit)
    a = (np.random.default_rng(0).integers(0, 2, (61, 101)) - (kind.name.startswith("INT"))).astype(dtype)
    storage.save(holding(a), tmp_path)
    g = storage.load(tmp_path)
    (v,) = g.model.graph.initializers.values()
    assert v.dtype == kind
    assert g.model.ir_version == version
    assert np.array_equal(g.array(v).astype(np.float32), a.astype(np.float32))
    assert isinstance(v.const_value, mapped.MappedTensor) == (limit == 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(["f4", "f2", "i8", "i1", "b1"])), min_size=1, max_size=6)
)
def test_any_mix_of_sizes_survives_external_data(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, str]]
) -> None:
    out = tmp_path_factory.mktemp("mix")
    rng = np.random.default_rng(1)
    g = holding(*(rng.integers(0, 99, n).astype(kind) for n, kind in sizes))
    limit, storage.INLINE_LIMIT = storage.INLINE_LIMIT, 0
    try:
        storage.save(g, out)
    finally:
        storage.INLINE_LIMIT = limit
    assert weights(storage.load(out)) == weights(g)


@pytest.mark.usefixtures("outside")
def test_equal_tensors_are_written_once_and_large_ones_on_pages(tmp_path: Path) -> None:
    a = np.arange(5000, dtype=np.float32)
    storage.save(holding(a, a.copy(), a + 1), tmp_path)
    (data,) = tmp_path.glob("*.data")
    assert data.stat().st_size < 2 * a.nbytes + 4096
    g = storage.load(tmp_path)
    offsets = [v.const_value.offset for v in g.model.graph.initializers.values()]
    assert offsets[0] == offsets[1] != offsets[2]
    assert all(o % 4096 == 0 for o in offsets)


@pytest.mark.usefixtures("outside")
def test_one_open_file_serves_every_tensor(tmp_path: Path) -> None:
    """A large model has more tensors than a process may have open files."""
    storage.save(holding(*(np.full(300, i, np.float32) for i in range(40))), tmp_path)
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("counts open files through /proc")
    before = len(list(fds.iterdir()))
    g = storage.load(tmp_path)
    assert all(g.array(v)[0] == i for i, v in enumerate(g.model.graph.initializers.values()))
    assert len(list(fds.iterdir())) <= before + 2


@pytest.mark.usefixtures("outside")
def test_lazy_tensors_are_evaluated_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def make(i: int) -> ir.LazyTensor:
        def evaluate() -> ir.Tensor:
            alive.append(i)
            return ir.tensor(np.full((64, 64), i, np.float32))

        return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name=f"w{i}")

    g = holding(*(np.zeros((64, 64), np.float32) + i for i in range(3)))
    for i, v in enumerate(list(g.model.graph.initializers.values())):
        g.put(v, make(i))
    storage.save(g, tmp_path)
    assert alive == [0, 1, 2]
    assert [float(g.array(v)[0, 0]) for v in storage.load(tmp_path).model.graph.initializers.values()] == [0, 1, 2]


def test_a_small_result_takes_the_data_of_its_source_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result must not refer to the data file of its source, in this folder or another."""
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)
    g = tiny.encoder()
    source = storage.load(storage.save(g, tmp_path / "small_result_of_external"))
    monkeypatch.undo()
    file = storage.save(source, tmp_path / "out")
    assert names(tmp_path / "out") == ["model.onnx"]
    assert not external.locations(onnx.load(file, load_external_data=False))
    assert weights(storage.load(file)) == weights(g)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 18, "mine": 1]>
    agraph (float[n] x) => (float[n] y) { y = mine.twice(x) }
    <domain: "mine", opset_import: ["": 18]> twice (a) => (b) { b = Add(a, a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "f.onnx")
    g = storage.load(tmp_path / "f.onnx")
    assert [n.op_type for n in g.nodes()] == ["Add"]
    assert not g.model.functions
    g.verify()


def test_fingerprint_follows_content_not_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = tiny.encoder()
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)
    one, two = storage.save(g, tmp_path / "a"), storage.save(g, tmp_path / "b")
    assert storage.fingerprint(one) == storage.fingerprint(two)
    (data,) = (tmp_path / "b").glob("*.data")
    raw = bytearray(data.read_bytes())
    raw[5] ^= 1
    data.write_bytes(raw)
    assert storage.fingerprint(one) != storage.fingerprint(two)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    g = tiny.decoder()
    one, two = (
        storage.save(g, tmp_path / "a"),
        storage.save(storage.load(storage.save(g, tmp_path / "b")), tmp_path / "c"),
    )
    assert one.read_bytes() == two.read_bytes()


# ---- refused ---------------------------------------------------------------------------------------------------------


def _entry(t: onnx.TensorProto, key: str, value: str) -> None:
    found = [e for e in t.external_data if e.key == key]
    if found:
        found[0].value = value
    else:
        t.external_data.add(key=key, value=value)


def _first(m: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in m.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def _set(key: str, value: str) -> Change:
    return lambda m, _: _entry(_first(m), key, value)


def _absolute(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    _entry(_first(m), "location", str(data))


def _escape(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    data.rename(folder.parent / data.name)
    _entry(_first(m), "location", f"../{data.name}")


def _link(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    data.rename(folder.parent / data.name)
    data.symlink_to(folder.parent / data.name)


def _hard(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    os.link(data, folder.parent / "second")


def _short(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    data.write_bytes(data.read_bytes()[:-1])


def _gone(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    data.unlink()


def _pipe(m: onnx.ModelProto, folder: Path) -> None:
    (data,) = folder.glob("*.data")
    data.unlink()
    os.mkfifo(data)


def _overlap(m: onnx.ModelProto, folder: Path) -> None:
    _entry(m.graph.initializer[1], "offset", "64")


def _long(m: onnx.ModelProto, folder: Path) -> None:
    t = m.graph.initializer[0]
    t.ClearField("external_data")
    t.data_location = onnx.TensorProto.DEFAULT
    t.raw_data = bytes(4 * 5000 + 4)


def _shape(m: onnx.ModelProto, folder: Path) -> None:
    m.graph.initializer[0].dims[0] = -5


def _type(m: onnx.ModelProto, folder: Path) -> None:
    m.graph.initializer[0].data_type = 99


REFUSED: dict[str, tuple[Change, str]] = {
    "absolute": (_absolute, "absolute path"),
    "windows-absolute": (_set("location", "C:\\datafile.data"), "absolute path"),
    "escape": (_escape, "leaves the model's folder"),
    "deep-escape": (_set("location", "a/../../x.data"), "leaves the model's folder"),
    "nul": (_set("location", "x\0y"), "names no data file"),
    "symlink": (_link, "cp -L"),
    "hard-link": (_hard, "2 hard links.*cp "),
    "short": (_short, "has only"),
    "gone": (_gone, "cannot be read"),
    "pipe": (_pipe, "not a plain file"),
    "negative-offset": (_set("offset", "-4096"), "negative"),
    "negative-length": (_set("length", "-1"), "negative"),
    "length": (_set("length", "8"), "holds 8 bytes where its shape and type say 20000"),
    "offset-text": (_set("offset", "four"), "whole numbers"),
    "overlap": (_overlap, "overlap"),
    "over-long": (_long, "holds 20004 units of data"),
    "negative-shape": (_shape, "negative size"),
    "unknown-type": (_type, "unknown element type 99"),
}


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("how", REFUSED)
def test_unsafe_external_data_is_refused_by_name(tmp_path: Path, how: str) -> None:
    """Row 26 of pains.md."""
    change, why = REFUSED[how]
    file = storage.save(
        holding(np.arange(5000, dtype=np.float32), np.arange(6000, dtype=np.float32)), tmp_path / "model"
    )
    proto = onnx.load(file, load_external_data=False)
    change(proto, file.parent)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=why) as e:
        storage.load(file)
    assert str(file) in str(e.value)
    assert "w0" in str(e.value) or "w1" in str(e.value)
    if how not in ("unknown-type", "gone"):
        with pytest.raises(ModelError):
            storage.fingerprint(file)


@pytest.mark.usefixtures("outside")
def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    storage.save(holding(np.arange(5000, dtype=np.float32)), tmp_path)
    (data,) = tmp_path.glob("*.data")
    data.rename(tmp_path / "real.bin")
    data.symlink_to("real.bin")
    assert storage.load(tmp_path).nbytes == 20000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.binary(max_size=40))
def test_a_damaged_file_gives_one_model_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: bool, noise: bytes
) -> None:
    """Truncation or noise anywhere ends in a model that loads or a `ModelError`, never in anything else."""
    whole = ir.to_proto(tiny.encoder(layers=1, hidden=8, heads=2, ffn=8).model).SerializeToString()
    at %= len(whole)
    file = tmp_path_factory.mktemp("bad") / "m.onnx"
    file.write_bytes(whole[:at] if cut else whole[:at] + noise + whole[at + len(noise) :])
    try:
        loaded = storage.load(file)
    except ModelError as e:
        why = str(e)
    else:
        why = f"{file} loads: {loaded.opset}"
    assert str(file) in why


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle", b"\0" * 100])
def test_garbage_is_not_a_model(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.onnx"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.onnx: not an ONNX model or truncated"):
        storage.load(file)


def test_missing_empty_and_ambiguous_places(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        storage.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no \.onnx file in this folder$"):
        storage.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="onnxcomp export"):
        storage.load(tmp_path)
    for name in ("encoder.onnx", "decoder.onnx"):
        storage.save(tiny.mlp(), tmp_path, name=name)
    with pytest.raises(ModelError, match="decoder, encoder"):
        storage.load(tmp_path)
    assert list(storage.graphs_of(tmp_path)) == ["decoder", "encoder"]
    assert storage.graphs_of(tmp_path / "encoder.onnx") == {"encoder": tmp_path / "encoder.onnx"}


# ---- publishing ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("outside")
def test_source_and_result_share_a_folder(tmp_path: Path) -> None:
    storage.save(tiny.encoder(), tmp_path, name="a.onnx")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    g = storage.load(tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="never overwritten"):
        storage.save(g, tmp_path, name="a.onnx")
    storage.save(g, tmp_path, name="b.onnx")
    assert {p: p.read_bytes() for p in before} == before
    assert weights(storage.load(tmp_path / "b.onnx")) == weights(g)


@pytest.mark.usefixtures("outside")
def test_saving_again_replaces_the_old_data(tmp_path: Path) -> None:
    """Row 24 of pains.md: nothing is appended, nothing stays behind, not even what a killed run left."""
    for i in range(3):
        storage.save(holding(np.arange(5000, dtype=np.float32) + i), tmp_path)
    (tmp_path / ".onnxcomp-0123456789ab.tmp").write_bytes(b"of a run that was killed")
    (tmp_path / "model-0123456789ab.onnx.data").write_bytes(b"orphan")
    with atomic.temporary_file(tmp_path) as living:
        storage.save(holding(np.arange(5000, dtype=np.float32) + 9), tmp_path)
        assert len(names(tmp_path)) == 3
        assert living.exists()
    assert len(names(tmp_path)) == 2
    assert storage.load(tmp_path).nbytes == 20000


@pytest.mark.usefixtures("outside")
def test_data_of_an_old_result_still_in_use_stays(tmp_path: Path) -> None:
    storage.save(holding(np.arange(5000, dtype=np.float32)), tmp_path)
    (tmp_path / "copy.onnx").write_bytes((tmp_path / "model.onnx").read_bytes())
    storage.save(holding(np.arange(5000, dtype=np.float32) + 1), tmp_path)
    assert storage.load(tmp_path / "copy.onnx").nbytes == 20000


@pytest.mark.usefixtures("outside")
def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    g = holding(np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32))
    wrong = ir.LazyTensor(
        lambda: ir.tensor(np.zeros(3, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="w1"
    )
    g.put(list(g.model.graph.initializers.values())[1], wrong)
    with pytest.raises(ModelError, match="gave 12 bytes"):
        storage.save(g, tmp_path / "deep" / "out")
    assert names(tmp_path) == []
    storage.save(holding(np.ones((64, 64), np.float32)), tmp_path / "out")
    old = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ModelError):
        storage.save(g, tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == old


def test_an_output_that_cannot_be_written_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot be made"):
        storage.save(tiny.mlp(), tmp_path / "file" / "out")
    with pytest.raises(ModelError, match="is a file"), storage.publish(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("step", range(1, 7))
def test_a_kill_at_any_step_leaves_a_whole_model(tmp_path: Path, step: int) -> None:
    """A fork kills itself at the n-th file operation of a save over an older result."""
    storage.save(holding(np.zeros(5000, np.float32)), tmp_path)
    if (pid := os.fork()) == 0:
        left = [step]

        def counted(real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        os.replace, os.fsync, Path.unlink = counted(os.replace), counted(os.fsync), counted(Path.unlink)
        try:
            storage.save(holding(np.ones(5000, np.float32)), tmp_path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    g = storage.load(tmp_path)
    (v,) = g.model.graph.initializers.values()
    assert set(g.array(v)) in ({0.0}, {1.0})
    storage.save(holding(np.full(5000, 2, np.float32)), tmp_path / "model.onnx")
    storage_files = names(tmp_path)
    assert len(storage_files) == 1 or len(storage_files) == 2
    assert not any(n.endswith(".tmp") for n in storage_files)


@pytest.mark.usefixtures("outside")
def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"

    def half() -> None:
        with storage.publish(out) as staging:
            storage.save(tiny.mlp(), staging)
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        half()
    assert names(tmp_path) == []
    for seed in (0, 1):
        with storage.publish(out) as staging:
            storage.save(tiny.encoder(seed=seed), staging)
            (staging / "config.json").write_text(str(seed))
    assert (out / "config.json").read_text() == "1"
    assert len(names(out)) == 3
    assert weights(storage.load(out)) == weights(tiny.encoder(seed=1))
    assert names(tmp_path / "new") == ["folder"]


def test_companions_travel(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "b"
    storage.save(tiny.mlp(), source)
    for name in ("tokenizer.json", "config.json", "preprocessor_config.json", "datafile.bin", "secret.txt"):
        (source / name).write_text(name)
    out.mkdir()
    storage.copy_companions(source / "model.onnx", out)
    assert names(out) == ["config.json", "preprocessor_config.json", "tokenizer.json"]
    assert storage.copy_companions(source, source) == []


# ---- operator sets ---------------------------------------------------------------------------------------------------


def _softmax_11() -> Graph:
    text = """<ir_version: 8, opset_import: ["": 11]>
    agraph (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax <axis = 1> (x) }"""
    return Graph(ir.from_proto(onnx.parser.parse_model(text)))


def test_opset_conversion_arrives_and_keeps_meaning() -> None:
    """An opset-11 Softmax flattens its input; stamping 23 on it would silently change the numbers."""
    from onnx.reference import ReferenceEvaluator

    old = _softmax_11()
    new = convert(old, 23)
    assert (old.opset, new.opset) == (11, 23)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    (y,) = ReferenceEvaluator(ir.to_proto(new.model)).run(None, {"x": x})
    flat = np.exp(x.reshape(2, 12))
    assert np.allclose(y, (flat / flat.sum(1, keepdims=True)).reshape(2, 3, 4), atol=1e-6)


@pytest.mark.usefixtures("outside")
def test_opset_conversion_does_not_read_the_weights(tmp_path: Path) -> None:
    storage.save(tiny.encoder(spelled="dynamo"), tmp_path)
    g = storage.load(tmp_path)
    new = convert(g, 23)
    big = [v.const_value for v in new.model.graph.initializers.values() if v.const_value.nbytes > datafile.SMALL]
    assert (g.opset, new.opset) == (18, 23)
    assert big
    assert all(isinstance(t, mapped.MappedTensor) for t in big)
    assert convert(new, 18).opset == 23


def test_an_operator_without_a_way_up_is_one_error() -> None:
    text = """<ir_version: 8, opset_import: ["": 6]> agraph (float[2, 3] x) => (float[2, 3] y) { y = NoSuchOp (x) }"""
    with pytest.raises(ModelError, match="from opset 6 to 23"):
        convert(Graph(ir.from_proto(onnx.parser.parse_model(text))), 23)
