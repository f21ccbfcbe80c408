"""Repair of cut layers one after another: each is fitted as the cut and repaired ones before it leave its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks.branches import residual_add, residual_sum
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.graph.scratch import release_pages, release_weights
from onnxcomp.maths import Array, Float64, affine
from onnxcomp.maths.affine import Means
from onnxcomp.methods.repair.correspondence import has, standing
from onnxcomp.methods.repair.mlp_gauss_newton import alone, fit_whole
from onnxcomp.methods.repair.output_head import fit_logits
from onnxcomp.methods.repair.readers import Reader, inside, replace
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, cross_gram, gram, mean, norm2, var

__all__ = ["DAMP", "Part", "alone", "behind", "in_order", "to_stream", "unfit"]

DAMP = 1e-3  # pull towards the weights as they are: calibration data is finite, and its errors are not those of others


@dataclass(frozen=True)
class _Moments:
    """Sums over the rows of one layer's calls: `gram` `[K, K]`, `cross` with the target `[K, N]`, sums of both."""

    gram: Float64
    cross: Float64
    x: Float64
    y: Float64
    rows: float


@dataclass(frozen=True)
class Part:
    """What is left of a value `[..., d]` of the uncut model: positions `[d']`, or a product with a matrix `[d, d']`.

    With `centred` the mean over the `d` channels is taken off first.
    """

    name: str
    of: Array | ir.TensorProtocol
    centred: bool = False

    def __call__(self, a: Float64) -> Float64:
        """The same of statistics `[..., d]`: `[..., d']`."""
        if isinstance(self.of, np.ndarray):
            return a[..., self.of] if self.of.ndim == 1 else np.asarray(a @ self.of)
        basis = np.asarray(self.of.numpy(), np.float64)
        found = np.asarray(a @ (basis - basis.mean(axis=0) if self.centred else basis))
        release_pages([self.of])  # there is one for every norm
        return found


def in_order(
    g: Graph,
    uncut: Graph,
    env: Env,
    readers: Iterable[Reader],
    streams: Mapping[str, Part] | None = None,
    whole: bool = False,
) -> None:
    """Fit the weights and biases of the readers of cut axes, in topological order, each on the graph as it is by then.

    `streams` are sums that were cut themselves, by name, with what is left there of the uncut model's: the linears that
    are added to them are fitted to that. With `whole` all linears behind a cut that are added to the stream are fitted,
    and feed-forward parts whole.

    The target of a linear that is added to the residual stream is the stream behind it in the uncut model less what
    the stream carries now, so that it makes up for errors before it too; of others, what they gave uncut. Uncut is the
    original where it has these values in the same widths, else the graph before the cut. Law: no layer's squared
    error on the calibration data is larger than without repair, as its inputs are then.
    """
    g.model.graph.sort()
    order = {node: i for i, node in enumerate(g.nodes())}
    held = inside(g, readers)
    changed = behind(o for r in held for x in r.linears for o in x.node.outputs) if whole else set()
    parts: dict[blocks.Linear, Part | str] = {}
    for x in blocks.linears(g):
        end = "" if (to := residual_sum(x)) is None else str(to.end.name)
        if end in (streams or {}) and not unfit(g, x):
            parts[x] = (streams or {})[end]
        elif end and x.output in changed and has(uncut, end) and not unfit(g, x):
            parts[x] = end
    found: list[tuple[int, Reader | blocks.Linear]] = [(order[x.node], x) for x in parts]
    found += [(min(order[x.node] for x in r.linears), r) for r in held if r.linears[0] not in parts]
    for _, site in sorted(found, key=lambda f: f[0]):
        if isinstance(site, Reader):
            _fit(g, uncut, env, site)
        else:
            part = parts[site]
            name, left = (part, None) if isinstance(part, str) else (part.name, part)
            to_stream(g, uncut, env, site, name, part=left, whole=whole)
        if g.spool is not None:
            release_weights(g.model)
    if whole and found:
        fit_logits(g, env)


def to_stream(
    g: Graph,
    uncut: Graph,
    env: Env,
    x: blocks.Linear,
    target: str,
    damp: float = DAMP,
    part: Part | None = None,
    whole: bool = False,
) -> None:
    """Fit a linear that is added to the residual stream, so that this comes closest to a value of the uncut model.

    Only a `part` of that value counts, by default all of it. With `whole` the feed-forward part that ends in the linear
    is fitted as well, all weights together. Law: the squared error of the stream on the calibration data does not grow.
    """
    found = residual_sum(x)
    assert found is not None
    free = x.bias is not None
    moments = _moments(g, uncut, env, x, free, (uncut.value(target), found.others), part)
    if found.scale is not None:
        factors = g.array(found.scale).reshape(-1).astype(np.float64)
        moments = dataclasses.replace(moments, cross=moments.cross / factors, y=moments.y / factors)
    _settle(g, alone(x), [moments], free, damp)
    mlp = next((m for m in blocks.mlps(g) if m.down.node is x.node), None) if whole else None
    if mlp is not None:
        fit_whole(g, *standing(env.original, uncut, uncut.value(target)), env, mlp, found, part)


