"""What the fuzzer changes: bytes of any file, and models, recipes, data, tokenizers and caches in their own terms."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tests import tiny

Rng = np.random.Generator
NUMBERS = (0, 1, -1, 2, 3, 7, 64, -3, 1 << 20, 1 << 31, (1 << 62) + 1, -(1 << 63), (1 << 63) - 1)
TEXTS = (
    "",
    "x",
    "y",
    "..",
    "/etc/passwd",
    "\0",
    "é",
    "a" * 300,
    "com.microsoft",
    "batch",
    "-1",
    "None",
    "$(id)",
    "1e999",
)
OPERATORS = (
    "Add", "Attention", "Cast", "Concat", "Constant", "ConstantOfShape", "Conv", "DequantizeLinear", "Einsum", "Expand",
    "Flatten", "Gather", "GatherND", "Gemm", "If", "LayerNormalization", "Loop", "LSTM", "MatMul", "Mul", "OneHot",
    "Pad", "QuantizeLinear", "Range", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Scan", "ScatterND", "Shape",
    "Slice", "Softmax", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Identity",
    "NoSuchThing",
)  # fmt: skip
TEXT_MODELS = (
    """<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x, bool c) => (float[n, 4] y)
    <float[4, 4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> {
        m = MatMul (x, w)
        y = If (c) <then_branch = a () => (float[n, 4] t) { t = Relu (m) },
                    else_branch = b () => (float[n, 4] e) { e = Neg (m) }>
    }""",
    """<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x) => (float[n, 4] y) <int64 k = {3}> {
        y = Loop (k, , x) <body = b (int64 i, bool go, float[n, 4] c) => (bool on, float[n, 4] d) {
            on = Identity (go)
            d = Add (c, c) }>
    }""",
    """<ir_version: 10, opset_import: ["": 18, "f": 1]> g (float[n, 4] x) => (float[n, 4] y) {
        a = f.twice (x)
        y = f.twice (a)
    }
    <domain: "f", opset_import: ["": 18, "f": 1]> twice (a) => (c) { b = f.once (a)  c = f.once (b) }
    <domain: "f", opset_import: ["": 18]> once (a) => (b) { b = Add (a, a) }""",
    """<ir_version: 10, opset_import: ["": 18]> g (float[n, 3, 8, 8] x) => (float[n, 2] y)
    <float[2, 3, 3, 3] w = {0.1}, int64[2] s = {0, -1}, int64[2] a = {2, 3}> {
        h = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (h)
        y = ReduceMean <keepdims = 0> (r, a)
    }""",
    """<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x, int64[k] i) => (float[k, p] y, int64[2] z) {
        s = Shape (x)
        b = Constant <value = int64[1] {2}> ()
        f = ConstantOfShape <value = float[1] {0.5}> (b)
        e = Expand (f, b)
        r = Gather (x, i)
        d = Concat <axis = 0> (b, b, b, b)
        p = Pad (r, d)
        t = Tile (x, s)
        y = Slice (r, b, b)
        z = Identity (s)
    }""",
    """<ir_version: 10, opset_import: ["": 18]> g (uint8[n, 4] q) => (float[n, 4] y)
    <float s = {0.1}, uint8 z = {3}, int8[4, 4] w = {1}, float[4] ws = {1,1,1,1}> {
        x = DequantizeLinear (q, s, z)
        v = DequantizeLinear <axis = 1> (w, ws)
        y = MatMul (x, v)
    }""",
)


@functools.cache
def _bases() -> list[bytes]:
    graphs = [tiny.encoder(layers=1), tiny.decoder(layers=1), tiny.linear(), tiny.encoder(layers=1, spelled="dynamo")]
    made = [ir.to_proto(g.model).SerializeToString() for g in graphs]
    for text in TEXT_MODELS:
        try:
            made.append(onnx.parser.parse_model(text).SerializeToString())
        except onnx.parser.ParseError as e:
            raise AssertionError(text) from e
    return made


def base(rng: Rng) -> onnx.ModelProto:
    """One of some small models."""
    return onnx.ModelProto.FromString(pick(rng, _bases()))


def encoder() -> onnx.ModelProto:
    """A model that takes texts."""
    return onnx.ModelProto.FromString(_bases()[0])


def pick(rng: Rng, some: Sequence[Any]) -> Any:
    """One of some things."""
    return some[int(rng.integers(len(some)))]


def damaged(rng: Rng, content: bytes, times: int) -> bytes:
    """Bytes changed, cut out, repeated or put in."""
    a = bytearray(content)
    for _ in range(times):
        at, n = int(rng.integers(len(a) + 1)), 1 + int(rng.integers(8))
        match int(rng.integers(5)):
            case 0:
                a[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                del a[at : at + n * 8]
            case 2:
                a[at:at] = a[max(0, at - n * 16) : at]
            case 3:
                a[at:at] = rng.bytes(n)
            case _:
                if at < len(a):
                    a[at] ^= 1 << int(rng.integers(8))
    return bytes(a)


# ---- models ----------------------------------------------------------------------------------------------------------


def _graphs(m: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [m.graph, *(a.g for n in m.graph.node for a in n.attribute if a.HasField("g"))]


def _names(g: onnx.GraphProto) -> list[str]:
    made = [x for n in g.node for x in (*n.input, *n.output)]
    return [*made, *(v.name for v in (*g.input, *g.output)), *(t.name for t in g.initializer), "", "nowhere"]


def _rewire(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    if g.node:
        n = pick(rng, g.node)
        ports = n.input if rng.random() < 0.7 else n.output
        if len(ports):
            ports[int(rng.integers(len(ports)))] = pick(rng, _names(g))


def _arity(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    if g.node:
        n = pick(rng, g.node)
        ports = n.input if rng.random() < 0.7 else n.output
        if len(ports) and rng.random() < 0.5:
            del ports[int(rng.integers(len(ports))) :]
        else:
            ports.extend([pick(rng, _names(g))] * (1 + int(rng.integers(3))))


def _operator(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    if g.node:
        n = pick(rng, g.node)
        n.op_type = pick(rng, OPERATORS) if rng.random() < 0.8 else pick(rng, TEXTS)
        if rng.random() < 0.2:
            n.domain = pick(rng, TEXTS)


def _node(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    if g.node:
        at = int(rng.integers(len(g.node)))
        copy = onnx.NodeProto.FromString(g.node[at].SerializeToString())
        if rng.random() < 0.5:
            del g.node[at]
        else:
            if rng.random() < 0.5:
                copy.output[:] = [f"{x}_{int(rng.integers(3))}" for x in copy.output]
            g.node.append(copy)


def _attribute(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    n = pick(rng, g.node) if g.node else onnx.NodeProto()
    names = (
        "axis",
        "axes",
        "perm",
        "to",
        "keepdims",
        "epsilon",
        "equation",
        "num_heads",
        "shape",
        "mode",
        "value",
        "body",
    )
    if not n.attribute or rng.random() < 0.3:
        n.attribute.add().CopyFrom(onnx.AttributeProto(name=pick(rng, names), type=onnx.AttributeProto.INT, i=1))
    a = pick(rng, n.attribute)
    match int(rng.integers(7)):
        case 0:
            a.i, a.f = int(pick(rng, NUMBERS)), float(pick(rng, (0.0, float("nan"), float("inf"), -1.0)))
        case 1:
            a.ints[:] = [int(pick(rng, NUMBERS)) for _ in range(int(rng.integers(5)))]
        case 2:
            a.type = int(rng.integers(16))
        case 3:
            a.s = pick(rng, TEXTS).encode()
        case 4:
            a.name = pick(rng, names)
        case 5:
            a.g.ParseFromString(m.graph.SerializeToString())  # a copy of what holds it would be endless
            a.type = onnx.AttributeProto.GRAPH
        case _:
            del n.attribute[:]


def _constant(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    tensors = [*g.initializer, *(a.t for n in g.node for a in n.attribute if a.HasField("t"))]
    if not tensors:
        g.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), pick(rng, _names(g))))
        return
    t = pick(rng, tensors)
    match int(rng.integers(7)):
        case 0:
            t.dims[:] = [int(pick(rng, NUMBERS)) for _ in range(int(rng.integers(4)))]
        case 1:
            t.data_type = int(rng.integers(28))
        case 2:
            t.raw_data = damaged(rng, t.raw_data, 3)
        case 3:
            t.name = pick(rng, _names(g))
        case 4:
            a = rng.integers(-5, 1 << 40, [int(rng.integers(4)) for _ in range(int(rng.integers(3)))])
            name = t.name
            t.CopyFrom(onnx.numpy_helper.from_array(a.astype(pick(rng, [np.int64, np.float32, np.float16, bool]))))
            t.name = name
        case 5:
            t.string_data[:] = [b"a"]
            t.data_type = onnx.TensorProto.STRING
        case _:
            g.initializer.add().CopyFrom(t)


def _port(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    ports = g.input if rng.random() < 0.6 else g.output
    if not ports:
        return
    v = pick(rng, ports)
    match int(rng.integers(7)):
        case 0:
            v.type.tensor_type.elem_type = int(rng.integers(28))
        case 1:
            shape = v.type.tensor_type.shape
            if shape.dim:
                d = pick(rng, shape.dim)
                if rng.random() < 0.5:
                    d.dim_value = int(pick(rng, NUMBERS))
                else:
                    d.dim_param = pick(rng, TEXTS)
        case 2:
            v.type.tensor_type.shape.dim.add()
        case 3:
            v.type.Clear()
        case 4:
            v.name = pick(rng, _names(g))
        case 5:
            ports.remove(v)
        case _:
            ports.add().CopyFrom(v)


def _header(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    match int(rng.integers(6)):
        case 0:
            m.ir_version = int(pick(rng, (0, 1, 3, 4, 7, 9, 12, 99, 1 << 40)))
        case 1:
            if m.opset_import:
                pick(rng, m.opset_import).version = int(pick(rng, (0, 1, 7, 9, 11, 13, 17, 21, 23, 25, 99, -1)))
        case 2:
            m.opset_import.add().CopyFrom(onnx.OperatorSetIdProto(domain=pick(rng, TEXTS), version=1))
        case 3:
            key = pick(rng, ("onnxcomp.gone", "onnxcomp.token_ids", "task", "onnxcomp.schema"))
            m.metadata_props.add().CopyFrom(
                onnx.StringStringEntryProto(key=key, value=pick(rng, ("[", "[[1]]", "5;0;9", *TEXTS)))
            )
        case 4:
            del m.opset_import[:]
        case _:
            m.graph.name = pick(rng, TEXTS)


def _function(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """Functions that double what the one before makes, or that call themselves."""
    count = int(pick(rng, (1, 4, 10, 40)))
    for i in range(count):
        below = f"f{i - 1}" if i else "Identity"
        f = m.functions.add(name=f"f{i}", domain="d")
        f.input[:], f.output[:] = ["a"], ["c"]
        f.opset_import.add(domain="", version=18)
        f.opset_import.add(domain="d", version=1)
        domain = "d" if i else ""
        f.node.add(op_type=below, domain=domain, input=["a"], output=["b"])
        f.node.add(op_type=below, domain=domain, input=["b"], output=["c"])
    if rng.random() < 0.3:
        m.functions[0].node[0].op_type, m.functions[0].node[0].domain = f"f{count - 1}", "d"
    m.opset_import.add(domain="d", version=1)
    if g.output:
        g.node.add(op_type=f"f{count - 1}", domain="d", input=[g.output[0].name], output=["called"])


def _swapped(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """The attributes of two nodes exchanged, or an attribute said to be of another type."""
    if not g.node:
        return
    a, b = pick(rng, g.node), pick(rng, g.node)
    if rng.random() < 0.5:
        kept = onnx.NodeProto.FromString(a.SerializeToString())
        del a.attribute[:]
        a.attribute.extend(b.attribute)
        del b.attribute[:]
        b.attribute.extend(kept.attribute)
    elif a.attribute:
        pick(rng, a.attribute).type = int(rng.integers(1, 15))


def _subgraph(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """A branch taken from elsewhere, one that is empty, or one that uses the names of the graph around it."""
    inner = _graphs(m)[1:]
    target = pick(rng, inner) if inner else onnx.GraphProto()
    match int(rng.integers(4)):
        case 0:
            target.CopyFrom(onnx.GraphProto.FromString(pick(rng, _graphs(m)).SerializeToString()))
        case 1:
            target.ClearField("node")
        case 2 if m.graph.initializer:
            target.initializer.add().CopyFrom(pick(rng, m.graph.initializer))
        case _:
            new, old = pick(rng, _names(m.graph)), pick(rng, _names(target))
            for n in target.node:
                n.input[:] = [new if x == old else x for x in n.input]
                n.output[:] = [new if x == old else x for x in n.output]


def _sizes(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """Sizes, in declarations or in the constants that become shapes, that nobody can have."""
    huge = int(pick(rng, (1 << 24, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, -1, -7, 0)))
    whole = [t for t in g.initializer if t.data_type == onnx.TensorProto.INT64 and len(t.raw_data) >= 8]
    if whole and rng.random() < 0.7:
        t = pick(rng, whole)
        a = onnx.numpy_helper.to_array(t).copy()
        a.reshape(-1)[int(rng.integers(a.size))] = huge
        t.raw_data = a.tobytes()
    elif ports := [v for v in (*g.input, *g.output, *g.value_info) if v.type.tensor_type.shape.dim]:
        pick(rng, pick(rng, ports).type.tensor_type.shape.dim).dim_value = huge


def _sparse(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """A weight that is stored sparse, or an attribute that holds one."""
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), pick(rng, _names(g)))
    indices = onnx.numpy_helper.from_array(np.array(pick(rng, ([0, 3], [3, 0], [-1, 99])), np.int64), "i")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[int(pick(rng, (4, -1, 1 << 40)))])
    if rng.random() < 0.5 or not g.node:
        g.sparse_initializer.add().CopyFrom(sparse)
    else:
        a = onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
        n = g.node.add(op_type="Constant", output=["sparse"])
        n.attribute.add().CopyFrom(a)
        pick(rng, list(g.node)[:-1] or [n]).input.append("sparse")


def _recorded(rng: Rng, m: onnx.ModelProto, g: onnx.GraphProto) -> None:
    """What is recorded of a computed value is wrong."""
    made = [x for n in g.node for x in n.output if x]
    if made:
        dims = [pick(rng, (*NUMBERS, "n", "batch", None)) for _ in range(int(rng.integers(4)))]
        kind = int(pick(rng, (1, 1, 1, 7, 9, 10, 0)))
        v = onnx.helper.make_tensor_value_info(pick(rng, made), kind, dims)  # noqa: TID251  as files have it
        g.value_info.add().CopyFrom(v)


CHANGES: tuple[Callable[[Rng, onnx.ModelProto, onnx.GraphProto], None], ...] = (
    *(_rewire, _rewire, _arity, _operator, _operator, _node, _attribute, _attribute, _constant, _constant),
    *(_port, _port, _header, _function, _swapped, _subgraph, _sizes, _sizes, _sparse, _recorded),
)


def change_model(rng: Rng, m: onnx.ModelProto) -> None:
    """One change of a model's structure, in place."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # protobuf does not hold that number
        pick(rng, CHANGES)(rng, m, pick(rng, _graphs(m)))


