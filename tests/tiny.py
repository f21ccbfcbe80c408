"""Builders of tiny transformers as graphs, without torch: canonical, or as torch's dynamo exporter spells them.

Both spellings of one model share every weight (same `seed`), so their outputs must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["decoder", "encoder", "external", "feeds", "linear", "mlp"]

Spelling = Literal["canonical", "dynamo"]
Norm = Literal["pre", "post"]
LOWEST = float(np.finfo(np.float32).min)


@dataclass
class Build:
    """A graph under construction, with the options of the model it becomes."""

    g: Graph
    rng: np.random.Generator
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    bias: bool
    spelled: Spelling
    decoder: bool = False
    shared: dict[str, ir.Value] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.hidden // self.heads

    def op(self, op: str, *xs: ir.Value | Array | None, **attrs: Any) -> ir.Value:
        return self.g.op(op, *xs, **attrs)

    def ints(self, *xs: int) -> Array:
        return np.array(xs, np.int64)

    def floats(self, x: float) -> Array:
        return np.array(x, np.float32)

    def weight(self, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        """Random values of variance `1 / fan-in`, so that activations keep their size."""
        std = scale if scale is not None else shape[0] ** -0.5
        return self.g.constant((self.rng.standard_normal(shape) * std).astype(np.float32), name)

    def gain(self, name: str) -> ir.Value:
        return self.g.constant((1 + 0.1 * self.rng.standard_normal(self.hidden)).astype(np.float32), name)

    def linear(self, x: ir.Value, name: str, fan_in: int, fan_out: int, bias: bool | None = None) -> ir.Value:
        y = self.op("MatMul", x, self.weight(f"{name}.weight", fan_in, fan_out))
        if self.bias if bias is None else bias:
            y = self.op("Add", y, self.weight(f"{name}.bias", fan_out, scale=0.1))
        return y

    def size(self, axis: int) -> ir.Value:
        """Length of one axis of the tokens input, shape `[1]`."""
        key = f"size{axis}"
        if key not in self.shared:
            self.shared[key] = self.op("Shape", self.g.model.graph.inputs[0], start=axis, end=axis + 1)
        return self.shared[key]

    def positions(self) -> ir.Value:
        """0, 1, 2, ... along the sequence, shape `[s]`."""

        def make() -> ir.Value:
            length = self.op("Squeeze", self.size(1), self.ints(0))
            return self.op("Range", np.array(0, np.int64), length, np.array(1, np.int64))

        return self._shared("positions", make)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        gain = self.gain(f"{name}.weight")
        if not self.decoder:
            bias = self.weight(f"{name}.bias", self.hidden, scale=0.1)
            return self.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=1e-5)
        if self.spelled == "canonical":
            return self.op("RMSNormalization", x, gain, axis=-1, epsilon=1e-6)
        square = self.op("Pow", x, self.floats(2.0))
        mean = self.op("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.floats(1e-6)))
        return self.op("Mul", gain, self.op("Mul", x, self.op("Reciprocal", root)))

    def gelu(self, x: ir.Value) -> ir.Value:
        if self.spelled == "canonical" or self.g.opset >= 20:
            return self.op("Gelu", x)
        erf = self.op("Erf", self.op("Div", x, self.floats(2**0.5)))
        return self.op("Mul", x, self.op("Mul", self.floats(0.5), self.op("Add", erf, self.floats(1.0))))

    def mlp(self, x: ir.Value, name: str) -> ir.Value:
        if not self.decoder:
            wide = self.gelu(self.linear(x, f"{name}.up", self.hidden, self.ffn))
            return self.linear(wide, f"{name}.down", self.ffn, self.hidden)
        gate = self.linear(x, f"{name}.gate", self.hidden, self.ffn)
        silu = self.op("Mul", gate, self.op("Sigmoid", gate))
        up = self.linear(x, f"{name}.up", self.hidden, self.ffn)
        return self.linear(self.op("Mul", silu, up), f"{name}.down", self.ffn, self.hidden)

    def attention(self, x: ir.Value, name: str) -> ir.Value:
        kv = self.kv_heads * self.width
        q = self.linear(x, f"{name}.q", self.hidden, self.hidden)
        k = self.linear(x, f"{name}.k", self.hidden, kv)
        v = self.linear(x, f"{name}.v", self.hidden, kv)
        context = (self._canonical_core if self.spelled == "canonical" else self._dynamo_core)(q, k, v)
        return self.linear(context, f"{name}.o", self.hidden, self.hidden)

    def _canonical_core(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        if self.decoder:
            cos, sin = self._angles()
            q = self.op("RotaryEmbedding", q, cos, sin, num_heads=self.heads)
            k = self.op("RotaryEmbedding", k, cos, sin, num_heads=self.kv_heads)
        sizes = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.width**-0.5}
        return self.op("Attention", q, k, v, self._mask(), **sizes)

    def _dynamo_core(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        q, k, v = (self._split(y) for y in (q, k, v))
        if self.decoder:
            q, k = self._rotate(q), self._rotate(k)
        if self.kv_heads < self.heads:
            k, v = self._repeat(k), self._repeat(v)
        root = self.floats(self.width**-0.25)
        scores = self.op("MatMul", self.op("Mul", q, root), self.op("Mul", self._turned(k), root))
        fill = self._shared("fill", lambda: self.op("Where", self._mask(), self.floats(0.0), self.floats(LOWEST)))
        p = self.op("Softmax", self.op("Add", scores, fill), axis=-1)
        p = self.op("Where", self.op("IsNaN", p), self.floats(0.0), p)
        context = self.op("Transpose", self.op("MatMul", p, v), perm=[0, 2, 1, 3])
        flat = self._shared("flat", lambda: self.op("Concat", self.size(0), self.size(1), self.ints(-1), axis=0))
        return self.op("Reshape", context, flat, allowzero=1)

    def _shared(self, key: str, make: Any) -> ir.Value:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def _split(self, x: ir.Value) -> ir.Value:
        """`[b, s, heads * width]` to `[b, heads, s, width]`."""
        last = self.ints(self.width)
        to = self._shared("split", lambda: self.op("Concat", self.size(0), self.size(1), self.ints(-1), last, axis=0))
        return self.op("Transpose", self.op("Reshape", x, to, allowzero=1), perm=[0, 2, 1, 3])

    def _turned(self, k: ir.Value) -> ir.Value:
        """`[b, n, s, h]` to `[b, n, h, s]` through three dimensions, as torch's decomposition does."""
        shape = self.op("Shape", k)
        last = self.op("Slice", shape, self.ints(-1), self.ints(np.iinfo(np.int64).max))
        tall = self.op("Slice", shape, self.ints(-2), self.ints(-1))
        lead = self.op("Slice", shape, self.ints(np.iinfo(np.int64).min), self.ints(-2))
        flat = self.op("Reshape", k, self.op("Concat", self.ints(-1), tall, last, axis=0))
        turned = self.op("Transpose", flat, perm=[0, 2, 1])
        return self.op("Reshape", turned, self.op("Concat", lead, last, tall, axis=0))

    def _repeat(self, x: ir.Value) -> ir.Value:
        """`[b, kv, s, h]` to `[b, heads, s, h]` by copying each KV head."""
        n, r, h = self.kv_heads, self.heads // self.kv_heads, self.width
        wide = self.op("Concat", self.size(0), self.ints(n, r), self.size(1), self.ints(h), axis=0)
        to = self.op("Concat", self.size(0), self.ints(self.heads), self.size(1), self.ints(h), axis=0)
        return self.op("Reshape", self.op("Expand", self.op("Unsqueeze", x, self.ints(2)), wide), to, allowzero=1)

    def _angle(self) -> ir.Value:
        """Rotation angles `[1, s, width / 2]`."""
        step = self.floats(10000.0) ** (-np.arange(0, self.width, 2, dtype=np.float32) / self.width)
        positions = self.positions()
        row = self.op("Unsqueeze", self.op("Cast", positions, to=int(ir.DataType.FLOAT)), self.ints(0, 2))
        return self.op("Mul", row, step.reshape(1, 1, -1).astype(np.float32))

    def _angles(self) -> tuple[ir.Value, ir.Value]:
        def table(kind: str) -> ir.Value:
            angle = self._shared("angle", self._angle)
            to = self._shared("table", lambda: self.op("Concat", self.size(0), self.ints(1, 1), axis=0))
            return self.op("Expand", self.op(kind, angle), to)

        return self._shared("cos", lambda: table("Cos")), self._shared("sin", lambda: table("Sin"))

    def _rotate(self, x: ir.Value) -> ir.Value:
        """`x * cos + rotate_half(x) * sin` on `[b, n, s, h]`."""
        both = self._shared("both", lambda: self.op("Concat", *[self._shared("angle", self._angle)] * 2, axis=-1))
        cos = self._shared("cos4", lambda: self.op("Unsqueeze", self.op("Cos", both), self.ints(1)))
        sin = self._shared("sin4", lambda: self.op("Unsqueeze", self.op("Sin", both), self.ints(1)))
        half, end = self.ints(self.width // 2), self.ints(np.iinfo(np.int64).max)
        low = self.op("Slice", x, self.ints(0), half, self.ints(3), self.ints(1))
        high = self.op("Slice", x, half, end, self.ints(3), self.ints(1))
        turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def _mask(self) -> ir.Value:
        return self._shared("mask", self._make_mask)

    def _make_mask(self) -> ir.Value:
        """Which keys a query may see, bool `[b, 1, s, s]`."""
        real = self.op("Cast", self.g.model.graph.inputs[1], to=int(ir.DataType.BOOL))
        seen = self.op("Unsqueeze", real, self.ints(1, 2))
        if not self.decoder:
            return self.op("Expand", seen, self.op("Concat", self.ints(1, 1), self.size(1), self.ints(1), axis=0))
        positions = self.positions()
        key, query = self.op("Unsqueeze", positions, self.ints(0)), self.op("Unsqueeze", positions, self.ints(1))
        return self.op("And", self.op("LessOrEqual", key, query), seen)

    def layer(self, x: ir.Value, name: str, norm: Norm) -> ir.Value:
        for part, key in ((self.attention, "attention"), (self.mlp, "mlp")):
            if norm == "pre":
                x = self.op("Add", x, part(self.norm(x, f"{name}.{key}_norm"), f"{name}.{key}"))
            else:
                x = self.norm(self.op("Add", part(x, f"{name}.{key}"), x), f"{name}.{key}_norm")
        return x


def _start(batch: int | str, sequence: int | str, opset: int) -> Graph:
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch, sequence]))
        for name in ("input_ids", "attention_mask")
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="tiny")
    return Graph(ir.Model(graph, ir_version=10, producer_name="tiny"))