def unfit(g: Graph, x: blocks.Linear) -> str:
    """Why a linear that is added to the stream cannot be fitted for itself, empty if it can."""
    if x.quantized:
        return "its weights are quantized"
    if len(list(x.weight.uses())) > 1:
        return "its weights are shared, so they cannot be fitted for one place"
    found = residual_sum(x)
    factors = np.ones(1) if found is None or found.scale is None else g.array(found.scale)
    if factors.size not in (1, x.sizes[1]) or not factors.all():
        return "what it gives is scaled by zeros, or not channel by channel"
    return "" if g.is_constant(x.weight) else "its weights are computed"


def behind(starts: Iterable[ir.Value]) -> set[ir.Value]:
    """All that is computed from some values, and these."""
    found, pending = set[ir.Value](), list(starts)
    while pending:
        v = pending.pop()
        if v not in found:
            found.add(v)
            pending += [o for u, _ in v.uses() for o in u.outputs]
    return found


def _fit(g: Graph, uncut: Graph, env: Env, reader: Reader) -> None:
    """Fit one weight; biases with it where its layers have the same."""
    biases = {x.bias for x in reader.linears}
    free = len(biases) == 1 and None not in biases
    _settle(g, reader, [_moments(g, uncut, env, x, free, _place(x)) for x in reader.linears], free, DAMP)


def _settle(g: Graph, reader: Reader, found: Sequence[_Moments], free: bool, damp: float) -> None:
    """Give a weight, and where it is free the bias, what fits the sum of all calls best."""
    weight = reader.weight(g)
    first, *rest = found  # a single one is not copied
    squares, cross = (np.asarray(sum((getattr(m, k) for m in rest), getattr(first, k))) for k in ("gram", "cross"))
    rows = sum(m.rows for m in found)
    means = None
    if free:
        means = Means(np.asarray(sum(m.x for m in found)) / rows, np.asarray(sum(m.y for m in found)) / rows, rows)
    fitted, bias = affine.linear(squares, cross, weight, damp, means)
    replace(g, reader, fitted.astype(weight.dtype), bias)


def _place(x: blocks.Linear) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    """The value behind a linear that is compared, and what else is added to it there."""
    add = residual_add(x)
    return (x.output, ()) if add is None else (add.outputs[0], tuple(v for v in add.inputs if v and v is not x.output))


def _moments(
    g: Graph,
    uncut: Graph,
    env: Env,
    x: blocks.Linear,
    free: bool,
    place: tuple[ir.Value, tuple[ir.Value, ...]],
    part: Part | None = None,
) -> _Moments:
    """What one call of a layer says of a target or a `part` of it; a bias that is not fitted is taken off the target.

    Raises `ModelError` where the target has another width.
    """
    out, carried = place
    source = x.source
    against, target = standing(env.original, uncut, uncut.value(str(out.name)))
    needs: dict[str, Need] = {"gram": gram(source), "cross": cross_gram(source, target, other_of="original")}
    needs |= {"mean": mean(source), "var": var(source), "norm": norm2(source), "y": mean(target, of="original")}
    for i, v in enumerate(carried):
        needs |= {f"less {i}": cross_gram(source, v), f"less y {i}": mean(v)}
    stats = env.collect(g, needs.values(), against)
    got: Mapping[str, Array] = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    rows = affine.count(got["norm"], got["mean"], got["var"])
    y, cross = (got["y"], got["cross"]) if part is None else (part(got["y"]), part(got["cross"]))
    if len(y) != x.sizes[1]:
        raise ModelError(f"'{target}' was {len(y)} wide in the model to fit to, and is {x.sizes[1]} now")
    for i in range(len(carried)):
        y, cross = y - got[f"less y {i}"], cross - got[f"less {i}"]
    if not free and x.bias is not None:
        bias = g.array(x.bias).reshape(-1).astype(np.float64)
        y, cross = y - bias, cross - rows * np.outer(got["mean"], np.broadcast_to(bias, y.shape))
    return _Moments(got["gram"], cross, rows * got["mean"], rows * y, rows)