def with_external_data(rng: Rng, m: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A model whose weights are in files that are short, elsewhere, or said to be otherwise."""
    at = 0
    blob = b""
    for t in m.graph.initializer:
        if not t.raw_data:
            continue
        location = pick(rng, ("w.bin", "w.bin", "w.bin", "../w.bin", "/etc/passwd", "", "sub/w.bin", "w.bin\0x"))
        entries = {"location": location, "offset": str(at), "length": str(len(t.raw_data))}
        if rng.random() < 0.3:
            entries[pick(rng, ("offset", "length", "checksum"))] = str(pick(rng, (*NUMBERS, "x", "")))
        blob += t.raw_data
        at = len(blob)
        t.ClearField("raw_data")
        t.data_location = onnx.TensorProto.EXTERNAL
        for k, v in entries.items():
            t.external_data.add(key=k, value=v)
    (folder / "w.bin").write_bytes(blob[: len(blob) - int(pick(rng, (0, 0, 0, 1, 100)))])
    return m


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe(rng: Rng) -> bytes:
    """A recipe with odd names, passes, options and settings."""
    from onnxcomp.engine import catalog

    names = [n for n in catalog.listing().passes if n not in ("graphsurgeon",)]
    entries: list[Any] = ["canonicalize"] if rng.random() < 0.7 else []
    for _ in range(int(rng.integers(3))):
        info = catalog.describe(pick(rng, names))
        options = {o.name: _odd(rng) for o in info.options if rng.random() < 0.15}
        entries.append({info.name: options} if options else info.name)
    whole: dict[str, Any] = {"passes": entries}
    if rng.random() < 0.5:
        whole["name"] = pick(rng, ("x/../model", "/nowhere/abs", "..", "model", "a\nb", "ok", *TEXTS))
    for key in ("target", "gates", "on_fail", "data", "version", "advice", "any_order", "unknown"):
        if rng.random() < 0.05:
            whole[key] = _odd(rng)
    text = json.dumps(whole).encode()
    return damaged(rng, text, 1 + int(rng.integers(3))) if rng.random() < 0.3 else text


def _odd(rng: Rng) -> Any:
    values = (
        *NUMBERS,
        *TEXTS,
        None,
        True,
        False,
        0.5,
        1e308,
        -0.1,
        [],
        [1],
        {},
        {"a": 1},
        ["x"],
        "sqnr>=20",
        ["size<=2x"],
    )
    return pick(rng, (*values, [[[[]]]], {"a": {"b": [1]}}, 1e-300, "mse", "*", "cpu", 0.25, 0.9))


# ---- data ------------------------------------------------------------------------------------------------------------


def data(rng: Rng, folder: Path) -> Path:
    """Arrays or texts for `encoder`, with a tokenizer and configurations, of which one or two files are damaged."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    files = {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "config.json": {"vocab_size": 50, "max_position_embeddings": 16, "label2id": {"x": 0}, "pad_token_id": 1},
        "tokenizer_config.json": {"pad_token": "[PAD]", "model_max_length": 8, "padding_side": "right"},
    }
    for name, content in files.items():
        text = json.dumps(_change_json(rng, content) if rng.random() < 0.4 else content).encode()
        (folder / name).write_bytes(damaged(rng, text, 2) if rng.random() < 0.1 else text)
    if rng.random() < 0.5:
        return _npz(rng, folder / "d.npz")
    lines = [{"text": "a b c", "label": 0}, {"text": "d", "label": 1}, {"text": "b " * 9, "label": 0}]
    path: Path = folder / pick(rng, ("d.jsonl", "d.txt"))
    made = [json.dumps(_change_json(rng, x) if rng.random() < 0.3 else x) for x in lines]
    path.write_bytes(damaged(rng, "\n".join(made).encode(), int(rng.integers(3))))
    return path


