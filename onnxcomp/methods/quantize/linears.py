"""Quantized linears as graph edits, shared by every quantizer: eligible linears, integer weights, products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import BatchedLinear, Embedding, Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, formats, saturation
from onnxcomp.maths.formats import FORMATS, Quantized
from onnxcomp.maths.rotation import is_rotation
from onnxcomp.methods.quantize.covered import weight_covered
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.target import Granularity, Target, resolved

__all__ = [
    "FLOATS",
    "HALVES",
    "LAZY_BYTES",
    "WeightCodes",
    "chosen",
    "coded",
    "in_float32",
    "integer_weight",
    "lazy_codes",
    "picked_channels",
    "product",
    "quantizable",
    "run_time_product",
    "silent_channels",
    "usable",
]

# Weights from this size on that lie in a file become codes only when they are written or run: small ones are cheap to
# hold, and a large model must not have all its codes in memory.
LAZY_BYTES = 16 << 20
GLANCE = 64  # out-channels that tell most channels from silent ones without reading a whole weight from its file
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, *HALVES)


def quantizable(g: Graph) -> list[Linear]:
    """Linears whose weight is stored in a float type, with the output head that shares the embedding table.

    A product with a rotation is none: it stands before what is to be rounded, and its input has the outliers. Products
    of picked channels (`split-outliers`) are in float on purpose.
    """
    floats = (x for x in blocks.linears(g, tied=True) if not x.quantized and x.weight.dtype in FLOATS)
    own = (x for x in floats if picked_channels(g, x.source.producer()) is None)
    return [x for x in own if x.sizes[0] != x.sizes[1] or not is_rotation(g.array(x.weight))]


def picked_channels(g: Graph, node: ir.Node | None) -> Array | None:
    """The channels that a node picks from the last axis of a value, None where it is no such node."""
    if node is None or node.op_type != "Gather" or node.inputs[0] is None or not g.is_constant(node.inputs[1]):
        return None
    shape, axis = node.inputs[0].shape, node.attributes.get_int("axis", 0)
    channels = g.array(node.inputs[1])
    last = axis == -1 or (shape is not None and axis == len(shape) - 1 > 0)
    return channels if last and channels.ndim == 1 and not g.is_constant(node.inputs[0]) else None


def coded(g: Graph) -> list[Linear]:
    """Linears whose weight is stored as codes while their input is float."""
    return [x for x in blocks.linears(g, tied=True) if x.quantized and x.input is x.source]


def usable(g: Graph, target: Target) -> Iterator[Linear]:
    """Those of them whose codes integer products can take; the others are declined."""
    for x in coded(g):
        if why := unusable(g, x, target):
            g.decline(x.site, why)
        else:
            yield x


def unusable(g: Graph, x: Linear, target: Target) -> str:
    """Why integer products cannot take the codes of a weight, empty if they can."""
    assert x.dequantize is not None
    _, scale, zero = [*x.dequantize.inputs, None][:3]
    whole = x.weight.dtype is ir.DataType.INT8 and not x.dequantize.attributes.get_int("block_size", 0)
    per_column = g.array(scale).ndim == 0 or x.dequantize.attributes.get_int("axis", 1) in (1, -1)
    if not whole or not per_column or (zero is not None and g.array(zero).any()):
        return "integer products take 8-bit codes with one scale for each out-channel (block: channel), not its codes"
    codes = g.array(x.weight) if resolved(target).quantized.saturates else np.zeros((0, 0), np.int8)
    broken = codes.size and saturation.breaks(codes.T if x.transposed else codes).any()
    return "pairs of its codes could saturate on this target; make them for it" if broken else ""


def silent_channels(g: Graph) -> dict[ir.Value, tuple[int, ...]]:
    """Of every input of linears the channels whose weights are all zero in each linear that reads it, if there are any.

    What such a channel holds changes nothing, so no range has to cover it.
    """
    found: dict[ir.Value, Array] = {}
    for x in blocks.linears(g, tied=True):
        w = g.array(x.weight)
        zero = x.dequantize.inputs[2] if x.dequantize is not None and len(x.dequantize.inputs) > 2 else None
        if zero is not None and g.array(zero).any():
            w = np.broadcast_to(True, w.shape)  # codes of zero stand for other numbers
        w = w.T if x.transposed else w
        rows = found.get(x.source, np.arange(len(w)))
        rows = rows[~w[rows, :GLANCE].any(axis=1)]
        found[x.source] = rows[~w[rows].any(axis=1)]
    return {v: tuple(rows.tolist()) for v, rows in found.items() if rows.size}


def chosen(
    g: Graph,
    skip: Iterable[str],
    min_size: int,
    tables: Iterable[Embedding | BatchedLinear] = (),
    among: Iterable[Linear] | None = None,
) -> list[Linear]:
    """Quantizable linears (or those `among` others) but for skipped and small ones, which are declined by name.

    Patterns match nodes or weights; one that matches neither a linear nor one of the `tables` is declined too.
    """
    patterns, kept = tuple(skip), []
    used = {skipped(patterns, str(e.node.name), str(e.table.name)) for e in tables}
    for linear in quantizable(g) if among is None else among:
        hit = skipped(patterns, linear.name, str(linear.weight.name))
        k, n = linear.sizes
        if hit is not None:
            used.add(hit)
            g.decline(linear.site, f"skipped by the pattern '{hit}'")
        elif k * n < min_size:
            g.decline(linear.site, f"its {k}x{n} weight is smaller than min_size={min_size}: nothing to gain")
        else:
            kept.append(linear)
    for pattern in sorted(set(patterns) - used - {"*"}):
        g.decline(
            f"skip: {pattern}", f"matches no linear; they are called like '{kept[0].name}'" if kept else "matches none"
        )
    return kept


class WeightCodes:
    """Integer forms of weights, one per stored tensor, so that layers sharing a weight share its codes too.

    Where the target's sums saturate, scales are as large as `maths.saturation` asks for. Of `tables`, embedding tables
    that are quantized as well, the codes are stored as the tables are, `[N, K]`; products read their Transpose, which
    the runtime computes once, when it loads the model.
    """

    def __init__(self, g: Graph, granularity: Granularity, target: Target, tables: Collection[Embedding] = ()) -> None:
        self.g, self.axis = g, 1 if granularity == "channel" else None
        self.saturates = resolved(target).quantized.saturates
        self._tables = {e.table for e in tables}
        self._made: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def __call__(self, linear: Linear) -> tuple[ir.Value, ir.Value]:
        """Symmetric int8 codes `[K, N]` and their scale, `[N]` or `[]`: those that are there, or new ones."""
        if linear.dequantize is not None:
            q, scale = linear.dequantize.inputs[:2]
            assert q is not None
            assert scale is not None
            return q, scale
        key = (linear.weight, linear.transposed)
        if key not in self._made:
            if linear.transposed and linear.weight in self._tables:
                q, scale = self._rows[linear.weight] = self._make(linear.weight, True, self.saturates, stored=True)
                like = ir.Value(type=q.type, shape=ir.Shape(linear.sizes))
                self._made[key] = self.g.op("Transpose", q, perm=[1, 0], name=f"{q.name}_head", like=like), scale
            else:
                self._made[key] = self._make(linear.weight, linear.transposed, self.saturates)
                self._note(linear, *self._made[key])
        return self._made[key]

    def _note(self, linear: Linear, q: ir.Value, scale: ir.Value) -> None:
        """Note what the codes of a weight `[K, N]` cover, but of one that is not read yet."""
        if not isinstance(q.const_value, ir.LazyTensor):
            weight, s = self.g.array(linear.weight), self.g.array(scale)
            codes = Quantized(self.g.array(q), s, np.zeros_like(s), self.axis)
            weight_covered(
                self.g, linear.name, str(linear.weight.name), weight.T if linear.transposed else weight, codes, 8
            )

    def rows(self, table: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Symmetric int8 codes `[rows, width]` of a table and their scale, `[rows]` or `[]`."""
        if table not in self._rows:
            self._rows[table] = self._make(table, True, False, stored=True)
        codes, scale = self._rows[table]
        if not scale.is_initializer() and scale.const_value is not None:  # swept: a head reads it as float32
            self._rows[table] = codes, self.g.constant(scale.const_value, str(scale.name))
        return self._rows[table]

    def _make(self, v: ir.Value, transposed: bool, limited: bool, *, stored: bool = False) -> tuple[ir.Value, ir.Value]:
        """Codes and scale of the columns of a weight, transposed first or not; `stored` gives codes as it is stored."""
        tensor, axis, fmt = self.g.tensor(v), self.axis, FORMATS["int8"]
        assert tensor is not None

        def weight() -> Array:
            return tensor.numpy().T if transposed else tensor.numpy()

        if limited:
            scale, zero = saturation.scales(weight(), fmt, axis=axis, scale_type=tensor.dtype.numpy())
        else:
            limit = np.abs(weight()).max(axis=None if axis is None else 0)
            scale, zero = formats.affine(-limit, limit, fmt, symmetric=True, scale_type=tensor.dtype.numpy())

        def codes() -> Array:
            q = formats.quantize(weight(), scale, zero, fmt, axis=axis)
            return np.ascontiguousarray(q.T) if stored else q

        shape = tuple(tensor.shape.numpy())[:: -1 if transposed and not stored else 1]
        eager = tensor.nbytes < LAZY_BYTES or isinstance(tensor, ir.Tensor)
        content: Array | ir.LazyTensor = codes() if eager else lazy_codes(codes, shape)
        return self.g.constant(content, f"{v.name}_int8"), self.g.constant(scale, f"{v.name}_scale")