def finish(g: Graph, out: ir.Value, name: str, shape: list[int | str]) -> Graph:
    """Make `out` the model's only output and return the graph as if it were freshly loaded."""
    out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    g.model.graph.outputs.append(out)
    g.sort()
    done = Graph(g.model)
    done.infer_shapes()
    return done


def _opset(spelled: Spelling, opset: int | None) -> int:
    opset = (23 if spelled == "canonical" else 18) if opset is None else opset
    if spelled == "canonical" and opset < 23:
        raise ValueError("the canonical form needs opset 23")
    return opset


def encoder(
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    ffn: int = 64,
    norm: Norm = "post",
    bias: bool = True,
    opset: int | None = None,
    spelled: Spelling = "canonical",
    seed: int = 0,
    *,
    vocabulary: int = 50,
    positions: int = 40,
    classes: int = 0,
    batch: int | str = "batch",
    sequence: int | str = "sequence",
) -> Graph:
    """BERT-like: tokens and padding mask to `last_hidden_state` `[b, s, hidden]`, or `logits` `[b, classes]`."""
    g = _start(batch, sequence, _opset(spelled, opset))
    b = Build(g, np.random.default_rng(seed), hidden, heads, heads, ffn, bias, spelled)
    ids = g.model.graph.inputs[0]
    place = b.positions()
    words = b.op("Gather", b.weight("embeddings.words", vocabulary, hidden, scale=1.0), ids)
    x = b.op("Add", words, b.op("Gather", b.weight("embeddings.positions", positions, hidden, scale=0.5), place))
    x = b.norm(x, "embeddings.norm")
    for i in range(layers):
        x = b.layer(x, f"layers.{i}", norm)
    if norm == "pre":
        x = b.norm(x, "norm")
    if not classes:
        return finish(g, x, "last_hidden_state", [batch, sequence, hidden])
    first = b.op("Gather", x, np.array(0, np.int64), axis=1)
    return finish(g, b.linear(first, "classifier", hidden, classes, bias=True), "logits", [batch, classes])


