"""Linears and norms of a graph as typed values, with an index by the values that they produce and read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import ADDITIONS, NORMS
from onnxcomp.graph.values import sole_use, untransposed, users_of

__all__ = ["Index", "Linear", "NormSite", "linears", "norms", "siblings", "stored"]


@dataclass(frozen=True)
class Linear:
    """`output = input @ weight + bias`: one MatMul or Gemm with a constant 2-D weight, also behind DequantizeLinear.

    `weight` is the stored constant (the int8 one when quantized), `source` the float input before any Q/DQ pair,
    `output` the value after the bias, `add` the node that adds the bias (None for Gemm or without bias).
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    input: ir.Value
    source: ir.Value
    output: ir.Value
    add: ir.Node | None = None
    dequantize: ir.Node | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """The name of the product's node."""
        return str(self.node.name)

    @property
    def sizes(self) -> tuple[int, int]:
        """Fan-in `K` and fan-out `N`."""
        shape = self.weight.shape
        k, n = (int(d) for d in (shape or (0, 0)))  # type: ignore[arg-type]
        return (n, k) if self.transposed else (k, n)

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored in a low-precision type."""
        return self.dequantize is not None

    @property
    def users(self) -> tuple[ir.Node, ...]:
        """Nodes that read the output."""
        return tuple(users_of(self.output))

    @property
    def site(self) -> Site:
        """The place in the graph, for passes and reports."""
        nodes = [n for n in (self.node, self.add) if n is not None]
        return Site(self.name, tuple(str(n.name) for n in nodes), "linear")


def linears(g: Graph, *, tied: bool = False) -> list[Linear]:
    """Every linear in graph order; a Gemm that scales or transposes its input does not count.

    With `tied` also products with the Transpose of a constant, such as a head that shares the embedding table, also
    behind DequantizeLinear: `weight` is the shared table and `transposed` is set: it may be read but not overwritten.
    """
    matches = (_linear(g, node, tied) for node in g.nodes("MatMul", "Gemm") if node.domain == "")
    return [x for x in matches if x is not None]


def siblings(candidates: Iterable[Linear]) -> list[list[Linear]]:
    """Linears that read the same input (query, key and value; gate and up), in order."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in candidates:
        groups.setdefault(linear.source, []).append(linear)
    return list(groups.values())


def _linear(g: Graph, node: ir.Node, tied: bool) -> Linear | None:
    x, w = node.inputs[0], node.inputs[1]
    if x is None or w is None or g.is_constant(x):
        return None
    weight, dequantize = stored(g, w)
    table = None
    if weight is None and tied and node.op_type == "MatMul":
        made = w.producer()
        dequantize = made if made is not None and made.op_type == "DequantizeLinear" else None
        codes = dequantize.inputs[0] if dequantize is not None else w
        table = _transposed_constant(g, codes) if codes is not None else None
    if table is not None:
        rows = table.shape[0] if table.shape is not None else 0
        bias, add = _bias(g, node.outputs[0], rows)
        output = add.outputs[0] if add is not None else node.outputs[0]
        return Linear(node, table, bias, x, _before_quantizing(x), output, add, dequantize, True)
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return None
    source = _before_quantizing(x)
    if node.op_type == "Gemm":
        return _gemm(g, node, x, source, weight, dequantize)
    bias, add = _bias(g, node.outputs[0], weight.shape[1])
    output = add.outputs[0] if add is not None else node.outputs[0]
    return Linear(node, weight, bias, x, source, output, add, dequantize)


def _transposed_constant(g: Graph, w: ir.Value) -> ir.Value | None:
    """The constant matrix that `w` is the transpose of."""
    table = untransposed(w)
    if table is w or not g.is_constant(table):
        return None
    return table if table is not None and table.shape is not None and len(table.shape) == 2 else None


def _gemm(
    g: Graph, node: ir.Node, x: ir.Value, source: ir.Value, weight: ir.Value, dequantize: ir.Node | None
) -> Linear | None:
    scaled = node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0
    if scaled or node.attributes.get_int("transA", 0) == 1:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and stored(g, bias)[0] is None:
        return None
    transposed = node.attributes.get_int("transB", 0) == 1
    return Linear(node, weight, bias, x, source, node.outputs[0], None, dequantize, transposed)


def stored(g: Graph, v: ir.Value) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant behind a value, directly or through one DequantizeLinear, which is returned as well."""
    if g.is_constant(v):
        return v, None
    node = v.producer()
    if node is not None and node.op_type == "DequantizeLinear" and g.is_constant(node.inputs[0]):
        return node.inputs[0], node
    return None, None


def _before_quantizing(x: ir.Value) -> ir.Value:
    """The float value before a QuantizeLinear, DequantizeLinear pair, or the value itself."""
    dequantize = x.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return x
    quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return x
    return quantize.inputs[0] or x


def _bias(g: Graph, product: ir.Value, width: int | ir.SymbolicDim) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant row whose addition is the only use of a product, and the addition."""
    use = sole_use(product)
    if use is None or use[0].op_type not in ADDITIONS or len(use[0].inputs) != 2:
        return None, None
    add, index = use
    other = add.inputs[1 - index]
    if other is None:
        return None, None
    bias, _ = stored(g, other)
    if bias is None or bias.shape is None or len(bias.shape) == 0 or bias.shape[-1] != width:
        return None, None
    return (other if other is bias else bias, add) if all(d == 1 for d in bias.shape[:-1]) else (None, None)


@dataclass(frozen=True)
class NormSite:
    """A LayerNormalization or RMSNormalization over the last axis, with the constants that scale and shift it."""

    node: ir.Node
    kind: str
    gain: ir.Value
    bias: ir.Value | None
    input: ir.Value
    output: ir.Value

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name)

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, (self.name,), "norm")

    @property
    def readers(self) -> tuple[ir.Node, ...]:
        """Nodes that read the result."""
        return tuple(users_of(self.output))


def norms(g: Graph) -> list[NormSite]:
    """Every norm with a constant gain, in graph order."""
    sites = []
    for node in g.nodes(*NORMS):
        x, gain = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if x is not None and gain is not None and g.is_constant(gain) and (bias is None or g.is_constant(bias)):
            kind = "layer" if node.op_type == "LayerNormalization" else "rms"
            sites.append(NormSite(node, kind, gain, bias, x, node.outputs[0]))
    return sites


@dataclass
class Index:
    """Linears by output and by source, norms by output, and every value that is computed from a linear's output."""

    by_output: dict[ir.Value, Linear] = field(default_factory=dict)
    by_source: dict[ir.Value, list[Linear]] = field(default_factory=dict)
    norm_by_output: dict[ir.Value, NormSite] = field(default_factory=dict)
    after_linears: set[ir.Value] = field(default_factory=set)

    @classmethod
    def of(cls, g: Graph) -> Index:
        """The index of a graph's current state."""
        index = cls(norm_by_output={x.output: x for x in norms(g)})
        for x in linears(g):
            index.by_output[x.output] = x
            index.by_source.setdefault(x.source, []).append(x)
        index.after_linears |= set(index.by_output)
        for node in g.nodes():
            if any(v in index.after_linears for v in node.inputs):
                index.after_linears.update(node.outputs)
        return index
