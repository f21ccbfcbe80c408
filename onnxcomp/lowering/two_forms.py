"""Two forms of products with codes: int8 for many rows, as in a prompt, and the given one for few, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.data.inputs import roles, specs
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.lowering import last_token
from onnxcomp.machine import size_text
from onnxcomp.maths import Array

__all__ = ["ROWS", "add_int8_form"]

ROWS = 8  # rows up to which products stay with codes of few bits: such a form reads the fewest bytes
BARRIERS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
LARGEST, HALF = 127, 64  # int8 codes; where sums of two products saturate in 16 bits, half of them
SMALLEST = 1e-30  # the least that rows are divided by: one of zeros stays so
MIDDLE = 128  # codes of inputs are unsigned around it, as all CPUs have such products


@dataclass
class _Branch:
    """The nodes of one branch, and what stands for values of the graph in it."""

    g: Graph
    suffix: str
    nodes: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def op(
        self, op: str, *args: ir.Value | None, name: str, like: ir.Value | None = None, domain: str = ""
    ) -> ir.Value:
        """A node more; returns its output."""
        node = ir.node(op, list(args), domain=domain, name=self.g.fresh(f"{name}{self.suffix}"))
        node.outputs[0].name = self.g.fresh(f"{name}{self.suffix}_out")
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.nodes.append(node)
        return node.outputs[0]

    def copy(self, node: ir.Node) -> None:
        """The same node here."""
        inputs = [None if v is None else self.values.get(v, v) for v in node.inputs]
        new = ir.node(
            node.op_type, inputs, {k: a.value for k, a in node.attributes.items()}, domain=node.domain,
            num_outputs=len(node.outputs), name=self.g.fresh(f"{node.name}{self.suffix}"),
        )  # fmt: skip
        for old, out in zip(node.outputs, new.outputs, strict=True):
            out.name, out.type, out.shape = self.g.fresh(f"{old.name}{self.suffix}"), old.type, old.shape
            self.values[old] = out
        self.nodes.append(new)

    def graph(self, outputs: Iterable[ir.Value]) -> ir.Graph:
        """The branch, with what it gives."""
        given = [self.values[v] for v in outputs]
        opsets = dict(self.g.model.opset_imports)
        return ir.Graph([], given, nodes=self.nodes, name=self.suffix.strip("_"), opset_imports=opsets)


def add_int8_form(g: Graph, *, saturates: bool = False) -> str:
    """Give products with codes an int8 form for more than `ROWS` rows; returns why not, else "".

    Rows of inputs have a scale each, columns of weights too. What lies between two attentions is one `If`, so that
    weights are packed once, and attentions and caches stay where they are.
    """
    sites = [n for n in g.nodes("MatMulNBits") if _is_site(g, n)]
    tokens = roles(specs(g)).get("tokens")
    if not sites:
        return "it has no products with codes of few bits"
    if tokens is None:
        return "no input is tokens, whose number decides between the forms"
    before = g.nbytes
    count = g.op("Size", g.value(tokens), name="rows")
    many = g.op("Greater", count, np.array(ROWS, np.int64), name="many_rows")
    g.sort()
    for part in _parts(g, sites):
        _branch(g, part, many, HALF if saturates else LARGEST)
    g.sort()
    g.sweep()
    more = g.nbytes - before
    g.note("prefill", f"{len(sites)} products have an int8 form for more than {ROWS} tokens: {size_text(more)} more")
    return ""


def _is_site(g: Graph, node: ir.Node) -> bool:
    """Whether the codes of a product are known, and its input is not that of the last token alone."""
    x = node.inputs[0]
    return _codes(g, node) is not None and (x is None or not last_token.is_last(g, x))


def _codes(g: Graph, node: ir.Node) -> ir.TensorProtocol | None:
    """The stored codes of a product, also where a table shares them; None where they are computed."""
    v = node.inputs[1]
    made = None if v is None else v.producer()
    return g.tensor(made.inputs[0] if made is not None and made.op_type == "Reshape" else v)


def _parts(g: Graph, sites: list[ir.Node]) -> list[list[ir.Node]]:
    """Nodes on paths from product to product that lead through no attention, in graph order."""
    order, wanted = list(g.model.graph), set(sites)
    depth: dict[ir.Node, int] = {}
    behind, ahead = set(sites), set(sites)
    for n in order:
        made = [p for v in n.inputs if v is not None and (p := v.producer()) is not None]
        depth[n] = max((depth[p] + (p.op_type in BARRIERS) for p in made), default=0)
        if any(p in behind and depth[p] == depth[n] and p.op_type not in BARRIERS for p in made):
            behind.add(n)
    for n in reversed(order):
        users = [u for v in n.outputs for u, _ in v.uses() if u in depth]
        if any(u in ahead and depth[u] == depth[n] for u in users) and n.op_type not in BARRIERS:
            ahead.add(n)
    found: dict[int, list[ir.Node]] = {}
    for n in order:
        if n in behind and n in ahead and n.op_type not in BARRIERS:
            found.setdefault(depth[n], []).append(n)
    return [part for part in found.values() if wanted & set(part)]


def _branch(g: Graph, part: list[ir.Node], many: ir.Value, largest: int) -> None:
    """One `If` in place of some nodes."""
    inside = set(part)
    outputs = [v for n in part for v in n.outputs if v.is_graph_output() or any(u not in inside for u, _ in v.uses())]
    few, wide = _Branch(g, "_few"), _Branch(g, "_many")
    for n in part:
        few.copy(n)
        if n.op_type == "MatMulNBits" and _is_site(g, n):
            wide.values[n.outputs[0]] = _int8(wide, n, largest)
        else:
            wide.copy(n)
    attrs: dict[str, Any] = {"then_branch": wide.graph(outputs), "else_branch": few.graph(outputs)}
    first = g.op("If", many, outputs=len(outputs), name=f"{part[0].name}_by_rows", like=outputs[0], **attrs)
    made = first.producer()
    assert made is not None
    for old, new in zip(outputs, made.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        g.replace(old, new)
    g.model.graph.remove(part, safe=True)


def _int8(b: _Branch, node: ir.Node, largest: int) -> ir.Value:
    """The product of a node in int8; inputs are rounded once for all products that read them."""
    x = node.inputs[0]
    assert x is not None
    here, name, old = b.values.get(x, x), str(node.name), node.outputs[0]
    if here not in b.rows:
        b.rows[here] = _rounded(b, here)
    codes, size = b.rows[here]
    weight, scale = _weight(b.g, node, largest)
    one, middle = _constant(b.g, np.float32(1)), _constant(b.g, np.uint8(MIDDLE))
    y = b.op("MatMulIntegerToFloat", codes, weight, one, scale, middle, name=f"{name}_int8", like=old, domain=CONTRIB)
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    y = b.op("Mul", y, size, name=f"{name}_sized", like=old)
    return y if bias is None else b.op("Add", y, bias, name=f"{name}_biased", like=old)


def _rounded(b: _Branch, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes of an input with a scale for each row, and these scales `[..., 1]`."""
    g, name = b.g, str(x.name)
    reach = b.op("ReduceMax", b.op("Abs", x, name=f"{name}_abs"), _constant(g, np.array([-1])), name=f"{name}_reach")
    reach = b.op("Max", reach, _constant(g, np.float32(SMALLEST)), name=f"{name}_reach")
    size = b.op("Div", reach, _constant(g, np.float32(LARGEST)), name=f"{name}_size")
    unit = b.op("Div", x, size, name=f"{name}_unit")
    one, middle = _constant(g, np.float32(1)), _constant(g, np.uint8(MIDDLE))
    return b.op("QuantizeLinear", unit, one, middle, name=f"{name}_codes"), size