def _npz(rng: Rng, path: Path) -> Path:
    shape = (int(rng.integers(4)), int(rng.integers(1, 9)))
    arrays: dict[str, Any] = {"input_ids": rng.integers(0, 9, shape), "attention_mask": np.ones(shape, np.int64)}
    if rng.random() < 0.5:
        odd = [np.zeros(3), np.array(["a"]), np.array(5), np.zeros((2, 0)), np.array([1 + 2j]), np.array([np.nan])]
        arrays[pick(rng, ("input_ids", "attention_mask", "labels", "x"))] = pick(rng, odd)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", pick(rng, (0, 8, 8, 12, 14))) as archive:
        for name, a in arrays.items():
            one = io.BytesIO()
            np.lib.format.write_array(one, np.asarray(a), allow_pickle=False)
            archive.writestr(f"{name}.npy", damaged(rng, one.getvalue(), 1) if rng.random() < 0.2 else one.getvalue())
    path.write_bytes(damaged(rng, buffer.getvalue(), int(rng.integers(3))))
    return path


def _change_json(rng: Rng, x: Any) -> Any:
    """A value with one part changed."""
    if isinstance(x, dict) and x and rng.random() < 0.85:
        key = pick(rng, list(x))
        changed = {k: _change_json(rng, v) if k == key else v for k, v in x.items()}
        if rng.random() < 0.1:
            del changed[key]
        return changed
    if isinstance(x, list) and x and rng.random() < 0.85:
        at = int(rng.integers(len(x)))
        return [_change_json(rng, v) if i == at else v for i, v in enumerate(x)]
    return _odd(rng)


