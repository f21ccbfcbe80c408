"""The edit that makes chosen nodes run in a half type: retyped values, converted constants and few Casts."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.methods.half.candidates import Ports, clipped, content, fills

__all__ = ["convert"]

FLOAT = ir.DataType.FLOAT
LAZY_BYTES = 1 << 20  # constants in a file from this size on are converted when they are written or run: saves memory


def convert(g: Graph, chosen: Iterable[Ports], half: ir.DataType) -> None:
    """Run the chosen nodes in the half type; values used by other nodes too get one shared Cast, as inputs and outputs.

    Stand-ins for infinity become finite in the half type everywhere, so that a mask stays finite on the way.
    """
    picked = {p.node: p for p in chosen}
    if not picked:
        return
    for v, t in fills(g).items():
        node = v.producer()
        if g.is_constant(v):
            g.put(v, clipped(t.numpy(), half))
        elif node is not None:
            g.set_attr(node, value=ir.tensor(clipped(t.numpy(), half)))
    _Conversion(g, picked, half).run()


class _Conversion:
    """The state of one `convert`: the half and float32 copies of values."""

    def __init__(self, g: Graph, chosen: dict[ir.Node, Ports], half: ir.DataType) -> None:
        self.g, self.chosen, self.half = g, chosen, half
        self.produced = {p.node.outputs[i] for p in chosen.values() for i in p.outputs}
        self.down: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for p in self.chosen.values():
            for i in p.inputs:
                x = p.node.inputs[i]
                if x is not None and x not in self.produced:
                    self.g.set_input(p.node, i, self._down(x))
        for v in self.produced:
            self._connect(v)
        for p in self.chosen.values():
            for i in p.outputs:
                self._retype(p.node.outputs[i])
            if p.node.op_type == "Attention" and p.node.domain == "" and "softmax_precision" not in p.node.attributes:
                self.g.set_attr(p.node, softmax_precision=FLOAT.value)
        for node in self.g.nodes("Cast"):
            x = node.inputs[0]
            if x is not None and x.dtype is not None and x.dtype.value == node.attributes.get_int("to"):
                self.g.replace(node.outputs[0], x)

    def _down(self, x: ir.Value) -> ir.Value:
        """The half copy of a float32 value: a converted constant or a Cast, of the integers behind if it has some."""
        if x not in self.down:
            t = self.g.tensor(x)
            if t is not None:
                self.down[x] = self.g.constant(_converted(t, self.half), f"{x.name}_{self.half.name.lower()}")
            else:
                node = x.producer()
                raw = node.inputs[0] if node is not None and node.op_type == "Cast" else None
                integer = raw is not None and raw.dtype is not None and not raw.dtype.is_floating_point()
                source = raw if raw is not None and integer else x
                self.down[x] = self._cast(source, self.half, x)
        return self.down[x]

    def _cast(self, source: ir.Value, to: ir.DataType, like: ir.Value) -> ir.Value:
        out = self.g.op("Cast", source, to=to.value, name=f"{like.name}_to_{to.name.lower()}")
        out.type, out.shape = ir.TensorType(to), like.shape
        return out

    def _connect(self, v: ir.Value) -> None:
        """Connect every consumer of a value that becomes half to the value, or to its float32 copy."""
        ours = [(u, i) for u, i in v.uses() if u in self.chosen and i in self.chosen[u].inputs]
        others = [u for u, i in v.uses() if (u, i) not in ours and not _any_type(u, i)]
        if not others and not v.is_graph_output():
            return
        self.g.replace(v, self._cast(v, FLOAT, v), users=None if v.is_graph_output() else others)
        for u, i in ours:
            self.g.set_input(u, i, v)

    def _retype(self, v: ir.Value) -> None:
        node = v.producer()
        assert node is not None
        v.type = ir.TensorType(self.half)
        if node.op_type == "Cast":
            self.g.set_attr(node, to=self.half.value)
        elif (repeated := content(node)) is not None:
            self.g.set_attr(node, value=ir.tensor(_cast_array(repeated.numpy(), self.half)))
        self.g.edits += 1
        self.g.touched.add(str(node.name))


def _any_type(user: ir.Node, index: int) -> bool:
    """Whether a consumer takes any type and passes none on."""
    return user.domain == "" and user.op_type in ("Shape", "Size") and index == 0


def _cast_array(a: Array, half: ir.DataType) -> Array:
    return clipped(a, half).astype(half.numpy())


def _converted(t: ir.TensorProtocol, half: ir.DataType) -> Array | ir.LazyTensor:
    """The constant in the half type; a large one from a file is converted when it is written or run."""
    if t.nbytes < LAZY_BYTES or isinstance(t, ir.Tensor):
        return _cast_array(t.numpy(), half)
    return ir.LazyTensor(
        lambda: ir.tensor(_cast_array(t.numpy(), half)), dtype=half, shape=ir.Shape(list(t.shape.numpy()))
    )