def lazy_codes(codes: Callable[[], Array], shape: tuple[int, ...]) -> ir.LazyTensor:
    """Int8 codes that are computed when they are written or run."""
    return ir.LazyTensor(lambda: ir.tensor(codes()), dtype=ir.DataType.INT8, shape=ir.Shape(shape))


def in_float32(g: Graph, x: ir.Value) -> ir.Value:
    """A half-precision value as float32, in which integer products of CPUs take their scales; others as they are."""
    if x.dtype not in HALVES:
        return x
    if g.is_constant(x):
        return g.constant(g.array(x).astype(np.float32), f"{x.name}_wide")
    wide = g.op("Cast", x, to=ir.DataType.FLOAT.value, name=f"{x.name}_wide", like=x)
    wide.type = ir.TensorType(ir.DataType.FLOAT)
    return wide


def integer_weight(codes: WeightCodes, linear: Linear, *, wide: bool = False) -> ir.Value:
    """The dequantized weight `[K, N]` as a value: int8 codes behind DequantizeLinear; `wide` makes it float32."""
    g, (q, scale) = codes.g, codes(linear)
    if linear.quantized and not wide:
        return linear.dequantize.outputs[0]  # type: ignore[union-attr]
    y = g.op(
        "DequantizeLinear",
        q,
        in_float32(g, scale) if wide else scale,
        axis=1 if g.array(scale).ndim else None,
        name=f"{linear.name}_weight",
        like=linear.weight if not linear.transposed else None,
    )
    if wide:
        y.type = ir.TensorType(ir.DataType.FLOAT)
    return y