def _constant(g: Graph, a: np.generic | Array) -> ir.Value:
    """A small constant, one for all that need it."""
    name = f"two_forms_{a.dtype}_{np.asarray(a).reshape(-1)[0]}"
    known = g.model.graph.initializers.get(name)
    return known if known is not None else g.constant(np.asarray(a), name)


def _weight(g: Graph, node: ir.Node, largest: int) -> tuple[ir.Value, ir.Value]:
    """The weight `[K, N]` in int8, with a scale for each column."""
    wide = _dequantized(g, node)
    scale = np.maximum(np.abs(wide).max(1), np.float32(SMALLEST)) / np.float32(largest)
    codes = np.rint(wide / scale[:, None]).astype(np.int8).T
    name = str(node.name)
    return g.constant(np.ascontiguousarray(codes), f"{name}_int8_weight"), g.constant(scale, f"{name}_int8_scale")


def _dequantized(g: Graph, node: ir.Node) -> Array:
    """What the codes of a product stand for, float32 `[N, K]`."""
    get = node.attributes.get_int
    n, k, bits, block = get("N", 0), get("K", 0), get("bits", 4), get("block_size", 0)
    tensor, count = _codes(g, node), -(-k // block)
    assert tensor is not None
    codes = _unpacked(tensor.numpy().reshape(n, count, -1), bits)[..., :block].astype(np.float32)
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    if zero is None:
        codes -= np.float32(2 ** (bits - 1))
    else:
        codes -= _unpacked(g.array(zero).reshape(n, -1), bits)[:, :count, None]
    codes *= g.array(node.inputs[2]).reshape(n, count, 1).astype(np.float32)
    return codes.reshape(n, -1)[:, :k]


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes `[..., n * 8 / bits]` of bytes `[..., n]`, the lowest bits first."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> places) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)
