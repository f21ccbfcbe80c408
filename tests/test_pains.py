"""Rows of the list of users' pains with neighbouring tools, each as a test that it does not happen here."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcomp import blocks, target
from onnxcomp.benchmarking import benchmark
from onnxcomp.benchmarking.benchmark import BenchReport, Block, Rounds, Row
from onnxcomp.canonical import canonicalize
from onnxcomp.cli import diagnosis
from onnxcomp.data.datasets import Batch, as_dataset, load_data
from onnxcomp.engine import catalog
from onnxcomp.engine.compress import compress
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import ExportError, GateFailed, RecipeError, TargetError
from onnxcomp.exporter import routes
from onnxcomp.files import external, storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import costs, tensorrt
from onnxcomp.maths import formats
from onnxcomp.maths.saturation import breaks
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.reports import json_report
from onnxcomp.runtime import installed, sessions
from onnxcomp.runtime.placement import placement
from onnxcomp.runtime.sessions import Session
from onnxcomp.stats import histogram, minmax
from onnxcomp.stats.calibrate import collect
from onnxcomp.target import CPU, CUDA, TENSORRT
from onnxcomp.validation.gates import Gate
from tests import hand, matrix, tiny, zoo
from tests.lowering.test_weight_only import linear


def run(g, feeds):
    with sessions.Session(g) as s:
        return next(iter(s.run(feeds).values()))


def data(g, shapes=((2, 7),) * 4):
    return as_dataset([Batch(tiny.feeds(g, b, s, seed=i)) for i, (b, s) in enumerate(shapes)], g)


MEMORY = """
    import sys
    from onnxcomp.machine import peak_mib
    from onnxcomp.stats.calibrate import collect
    from onnxcomp.data.datasets import load_data
    from onnxcomp.stats import histogram
    from onnxcomp import blocks
    from tests import hand, matrix, tiny, zoo
    g = tiny.encoder(layers=2, hidden=256, ffn=1024, positions=200)
    data = load_data("random", g, None, batch=4, samples=int(sys.argv[1]), sequence=128)
    collect(g, [histogram(x.source) for x in blocks.linears(g)], data)
    print(round(1024 * peak_mib()))