def product(g: Graph, linear: Linear, x: ir.Value, w: ir.Value) -> None:
    """Make a linear compute `x @ w`, `w [K, N]`; a Gemm becomes MatMul and Add, for which integer kernels exist.

    Where the operands are wider than the linear its product is cast back.
    """
    out = linear.node.outputs[0]
    if x.dtype is ir.DataType.FLOAT and out.dtype in HALVES:
        y = g.op("MatMul", x, w, name=f"{linear.name}_product", like=out)
        y.type = ir.TensorType(ir.DataType.FLOAT)
        y = g.op("Cast", y, to=out.dtype.value, name=f"{linear.name}_narrow", like=out)
        if linear.node.op_type == "Gemm" and linear.bias is not None:
            y = g.op("Add", y, linear.bias, name=f"{linear.name}_bias", like=out)
        _take_over(g, out, y)
        return
    if linear.node.op_type == "MatMul":
        g.set_input(linear.node, 0, x)
        g.set_input(linear.node, 1, w)
        return
    y = g.op("MatMul", x, w, name=f"{linear.name}_product", like=linear.output)
    if linear.bias is not None:
        y = g.op("Add", y, linear.bias, name=f"{linear.name}_bias", like=linear.output)
    _take_over(g, linear.output, y)


def _take_over(g: Graph, old: ir.Value, new: ir.Value) -> None:
    """Replace a value by another, which gets its name: by that later passes find what the original has there."""
    g.replace(old, new)
    if not new.is_graph_output():
        old.name, new.name = g.fresh(f"{old.name}_was"), old.name


def run_time_product(g: Graph, x: ir.Node, weight: ir.Value, scale: ir.Value, name: str, like: ir.Value) -> ir.Value:
    """`Cast(MatMulInteger) * (s_x s_w)` in the type of `like`: run-time codes times int8 weights `[K, N]`."""
    q, s, z = x.outputs
    total = g.op("MatMulInteger", q, weight, z, name=f"{name}_int8")
    wide = g.op("Cast", total, to=ir.DataType.FLOAT.value, name=f"{name}_float")
    narrow = like.dtype if like.dtype in HALVES else None
    factor = g.op("Mul", s, in_float32(g, scale), name=f"{name}_scale")
    y = g.op("Mul", wide, factor, name=f"{name}_rescale", like=None if narrow else like)
    return g.op("Cast", y, to=narrow.value, name=f"{name}_narrow", like=like) if narrow else y
