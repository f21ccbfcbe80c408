"""Whether quantizing saves time: linears of one input as two small models, float and integer, to be measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import BatchedLinear, Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.lowering.forms import KINDS, Context, default, legal
from onnxcomp.methods.quantize import batched, linears
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.pipeline import Env

__all__ = ["SLOWER", "TICK", "coded", "experts_models", "loses", "models", "paying", "products"]

# A group is kept in float where integers take longer by this factor, and by more seconds than the noise of one session
# call: small differences must not decide, since they change from run to run.
SLOWER = 1.05
TICK = 20e-6
GATHERED = 4  # experts of a table that are timed: how long gathering takes does not depend on how many there are


def loses(group: list[Linear], env: Env, *, dynamic: bool = False) -> str:
    """Why the linears of one input stay float: integers are slower at the asked shapes, where that is measured.

    Empty where they are not slower or nothing is known; `dynamic` takes the input's range at run time.
    """
    shapes = env.dims(group[0].source) if env.measures and group[0].source.dtype is ir.DataType.FLOAT else []
    forms = models(group, env.target, dynamic=dynamic) if shapes else {}
    return _slower(env, group[0].site, forms, [(1, math.prod(s[:-1]), s[-1]) for s in shapes])


def paying(found: Iterable[BatchedLinear], g: Graph, env: Env, *, only_faster: bool) -> Iterator[BatchedLinear]:
    """Products with experts that become int8; with `only_faster` those that integers make slower are declined."""
    for x in list(found):
        why = _experts_lose(x, env) if only_faster else ""
        if why:
            g.decline(x.site, why)
        else:
            yield x


def _experts_lose(x: BatchedLinear, env: Env) -> str:
    """Why a table of experts stays float: its int8 form is slower at the asked shapes, where that is measured."""
    known = env.measures and x.table.dtype is ir.DataType.FLOAT
    shapes = [s for s in env.dims(x.input) if len(s) == 3] if known else []
    return _slower(env, x.site, experts_models(x, env.target), shapes) if shapes else ""


def experts_models(x: BatchedLinear, target: Target) -> dict[str, Graph]:
    """`float` and `int8`: the product with experts' weights on an input `x` of the original's rank and layout."""
    floats = _experts(x)
    ints = floats.clone()
    (copy,) = blocks.batched_linears(ints)
    batched.store(ints, copy, batched.TableCodes(ints, target, batched.run_time))
    ints.sort()
    ints.sweep()
    return {"float": floats, "int8": ints}


def _experts(x: BatchedLinear) -> Graph:
    """The product with the experts' weights in float, on an input `x` of the rank and layout of the original's."""
    count, k, n = x.sizes
    count = min(count, GATHERED) if x.gather is not None else count
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", "a", "b"]))
    g = Graph(ir.Model(ir.Graph([source], [], nodes=[], opset_imports={"": 23}, name="trial"), ir_version=10))
    w = _constant(g, (count, n, k) if x.left else (count, k, n), 0.01, ir.DataType.FLOAT)
    if x.gather is not None:
        rows = g.op("Squeeze", g.op("Shape", source, start=0, end=1), np.array([0]))
        numbers = g.op("Mod", g.op("Range", np.array(0), rows, np.array(1)), np.array(count))
        like = ir.Value(type=source.type, shape=ir.Shape(["rows", *w.shape[1:]]))  # type: ignore[index]
        w = g.op("Gather", w, numbers, axis=0, like=like)
    y = g.op("MatMul", *((w, source) if x.left else (source, w)), name="product")
    y.type, y.name = source.type, "y"
    g.model.graph.outputs.append(y)
    g.sort()
    return g


def _slower(env: Env, site: Site, forms: dict[str, Graph], shapes: Sequence[tuple[int, ...]]) -> str:
    """The times where the second form takes longer than the first on an input `x` of those shapes; else empty."""
    times = []
    for shape in shapes:
        floats, ints = env.cost(site, forms, {"x": shape})
        if floats.seconds is None or ints.seconds is None or "table" in (floats.source, ints.source):
            return ""
        times.append((floats.seconds, ints.seconds))
    slower = times and math.prod(b / a for a, b in times) ** (1 / len(times)) > SLOWER
    if not slower or sum(b - a for a, b in times) <= TICK * len(times):
        return ""
    said = ", ".join(f"{b * 1e3:.3f} for {a * 1e3:.3f} ms" for a, b in times)
    return f"integers would be slower at the asked shapes ({said})"


def models(group: Sequence[Linear], target: Target, *, dynamic: bool = False) -> dict[str, Graph]:
    """`float` and `int8`: the linears on an input `x` `[batch, rows, K]`, integers in the form of the target's table.

    Weights are constants created when a model runs: the time of a dense product does not depend on them.
    """
    fan_in, outs = group[0].sizes[0], [(x.sizes[1], x.bias is not None) for x in group]
    kind = "dynamic" if dynamic else "quantized"
    return {"float": products(fan_in, outs), "int8": _quantized(fan_in, outs, target, kind)}


def products(fan_in: int, outs: Sequence[tuple[int, bool]], source: str = "x") -> Graph:
    """Float linears on an input `[batch, rows, fan_in]`, by their fan-out and whether they have a bias."""
    return Graph(_model(fan_in, outs, "", source).model)


def coded(fan_in: int, fan_out: int, biased: bool, bits: int, block: int, target: Target, *, zeros: bool) -> Graph:
    """A linear on an input `x` `[batch, rows, fan_in]` with codes in blocks, in the form of the target's table."""
    g = Graph(_model(fan_in, [], "").model)
    (x,), dtype = g.inputs, ir.DataType.UINT8 if bits > 4 else ir.DataType.UINT4
    like = ir.Value(name="like", type=x.type, shape=ir.Shape(["batch", "rows", fan_out]))
    code = 3 if bits == 2 else 2**bits - 1  # the largest, so that its bits are seen to be in use
    w = _constant(g, (fan_in, fan_out), code, dtype)
    shape = (-(-fan_in // block), fan_out)
    args = [w, g.constant(np.full(shape, 0.01, np.float32), "scale")]
    args += [_constant(g, shape, 1, dtype)] if zeros else []
    w = g.op("DequantizeLinear", *args, axis=0, block_size=block)
    w.type, w.shape = x.type, ir.Shape([fan_in, fan_out])
    y = g.op("MatMul", x, w, like=like)
    y = g.op("Add", y, np.full(fan_out, 0.1, np.float32), like=like) if biased else y
    y.name = "y"
    g.model.graph.outputs.append(y)
    g.sort()
    _in_form(g, target, "weight-only")
    return g


def _quantized(fan_in: int, outs: Sequence[tuple[int, bool]], target: Target, kind: str) -> Graph:
    g = Graph(_model(fan_in, outs, kind).model)
    _in_form(g, target, kind)
    return g


def _model(fan_in: int, outs: Sequence[tuple[int, bool]], kind: str, source: str = "x") -> Graph:
    """The linears in float where `kind` is empty, else quantized as that kind of site, before they are lowered."""
    x = ir.Value(name=source, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "rows", fan_in]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="trial")
    g = Graph(ir.Model(graph, ir_version=10))
    codes = _codes(g, x, kind)
    for i, (width, biased) in enumerate(outs):
        like = ir.Value(name=f"like{i}", type=x.type, shape=ir.Shape(["batch", "rows", width]))
        y = _product(g, codes, fan_in, like, kind)
        if biased:
            y = g.op("Add", y, np.full(width, 0.1, np.float32), like=like)
        y.name = f"y{i}"
        graph.outputs.append(y)
    graph.sort()
    return g


def _codes(g: Graph, x: ir.Value, kind: str) -> ir.Value:
    """The input of the products: `x`, `x` through a Q/DQ pair, or its codes of a run-time range."""
    if not kind:
        return x
    if kind == "dynamic":
        return g.op("DynamicQuantizeLinear", x, outputs=3)
    scale, zero = np.array(0.03, np.float32), np.array(128, np.uint8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero, like=x)


def _product(g: Graph, source: ir.Value, fan_in: int, like: ir.Value, kind: str) -> ir.Value:
    """One product of the width of `like`."""
    assert like.shape is not None
    width = int(like.shape[-1])  # type: ignore[arg-type]
    if not kind:
        return g.op("MatMul", source, _constant(g, (fan_in, width), 0.01, ir.DataType.FLOAT), like=like)
    codes, scale = _constant(g, (fan_in, width), 3, ir.DataType.INT8), np.full(width, 0.01, np.float32)
    if kind == "dynamic":
        quantizer = source.producer()
        assert quantizer is not None
        return linears.run_time_product(g, quantizer, codes, g.constant(scale, "scale"), str(like.name), like)
    w = g.op("DequantizeLinear", codes, scale, axis=1)
    w.type, w.shape = like.type, ir.Shape([fan_in, width])
    return g.op("MatMul", source, w, like=like)


def _constant(g: Graph, shape: tuple[int, ...], number: float, dtype: ir.DataType) -> ir.Value:
    """A tensor of one number that takes memory only while it is run."""

    def content() -> ir.TensorProtocol:
        return ir.tensor(np.full(shape, number, dtype.numpy()))

    return g.constant(ir.LazyTensor(content, dtype=dtype, shape=ir.Shape(shape)), "weight")


def _in_form(g: Graph, target: Target, name: str) -> None:
    """Write the quantized products as lowering does without measuring."""
    kind, ctx = KINDS[name], Context(g, target)
    for spot in kind.find(g):
        form = default(ctx, kind.name, legal(ctx, spot, standard=False, approximate=False))
        kind.form(form).rewrite(ctx, spot)
    g.sort()
    g.sweep()