"""


def peak(samples):
    code = textwrap.dedent(MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", code, str(samples)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    return int(done.stdout)


def test_rows_1_and_3_calibration_memory_does_not_grow_with_samples():
    # 4 MB of activations a sample: keeping them would add 128 MB between the two runs.
    assert peak(48) < 1.05 * peak(16)


def test_row_5_batches_may_differ_in_shape():
    g = tiny.encoder()
    mixed = PassManager([Qdq(min_size=1)]).run(g, data(g, ((2, 7), (1, 12), (3, 4), (2, 9))))
    assert mixed.report.step("qdq").changed > 0


def test_row_6_statistics_do_not_depend_on_the_batch_size():
    g = tiny.encoder()
    samples = load_data("random", g, None, batch=1, samples=12, sequence=9)
    name = next(iter(g.nodes("Gelu"))).outputs[0].name
    found = [collect(g, [histogram(name), minmax(name)], samples.rebatch(b)) for b in (1, 5, 12)]
    low, high = formats.clip_range(found[0][histogram(name)], method="entropy")
    for other in found[1:]:
        # Float sums inside the model may move a value over a bin's edge; the counts and the chosen range stay.
        assert (
            np.abs(found[0][histogram(name)] - other[histogram(name)]).sum() <= 2e-3 * found[0][histogram(name)].sum()
        )
        np.testing.assert_allclose(found[0][minmax(name)], other[minmax(name)], rtol=1e-5)
        np.testing.assert_allclose(formats.clip_range(other[histogram(name)], method="entropy"), (low, high), rtol=1e-2)


def test_row_17_failing_shape_inference_is_not_fatal():
    g = tiny.encoder()
    x = g.outputs[0]
    # A custom operator has no shape function: everything behind it stays unknown.
    g.model.opset_imports["custom.example"] = 1
    strange = g.op("Mystery", next(g.nodes("Gelu")).outputs[0], domain="custom.example")
    g.infer_shapes()
    assert strange.shape is None
    assert x.shape == ir.Shape(["batch", "sequence", 32])
    g.verify()


def test_row_29_zero_points_are_refused_before_anything_is_written():
    g = tiny.mlp(hidden=32, ffn=64)
    batches = as_dataset([tiny.feeds(g, 2, 5, seed=i) for i in range(3)], g)
    for pass_ in (Qdq(symmetric=False), Qdq(activations="u8")):
        with pytest.raises(TargetError, match="tensorrt"):
            PassManager([pass_], target=TENSORRT).run(g, batches)
    legal = PassManager([Qdq()], target=TENSORRT).run(g, batches).model
    for node in legal.nodes("QuantizeLinear", "DequantizeLinear"):
        assert len(node.inputs) < 3 or not legal.array(node.inputs[2]).any()
        assert node.inputs[0].dtype != ir.DataType.UINT8
    with pytest.raises(TargetError, match="cuda"):
        PassManager([Qdq()], target=CUDA).run(g, batches)


def test_row_27_what_keeps_int8_from_being_faster_on_tensorrt_is_named():
    g = tiny.encoder(hidden=32, ffn=64)
    made = PassManager([Qdq(min_size=1), Lower()], target=TENSORRT).run(g, data(g)).model
    products = [n for n in made.nodes("MatMul") if any(quantized(v) for v in n.inputs)]
    assert len(products) == 12
    assert all(quantized(v) for n in products for v in n.inputs), "each is an integer product, none half of one"
    assert tensorrt.check(made) == []
    node = products[0]
    there = made.op("Transpose", node.inputs[1], perm=[1, 0])
    made.set_input(node, 1, made.op("Transpose", there, perm=[1, 0]))
    made.sort()
    assert [n for n in tensorrt.require(made, TENSORRT) if "'direct'" in n and f"'{node.name}'" in n]


def quantized(v):
    return v is not None and v.producer() is not None and v.producer().op_type == "DequantizeLinear"


def test_row_29_zero_points_of_another_tool_are_refused_too():
    g = tiny.mlp(hidden=32, ffn=64)
    other = PassManager([Qdq(clip="minmax")]).run(g, data(g, ((2, 7),) * 6)).model
    assert any(other.array(n.inputs[2]).any() for n in other.nodes("QuantizeLinear"))
    with pytest.raises(TargetError, match="rule 'symmetric-int8' at '"):
        tensorrt.require(other, TENSORRT)


def test_row_30_a_quantized_bias_is_refused_and_never_made():
    g = tiny.mlp(hidden=32, ffn=64)
    made = PassManager([Qdq(), Lower()], target=TENSORRT).run(g, data(g)).model
    assert all(x.bias is not None and x.bias.dtype is ir.DataType.FLOAT for x in blocks.linears(made))
    add = blocks.linears(made)[0].add
    n = int(add.outputs[0].shape[-1])
    codes, scale = np.ones(n, np.int32), np.full(n, 0.01, np.float32)
    place = next(i for i, v in enumerate(add.inputs) if made.is_constant(v))
    made.set_input(add, place, made.op("DequantizeLinear", codes, scale, axis=0))
    made.sort()
    with pytest.raises(TargetError, match="bias of"):
        tensorrt.require(made, TENSORRT)


def test_row_31_asymmetric_ranges_are_sane_and_the_output_is_checked():
    g = tiny.mlp(hidden=32, ffn=64)
    rng = np.random.default_rng(0)
    # All positive, far from zero: the case in which a wrong zero point ruins everything.
    feeds = [{"x": (100 + rng.standard_normal((4, 8, 32))).astype(np.float32)} for _ in range(6)]
    result = PassManager([Qdq(clip="minmax")], gate=Gate(["sqnr>=20"])).run(g, as_dataset(feeds, g))
    for node in result.model.nodes("QuantizeLinear"):
        scale, zero = (result.model.array(v) for v in node.inputs[1:3])
        assert np.isfinite(scale)
        assert scale > 0
        assert zero.dtype == np.uint8
    assert result.report.verdicts[0].passed


def test_row_38_quantized_model_keeps_its_dynamic_axes():
    g = tiny.encoder()
    result = PassManager(Recipe.preset("int8").passes, allow_unchanged=True).run(g, data(g)).model
    for batch, sequence in ((1, 3), (5, 19)):
        assert run(result, tiny.feeds(g, batch, sequence)).shape == (batch, sequence, 32)


def test_row_42_quickstart_is_small_and_offline():
    from tests.test_pages import blocks

    commands = "\n".join(text for language, text in blocks() if language == "bash")
    assert "models/weights/docs_lm" in commands
    assert "http" not in commands


def test_row_43_two_runtimes_overwriting_each_other_are_noticed(monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else real(name)
    )
    assert set(installed.installed_runtimes()) >= {"onnxruntime", "onnxruntime-gpu"}


def test_row_44_an_onnx_file_is_pruned_directly(tmp_path):
    source = tiny.external(tiny.decoder(spelled="dynamo"), tmp_path)
    passes = ["canonicalize", "prune-ffn: {ratio: 0.5}", "prune-heads: {ratio: 0.5}"]
    batches = [tiny.feeds(storage.load(source), 4, 8, seed=i) for i in range(10)]
    result = compress(source, tmp_path / "out", passes=passes, calibration=batches, measure=False)
    assert (
        storage.load(tmp_path / "out" / source.name).nbytes == result.model.nbytes < 0.8 * storage.load(source).nbytes
    )


def test_row_45_head_counts_and_reshapes_follow_a_cut():
    g = tiny.encoder(spelled="dynamo")
    half = catalog.load("prune-heads")(ratio=0.5, ranking="layer", score="magnitude", repair="none")
    passes = [catalog.load("canonicalize")(), half]
    result = PassManager(passes).run(g).model
    assert {a.heads for a in blocks.attentions(result)} == {2}
    for a in blocks.attentions(result):
        assert a.q.sizes == (32, 16)
        assert a.o.sizes == (16, 32)
    again = PassManager([catalog.load("canonicalize")()]).run(result).model
    for feeds in (tiny.feeds(g, 2, 7), tiny.feeds(g, 1, 12)):
        np.testing.assert_allclose(run(again, feeds), run(result, feeds), atol=1e-6)


def test_row_47_a_pass_that_changes_nothing_says_so():
    g = tiny.encoder()
    with pytest.raises(RecipeError, match="changed none of the"):
        PassManager([Qdq(min_size=10**9)]).run(g, data(g))
    step = PassManager([Qdq(min_size=1, skip=("MatMul",))], allow_unchanged=True).run(g, data(g)).report.step("qdq")
    assert step.eligible == step.changed + len(step.declined)
    assert all(d.why for d in step.declined)


def kept(name):
    """A kept export and its canonical form."""
    source = matrix.load(name)
    new = source.clone()
    canonicalize(new)
    return source, new


def test_row_10_a_fused_model_still_has_every_linear_quantized():
    source, new = kept("bert.legacy-eager-17-ort-optimizer")
    assert any(n.domain == "com.microsoft" for n in source.nodes())
    linears = len(blocks.linears(new))
    feeds = [matrix.taken(source, zoo.feeds(zoo.BY_NAME["bert"], 2, 9)) for _ in range(3)]
    result = PassManager([Canonicalize(), Qdq(min_size=1)]).run(source, as_dataset(feeds, source))
    assert linears >= 12
    assert sum(x.quantized for x in blocks.linears(result.model)) == linears


@pytest.mark.parametrize(
    ("eager", "sdpa", "attentions"),
    [
        ("bert.dynamo-eager-18", "bert.dynamo-sdpa-18", 2),
        ("llama.dynamo-eager-18", "llama.dynamo-sdpa-18", 2),
        ("bart.dynamo-eager-17", "bart.dynamo-sdpa-17", 6),
    ],
)
def test_row_11_attention_implementations_give_the_same(eager, sdpa, attentions):
    one, other = kept(eager)[1], kept(sdpa)[1]
    assert len(blocks.attentions(one)) == len(blocks.attentions(other)) == attentions
    assert matrix.signature(one) == matrix.signature(other)


def test_row_12_an_attention_is_raised_or_told_why():
    for name in ("clip-text.legacy-sdpa-15", "clip-vision.dynamo-sdpa-18-ort-optimizer", "gpt2.legacy-sdpa-14"):
        _, new = kept(name)
        assert len(blocks.attentions(new)) == 2
    source = tiny.encoder(layers=1, spelled="dynamo")
    softmax = next(source.nodes("Softmax"))
    other = source.op("ReduceSum", softmax.outputs[0], np.array([-1], np.int64), like=None)
    read = tiny.finish(source, other, "sums", ["batch", 4, "sequence", 1])
    canonicalize(read)
    assert [(d.site, d.why) for d in read.declined] == [
        (softmax.name, "attention: the attention probabilities have other users")
    ]


def test_row_13_no_reshape_of_a_reshape():
    for name in ("bert.dynamo-sdpa-18", "gpt2.dynamo-sdpa-18", "vit.dynamo-sdpa-18", "whisper.dynamo-sdpa-21"):
        source, new = kept(name)
        twice = [n for n in new.nodes("Reshape") if getattr(n.inputs[0].producer(), "op_type", "") == "Reshape"]
        assert twice == []
        assert len(list(new.nodes("Reshape"))) < len(list(source.nodes("Reshape")))


def test_row_14_hand_written_attention_and_both_exporters_end_alike():
    by_hand = tiny.encoder(layers=2, spelled="dynamo")
    canonicalize(by_hand)
    graphs = [by_hand, kept("bert.dynamo-sdpa-18")[1], kept("bert.legacy-sdpa-14")[1]]
    assert [len(blocks.attentions(g)) for g in graphs] == [2, 2, 2]
    assert all(not list(g.nodes("Softmax")) for g in graphs)


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3)])
def test_row_16_causal_attention_over_other_lengths_gets_an_explicit_mask(queries, keys):
    g = hand.graph(opset=23, q=("b", "s", 32), k=("b", "t", 32), v=("b", "t", 32))
    y = g.op("Attention", *g.inputs, q_num_heads=4, kv_num_heads=4, is_causal=1)
    source, new = hand.raised(g, y, "b", "s", 32)
    node = next(new.nodes("Attention"))
    assert "is_causal" not in node.attributes
    assert node.inputs[3] is not None
    rng = np.random.default_rng(0)
    sizes = {"q": queries, "k": keys, "v": keys}
    hand.same(source, new, **{n: rng.standard_normal((2, s, 32)).astype(np.float32) for n, s in sizes.items()})


@pytest.mark.parametrize("bits", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8])
@pytest.mark.parametrize("chain", ["plain", "turned", "turned per column", "groups", "contrib"])
def test_row_50_quantized_weights_are_recognised_whatever_their_chain(bits, chain):
    rng = np.random.default_rng(0)
    g = hand.graph(opset=21, x=("b", "s", 32))
    low, high = (0, 15) if bits is ir.DataType.UINT4 else (-8, 7)
    w = rng.integers(low, high, (32, 6)).astype(np.int8).astype(bits.numpy())
    s = rng.random((2, 6)).astype(np.float32)
    z = rng.integers(max(low, 0), 3, (2, 6)).astype(np.int8).astype(bits.numpy())

    def held(*arrays):
        return [
            g.constant(ir.tensor(np.ascontiguousarray(a), dtype=bits if i != 1 else None)) for i, a in enumerate(arrays)
        ]

    if chain in ("plain", "contrib"):
        domain = "com.microsoft" if chain == "contrib" else ""
        made = g.op("DequantizeLinear", *held(w, s, z), axis=0, block_size=16, domain=domain)
    elif chain == "turned":
        made = g.op("DequantizeLinear", *held(w.T, s.T, z.T), axis=1, block_size=16)
    elif chain == "groups":
        parts = held(w.reshape(2, 16, 6), s[:, None], z[:, None])
        made = g.op("Reshape", g.op("DequantizeLinear", *parts, axis=1, block_size=16), hand.i64(32, 6))
    else:
        made = g.op("DequantizeLinear", *held(w.T, s[0], z[0]), axis=0)
    made = g.op("Transpose", made, perm=[1, 0]) if chain.startswith("turned") else made
    _, new = hand.raised(g, g.op("MatMul", g.inputs[0], made), "b", "s", 6)
    assert hand.ops(new) == {"DequantizeLinear": 1, "MatMul": 1}
    linear = blocks.linears(new)[0]
    assert linear.quantized
    assert linear.sizes == (32, 6)
    x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    rows = s[:1].repeat(32, 0) if "column" in chain else s.repeat(16, 0)
    zeros = z[:1].repeat(32, 0) if "column" in chain else z.repeat(16, 0)
    want = x @ ((w.astype(np.float64) - zeros.astype(np.float64)) * rows)
    # The runtime makes MatMulNBits of it, which rounds what it multiplies; the reference does not.
    (got,) = ReferenceEvaluator(ir.to_proto(new.model)).run(None, {"x": x})
    np.testing.assert_allclose(got, want, atol=1e-4)


# ---- speed, placement, size, export ----------------------------------------------------------------------------------


def slower_result(models, target, shapes=(), **_):
    """A benchmark in which every model but the first takes twice the time."""
    names = [str(m) for m in models]
    times = [1.0 if i == 0 else 2.0 for i in range(len(names))]
    rounds = Rounds(tuple(tuple(Block((t, t), 0.0) for t in times) for _ in range(8)))
    rows = [
        Row(n, "batch=1", t, t, t, t, 16, 0, 1 / t, None, 1.0, 0.1, 1.0, "CPUExecutionProvider", 2)
        for n, t in zip(names, times, strict=True)
    ]
    return BenchReport(rows=rows, machine={"cpu": "a cpu"}, models=names, rounds={"batch=1": rounds})


def test_row_7_a_slower_int8_model_is_said_first_and_a_gate_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "bench", slower_result)
    g = tiny.mlp(hidden=32, ffn=64)
    batches = [tiny.feeds(g, 2, 5, seed=i) for i in range(4)]
    storage.save(g, tmp_path / "source.onnx")
    made = {"passes": ["qdq"], "calibration": batches, "shapes": [{"batch": 1, "sequence": 8}]}
    result = compress(tmp_path / "source.onnx", tmp_path / "out", **made)
    assert result.report.step("qdq").changed > 0
    assert json_report.headline(result.report).startswith("slower than the original: 0.50x")
    with pytest.raises(GateFailed, match=r"latency<=1x"):
        compress(tmp_path / "source.onnx", tmp_path / "refused", **made, gates=["latency<=1x"])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("features", "limited", "said"),
    [
        ({"avx2"}, True, "saturate at 16 bits"),
        ({"avx2", "vnni"}, False, "fast and exact"),
        ({"dotprod"}, False, "fast and exact"),
    ],
)
def test_row_8_the_instruction_set_decides_the_codes_and_doctor_says_why(monkeypatch, features, limited, said):
    for module in (target, diagnosis):
        monkeypatch.setattr(module, "cpu_features", lambda: frozenset(features))
    g = tiny.mlp(hidden=32, ffn=64)
    made = PassManager([Qdq()], target=target.find("cpu")).run(g, data(g)).model
    codes = [made.array(n.inputs[0]) for n in made.nodes("DequantizeLinear") if made.is_constant(n.inputs[0])]
    assert {n.inputs[2].dtype for n in made.nodes("QuantizeLinear")} == {ir.DataType.UINT8}
    assert all(np.abs(c.astype(int)).max() > 64 for c in codes)  # eight bits on every kind
    assert {bool(breaks(c).any()) for c in codes} == {not limited}
    [check] = [c for c in diagnosis.diagnose()["checks"] if c["check"] == "int8"]
    assert said in check["detail"]
    assert ("limits pairs of weights" in check["advice"]) is limited
    with pytest.raises(TargetError, match=r"'s8' are not legal on 'cpu' .*; use u8"):
        PassManager([Qdq(activations="s8")], target=target.find("cpu")).run(g, data(g))


@pytest.mark.parametrize("where", [CPU, CUDA, TENSORRT], ids=lambda t: t.name)
def test_row_15_every_operator_of_a_lowered_model_has_a_kernel_on_the_targets_provider(where):
    source, _ = kept("bert.dynamo-sdpa-18")
    made = PassManager([Canonicalize(), Lower()], target=where).run(source).model
    assert placement(made, where, None).elsewhere == ()
    if where is CPU:
        found = placement(made, where, matrix.taken(made, zoo.feeds(zoo.BY_NAME["bert"], 2, 9)))
        assert found.ran
        assert list(found.nodes) == ["CPUExecutionProvider"]


def test_row_19_fixing_axes_above_two_gigabytes_reads_no_weight(tmp_path, monkeypatch):
    g = hand.graph(x=("batch", "sequence", 16384))
    g.model.graph.register_initializer(
        ir.Value(
            name="w",
            const_value=ir.ExternalTensor(
                "w.bin",
                0,
                4 * 16384 * 34000,
                ir.DataType.FLOAT,
                shape=ir.Shape([16384, 34000]),
                name="w",
                base_dir=tmp_path,
            ),
        )
    )
    w = g.model.graph.initializers["w"]
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([16384, 34000])
    y = g.op("MatMul", g.op("Transpose", g.inputs[0], perm=[1, 0, 2]), w)
    tiny.finish(g, y, "y", ["sequence", "batch", 34000])
    (tmp_path / "big.onnx").write_bytes(ir.to_proto(g.model).SerializeToString())
    with (tmp_path / "w.bin").open("wb") as f:
        f.truncate(4 * 16384 * 34000)

    def read(*_):
        raise AssertionError("a weight was read")

    for name in ("numpy", "tobytes", "tofile"):
        monkeypatch.setattr(external.MappedTensor, name, read)
    big = storage.load(tmp_path / "big.onnx")
    big.inputs[0].shape = ir.Shape([2, 5, 16384])
    fixed = Graph(big.model)
    canonicalize(fixed)
    fixed.infer_shapes()
    fixed.verify()
    assert fixed.nbytes > 2**31
    [linear] = blocks.linears(fixed)
    assert linear.sizes == (16384, 34000)
    assert {tuple(n.outputs[0].shape) for n in fixed.nodes("MatMul")} <= {(2, 5, 34000), (5, 2, 34000)}


def test_row_28_attention_stays_float_where_only_the_feed_forward_part_gets_faster(monkeypatch):
    g = tiny.encoder(hidden=32, ffn=64)

    def fake(forms, shapes, *_):
        wide = {n: 64 in (shapes["x"][-1], *(v.shape[-1] for v in m.outputs)) for n, m in forms.items()}
        return {n: 1e-3 if n == "float" else 0.5e-3 if wide[n] else 2e-3 for n in forms}

    monkeypatch.setattr(costs, "_time", fake)
    sizes = [{"batch": 2, "sequence": 8}]
    made = PassManager([Qdq(min_size=1)], shapes=sizes, measure=True).run(g, data(g))
    integers = {x.name for x in blocks.linears(made.model) if x.quantized}
    feed_forward = {x.name for x in blocks.linears(made.model) if 64 in x.sizes}
    assert integers == feed_forward
    assert 0 < len(integers) < len(blocks.linears(made.model))
    lost = made.report.step("qdq").declined
    assert all("integers would be slower" in d.why for d in lost)
    assert len(lost) == len(blocks.linears(made.model)) - len(integers)


def test_row_35_the_accuracy_level_of_a_blockwise_product_is_never_lost_nor_made_up():
    rng = np.random.default_rng(0)
    g = hand.graph(opset=21, x=("b", "s", 32))
    codes, scales = rng.integers(0, 256, (16, 2, 8), np.uint8), rng.random(32).astype(np.float32)
    g.model.opset_imports["com.microsoft"] = 1
    attrs = {"K": 32, "N": 16, "bits": 4, "block_size": 16, "accuracy_level": 4}
    y = g.op("MatMulNBits", g.inputs[0], codes, scales, domain="com.microsoft", **attrs)
    source, new = hand.raised(g, y, "b", "s", 16)
    made = PassManager([Canonicalize(), Lower()], allow_unchanged=True).run(source).model
    for after in (new, made):
        [node] = after.nodes("MatMulNBits")
        assert {k: a.value for k, a in node.attributes.items()} == attrs
    hand.same(source, made, x=rng.standard_normal((2, 3, 32)).astype(np.float32))
    plain, _ = kept("bert.dynamo-sdpa-18")
    lowered = PassManager(Recipe.preset("int8").passes, allow_unchanged=True).run(plain, encoded(plain)).model
    assert not list(lowered.nodes("MatMulNBits"))


def test_row_34_inputs_that_8_bits_ruin_are_seen_and_can_stay_float():
    """One channel of massive activations: at accuracy level 4 its block of inputs is rounded to nothing."""
    g, w, x = linear(4, 32, k=64, bias=False)
    x[:, 0] = 3000
    rest = x.astype(np.float64)
    base = rest[:, 1:] @ w[1:]  # what the other channels say

    def said(inputs: str) -> np.ndarray:
        made = PassManager([Lower(inputs=inputs)]).run(g).model
        with Session(made) as s:
            return s.run({"x": x})["y"].astype(np.float64) - rest[:, :1] * w[:1]

    kept, lost = (np.mean(said(i).argmax(axis=1) == base.argmax(axis=1)) for i in ("float", "int8"))
    assert kept == 1
    assert lost < 0.8


def encoded(g):
    return as_dataset([matrix.taken(g, zoo.feeds(zoo.BY_NAME["bert"], 2, 9)) for _ in range(3)], g)


def test_row_41_exporters_and_attentions_are_tried_in_order_and_the_one_that_worked_is_recorded(tmp_path, monkeypatch):
    asked = []

    class Model:
        def set_attn_implementation(self, name):
            asked.append(name)

    def broken(job, opset):
        raise ValueError("a minor upgrade broke it")

    def second(job, opset):
        if asked[-1] == "sdpa":
            raise KeyError("sdpa_mask")
        return "program"

    monkeypatch.setattr(routes, "ROUTES", {"first": broken, "second": second})
    monkeypatch.setattr(routes, "write", lambda job, program, opset, staging: None)
    monkeypatch.setattr(routes.Work, "verify", lambda job, file: {"outputs": {}})
    job = routes.Work(Model(), "feature-extraction", "fp32", 20, {}, ("input_ids",))
    found = routes.first_verified(job, tmp_path, lambda line: None)
    assert (found["route"], found["attention"]) == ("second", "eager")
    tried = [(a["route"], a["attention"]) for a in job.attempts]
    assert tried == [("first", "sdpa"), ("second", "sdpa"), ("first", "eager")]
    assert "a minor upgrade broke it" in job.attempts[0]["error"]
    monkeypatch.setattr(routes, "ROUTES", {"first": broken})
    with pytest.raises(ExportError, match=r"first .sdpa.* a minor upgrade broke it; first .eager"):
        routes.first_verified(job, tmp_path, lambda line: None)


def test_row_51_tokens_are_merged_on_a_fixed_schedule_after_export():
    """The number of tokens of every layer is decided when the graph is edited; no loop, no dependence on the batch."""
    g = tiny.encoder(spelled="dynamo", classes=3, sequence=12)
    passes = [catalog.load("canonicalize")(), catalog.load("merge-tokens")(ratio=0.5)]
    merged = PassManager(passes).run(g, [tiny.feeds(g, 2, 12, seed=i) for i in range(6)]).model
    assert not list(merged.nodes("Loop", "If", "Scan"))
    last = blocks.attentions(merged)[-1].q.source.name
    for batch in (1, 3):
        feeds = tiny.feeds(g, batch, 12)
        assert run(merged, feeds).shape == run(g, feeds).shape
        with sessions.Session(merged, taps=[last]) as s:
            assert s.run(feeds, [last])[last].shape[1] < 12