def decoder(
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 64,
    norm: Norm = "pre",
    bias: bool = False,
    opset: int | None = None,
    spelled: Spelling = "canonical",
    seed: int = 0,
    *,
    vocabulary: int = 50,
    tied: bool = False,
    batch: int | str = "batch",
    sequence: int | str = "sequence",
) -> Graph:
    """Llama-like (rotary, RMS norm, SwiGLU, grouped heads, causal): to `logits` `[b, s, vocabulary]`."""
    g = _start(batch, sequence, _opset(spelled, opset))
    b = Build(g, np.random.default_rng(seed), hidden, heads, kv_heads, ffn, bias, spelled, decoder=True)
    table = b.weight("embeddings.words", vocabulary, hidden, scale=1.0)
    x = b.op("Gather", table, g.model.graph.inputs[0])
    for i in range(layers):
        x = b.layer(x, f"layers.{i}", norm)
    x = b.norm(x, "norm") if norm == "pre" else x
    if tied:
        logits = b.op("MatMul", x, b.op("Transpose", table, perm=[1, 0]))
    else:
        logits = b.linear(x, "head", hidden, vocabulary, bias=False)
    return finish(g, logits, "logits", [batch, sequence, vocabulary])


def linear(inputs: int = 8, outputs: int = 6, bias: bool = True, seed: int = 0, rank: int = 3) -> Graph:
    """One linear layer `x` to `y`, opset 23, rank 2 or 3."""
    shape: list[int | str] = ["batch", "sequence", inputs][3 - rank :]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="linear"), ir_version=10))
    b = Build(g, np.random.default_rng(seed), inputs, 1, 1, inputs, bias, "canonical")
    return finish(g, b.linear(x, "linear", inputs, outputs), "y", [*shape[:-1], outputs])


