"""Repair of cut layers one after another: each is fitted as the cut and repaired ones before it leave its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.branches import joins
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array, Float64, refit
from onnxcomp.maths.refit import Means
from onnxcomp.pipeline import Env
from onnxcomp.readers import Reader, inside, replace
from onnxcomp.stats import Need, cross_gram, gram, mean, norm2, var

__all__ = ["DAMP", "in_order"]

DAMP = 1e-3  # pull towards the weights as they are: calibration data is finite, and its errors are not those of others


@dataclass(frozen=True)
class _Moments:
    """Sums over the rows of one layer's calls: `gram` `[K, K]`, `cross` with the target `[K, N]`, sums of both."""

    gram: Float64
    cross: Float64
    x: Float64
    y: Float64
    rows: float


def in_order(g: Graph, uncut: Graph, env: Env, readers: Iterable[Reader]) -> None:
    """Fit the weights and biases of the readers of cut axes, in topological order, each on the graph as it is by then.

    The target of a linear that is added to the residual stream is the stream behind it in the uncut model less what
    the stream carries now, so that it makes up for errors before it too; of others, what they gave uncut. Uncut is the
    original where it has these values in the same widths, else the graph before the cut. Law: no layer's squared
    error on the calibration data is larger than without repair, as its inputs are then.
    """
    g.model.graph.sort()
    order = {node: i for i, node in enumerate(g.nodes())}
    for reader in sorted(inside(g, readers), key=lambda r: min(order[x.node] for x in r.linears)):
        _fit(g, uncut, env, reader)


def _fit(g: Graph, uncut: Graph, env: Env, reader: Reader) -> None:
    """Fit one weight; biases with it where its layers have the same."""
    weight = reader.weight(g)
    biases = {x.bias for x in reader.linears}
    free = len(biases) == 1 and None not in biases
    found = [_moments(g, uncut, env, x, free) for x in reader.linears]
    squares, cross = (np.asarray(sum(getattr(m, k) for m in found)) for k in ("gram", "cross"))
    rows = sum(m.rows for m in found)
    means = None
    if free:
        means = Means(np.asarray(sum(m.x for m in found)) / rows, np.asarray(sum(m.y for m in found)) / rows, rows)
    fitted, bias = refit.linear(squares, cross, weight, DAMP, means)
    replace(g, reader, fitted.astype(weight.dtype), bias)


def _moments(g: Graph, uncut: Graph, env: Env, x: blocks.Linear, free: bool) -> _Moments:
    """What one call of a layer says; a bias that is not to be fitted is taken off its target."""
    add, source = joins(x), x.source
    out = x.output if add is None else add.outputs[0]
    carried = None if add is None else next(v for v in add.inputs if v is not x.output)
    needs: dict[str, Need] = {"gram": gram(source), "cross": cross_gram(source, out, other_of="original")}
    needs |= {"mean": mean(source), "var": var(source), "norm": norm2(source), "y": mean(out, of="original")}
    if carried is not None:
        needs |= {"less": cross_gram(source, carried), "less y": mean(carried)}
    stats = env.collect(g, needs.values(), env.original if _same(env.original, uncut, out) else uncut)
    got: Mapping[str, Array] = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    rows = refit.count(got["norm"], got["mean"], got["var"])
    bias = 0.0 if free or x.bias is None else g.array(x.bias).reshape(-1).astype(np.float64)
    y = got["y"] - got.get("less y", 0.0) - bias
    cross = got["cross"] - got.get("less", 0.0) - rows * np.outer(got["mean"], np.broadcast_to(bias, y.shape))
    return _Moments(got["gram"], cross, rows * got["mean"], rows * y, rows)


def _same(original: Graph, uncut: Graph, v: ir.Value) -> bool:
    """Whether the original computes a value of that name that is as wide as before the cut."""
    try:
        there, here = original.value(str(v.name)), uncut.value(str(v.name))
    except ModelError:
        return False
    if original.is_constant(there) or there.shape is None or here.shape is None:
        return False
    return len(there.shape) == len(here.shape) > 0 and there.shape[-1] == here.shape[-1]
