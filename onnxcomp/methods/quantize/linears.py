"""Quantized linears as graph edits, shared by every quantizer: eligible linears, integer weights, products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import BatchedLinear, Embedding, Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, formats, saturation
from onnxcomp.maths.formats import FORMATS
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.target import Granularity, Target, resolved

__all__ = [
    "FLOATS",
    "HALVES",
    "LAZY_BYTES",
    "WeightCodes",
    "chosen",
    "in_float32",
    "integer_weight",
    "lazy_codes",
    "product",
    "quantizable",
    "run_time_product",
]

# Weights from this size on that lie in a file become codes only when they are written or run: small ones are cheap to
# hold, and a large model must not have all its codes in memory.
LAZY_BYTES = 16 << 20
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, *HALVES)


def quantizable(g: Graph) -> list[Linear]:
    """Linears whose weight is stored in a float type, with the output head that shares the embedding table."""
    return [x for x in blocks.linears(g, tied=True) if not x.quantized and x.weight.dtype in FLOATS]


def chosen(
    g: Graph, skip: Iterable[str], min_size: int, tables: Iterable[Embedding | BatchedLinear] = ()
) -> list[Linear]:
    """Quantizable linears; those that match a skip pattern, by node or weight, or are small are declined by name.

    So is a pattern that matches neither a linear nor one of the `tables`.
    """
    patterns, kept = tuple(skip), []
    used = {skipped(patterns, str(e.node.name), str(e.table.name)) for e in tables}
    for linear in quantizable(g):
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
        """Symmetric int8 codes `[K, N]` and their scale, `[N]` per channel or `[]`."""
        key = (linear.weight, linear.transposed)
        if key not in self._made:
            if linear.transposed and linear.weight in self._tables:
                q, scale = self._rows[linear.weight] = self._make(linear.weight, True, self.saturates, stored=True)
                like = ir.Value(type=q.type, shape=ir.Shape(linear.sizes))
                self._made[key] = self.g.op("Transpose", q, perm=[1, 0], name=f"{q.name}_head", like=like), scale
            else:
                self._made[key] = self._make(linear.weight, linear.transposed, self.saturates)
        return self._made[key]

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
    y = g.op(
        "DequantizeLinear",
        q,
        in_float32(g, scale) if wide else scale,
        axis=codes.axis,
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
        g.replace(out, y)
        return
    if linear.node.op_type == "MatMul":
        g.set_input(linear.node, 0, x)
        g.set_input(linear.node, 1, w)
        return
    y = g.op("MatMul", x, w, name=f"{linear.name}_product", like=linear.output)
    if linear.bias is not None:
        y = g.op("Add", y, linear.bias, name=f"{linear.name}_bias", like=linear.output)
    g.replace(linear.output, y)


def run_time_product(g: Graph, x: ir.Node, weight: ir.Value, scale: ir.Value, name: str, like: ir.Value) -> ir.Value:
    """`Cast(MatMulInteger) * (s_x s_w)` in the type of `like`: run-time codes times int8 weights `[K, N]`."""
    q, s, z = x.outputs
    total = g.op("MatMulInteger", q, weight, z, name=f"{name}_int8")
    wide = g.op("Cast", total, to=ir.DataType.FLOAT.value, name=f"{name}_float")
    narrow = like.dtype if like.dtype in HALVES else None
    factor = g.op("Mul", s, in_float32(g, scale), name=f"{name}_scale")
    y = g.op("Mul", wide, factor, name=f"{name}_rescale", like=None if narrow else like)
    return g.op("Cast", y, to=narrow.value, name=f"{name}_narrow", like=like) if narrow else y
