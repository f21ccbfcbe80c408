"""Feed-forward parts: two linears with an activation between them, gated or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.linears import Index, Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.operators import is_layout
from onnxcomp.graph.values import sole_use, unquantized

__all__ = ["Mlp", "mlps"]

ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "Elu", "LeakyRelu", "HardSwish", "Softplus", "Mish", "Selu")
QUICK_GELU_TOLERANCE = 1e-3  # relative; half types round the factor 1.702


@dataclass(frozen=True)
class Mlp:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when there is a gate.

    `inner` are a depthwise convolution between up and activation, and a norm before down; most have neither.
    """

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    inner: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        """The name of the down projection's node."""
        return self.down.name

    @property
    def width(self) -> int:
        """Channels between up and down."""
        return self.down.sizes[0]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Up, gate if there is one, down."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, tuple(n for x in self.linears for n in x.site.nodes), "mlp")


def mlps(g: Graph) -> list[Mlp]:
    """Every feed-forward part whose output is as wide as its input, in graph order."""
    index = Index.of(g)
    matches = (_mlp(g, index, down) for down in index.by_output.values())
    return [m for m in matches if m is not None and m.up.sizes[0] == m.down.sizes[1]]


def _mlp(g: Graph, index: Index, down: Linear) -> Mlp | None:
    norm = index.norm_by_output.get(down.source)
    source = norm.input if norm is not None else down.source
    inner = [norm.node] if norm is not None else []
    plain = _activated(g, index, source)
    if plain is not None:
        return Mlp(plain[0], None, down, plain[1], (*plain[2], *inner))
    node = source.producer()
    if node is None or node.op_type != "Mul":
        return None
    for a, b in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        gate = _activated(g, index, a)
        up = _linear(index, b)
        if gate is not None and up is not None and up.source is gate[0].source:
            return Mlp(up, gate[0], down, gate[1], (*gate[2], *inner))
    return None


def _activated(g: Graph, index: Index, v: ir.Value | None) -> tuple[Linear, str, tuple[ir.Node, ...]] | None:
    """The linear whose activated output `v` is, the activation's name, and a convolution between them."""
    node = v.producer() if v is not None else None
    if node is not None and is_layout(node):  # the layout of an image, behind a convolution
        inner_value = _behind_layout(v)
        found = _activated(g, index, inner_value) if inner_value is not v else None
        return found if found is not None and found[2] else None
    if node is None:
        return None
    x, kind = node.inputs[0], node.op_type.lower()
    if node.op_type == "Gelu":
        kind = "gelu-tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"
    elif node.op_type == "Mul":
        self_gated = _gated_by_itself(g, node)
        if self_gated is None:
            return None
        x, kind = self_gated
    elif node.op_type not in ACTIVATIONS:
        return None
    if (linear := _linear(index, x)) is not None:
        return linear, kind, ()
    convolution = _depthwise(g, x)
    before = _behind_layout(convolution.inputs[0]) if convolution is not None else None
    if convolution is None or before not in index.by_output:
        return None
    return index.by_output[before], kind, (convolution,)


def _linear(index: Index, v: ir.Value | None) -> Linear | None:
    """The linear that makes a value: directly, quantized and back, or with its leading axes merged to one of tokens."""
    v = unquantized(v)
    node = v.producer() if v is not None and v not in index.by_output else None
    if node is not None and node.op_type == "Reshape" and v is not None and v.shape is not None and len(v.shape) == 2:
        v = node.inputs[0]
        linear = index.by_output.get(v) if v is not None else None
        return linear if linear is not None and node.outputs[0].shape[-1] == linear.sizes[1] else None  # type: ignore[index]
    return index.by_output.get(v) if v is not None else None


def _behind_layout(v: ir.Value | None) -> ir.Value | None:
    """The value before layout operators that nothing else reads."""
    while v is not None and sole_use(v) is not None:
        node = v.producer()
        if node is None or not is_layout(node):
            break
        v = node.inputs[0]
    return v


def _depthwise(g: Graph, v: ir.Value | None) -> ir.Node | None:
    """The convolution of each channel by itself that a value comes from, through layout operators."""
    before = _behind_layout(v)
    node = before.producer() if before is not None else None
    if node is None or node.op_type != "Conv":
        return None
    weight = g.tensor(node.inputs[1])
    groups = node.attributes.get_int("group", 1)
    return node if weight is not None and groups > 1 and tuple(weight.shape.numpy()[:2]) == (groups, 1) else None


def _gated_by_itself(g: Graph, node: ir.Node) -> tuple[ir.Value, str] | None:
    """`x` and the name where a product is `x * Sigmoid(x)`, `x * Sigmoid(1.702 x)` or `Relu(x) ** 2`."""
    for x, gate in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        inner = gate.producer() if gate is not None else None
        if x is None or inner is None:
            continue
        if inner.op_type == "Relu" and x is gate and inner.inputs[0] is not None:
            return inner.inputs[0], "relu2"
        if inner.op_type == "Sigmoid" and inner.inputs[0] is x:
            return x, "silu"
        scaled = inner.inputs[0].producer() if inner.op_type == "Sigmoid" and inner.inputs[0] is not None else None
        if scaled is not None and scaled.op_type == "Mul" and x in scaled.inputs:
            number = g.tensor(scaled.inputs[1 - list(scaled.inputs).index(x)])
            if (
                number is not None
                and number.size == 1
                and np.isclose(float(number.numpy().item()), 1.702, rtol=QUICK_GELU_TOLERANCE)
            ):
                return x, "quick-gelu"
    return None