# ---- caches ----------------------------------------------------------------------------------------------------------

CACHED = ["canonicalize", "qdq: {min_size: 1}", "lower"]


@functools.cache
def cache() -> Path:
    """The folder of a cache that a run on `encoder` filled."""
    import onnxcomp as oc

    folder = Path(tempfile.mkdtemp(prefix="tmp"))
    (folder / "model.onnx").write_bytes(encoder().SerializeToString())
    oc.compress(
        folder / "model.onnx", folder / "out", passes=CACHED, calibration="random", samples=4, sequence=4,
        measure=False, cache=folder / "cache",
    )  # fmt: skip
    (folder / "cache" / "choices-0.json").write_text('{"header": {"target": "cpu", "machine": "m", "runtime": "r"}}')
    return folder / "cache"


def change_files(rng: Rng, folder: Path) -> None:
    """Some files of a folder damaged, swapped, emptied or replaced by something else."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for _ in range(1 + int(rng.integers(3))):
        p, q = pick(rng, files), pick(rng, files)
        if not p.is_file() or not q.is_file():
            continue
        with contextlib.suppress(ValueError, DecodeError):  # it was damaged before
            _change_file(rng, p, q)


def _change_file(rng: Rng, p: Path, q: Path) -> None:
    match int(rng.integers(6)):
        case 0:
            p.write_bytes(damaged(rng, p.read_bytes(), 3))
        case 1:
            a, b = p.read_bytes(), q.read_bytes()
            p.write_bytes(b)
            q.write_bytes(a)
        case 2:
            p.write_bytes(b"")
        case 3:
            p.unlink()
            p.mkdir()
        case 4 if p.suffix == ".json":
            p.write_text(json.dumps(_change_json(rng, json.loads(p.read_text()))))
        case 5 if p.suffix == ".onnx":
            proto = onnx.ModelProto.FromString(p.read_bytes())
            change_model(rng, proto)
            p.write_bytes(proto.SerializeToString())
        case _:
            p.unlink()