def copy() -> Graph:
    """A model that hands its input on: nothing to compress."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", 8]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="copy"), ir_version=10))
    return finish(g, g.op("Identity", x), "y", ["batch", "sequence", 8])


def mlp(
    hidden: int = 8,
    ffn: int = 16,
    gated: bool = False,
    bias: bool = True,
    spelled: Spelling = "canonical",
    seed: int = 0,
) -> Graph:
    """One feed-forward part `x` to `y`, both `[batch, sequence, hidden]`."""
    shape: list[int | str] = ["batch", "sequence", hidden]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    opsets = {"": _opset(spelled, None)}
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports=opsets, name="mlp"), ir_version=10))
    b = Build(g, np.random.default_rng(seed), hidden, 1, 1, ffn, bias, spelled, decoder=gated)
    return finish(g, b.mlp(x, "mlp"), "y", shape)


def external(g: Graph, folder: Path, name: str = "model.onnx") -> Path:
    """Write the model with its weights beside it and return the path of the `.onnx` file."""
    path = folder / name
    ir.save(g.clone().model, path, external_data=f"{name}.data", size_threshold_bytes=64)
    return path


def feeds(
    g: Graph,
    batch: int = 2,
    sequence: int = 7,
    seed: int = 0,
    padding: Literal["none", "left", "right"] = "none",
) -> dict[str, Array]:
    """Random inputs for a tiny model; padded rows differ in length and keep at least one token."""
    rng = np.random.default_rng(seed)
    known = {"batch": batch, "sequence": sequence}
    result: dict[str, Array] = {}
    for v in g.inputs:
        dims = [d if isinstance(d, int) else known.get(str(d.value), batch) for d in (v.shape or [])]
        if v.name == "attention_mask":
            result[v.name] = _padding(rng, dims[0], dims[1], padding)
        elif v.dtype == ir.DataType.INT64:
            result[str(v.name)] = rng.integers(0, 50, dims, dtype=np.int64)
        else:
            result[str(v.name)] = rng.standard_normal(dims).astype(np.float32)
    return result


def _padding(rng: np.random.Generator, batch: int, sequence: int, side: str) -> Array:
    lengths = np.full(batch, sequence) if side == "none" else rng.integers(1, sequence + 1, batch)
    seen = np.arange(sequence) < lengths[:, None]
    return (seen if side != "left" else seen[:, ::-1]).astype(np.int64)
