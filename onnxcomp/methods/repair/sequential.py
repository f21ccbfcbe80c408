"""Sequential repair: each layer is refitted on the inputs that the repaired layers before it produce.

Layout: a linear is `y = x W + b`, `W [K, N]`; statistics are sums over the calibration rows of `x [R, K]` and of its
target `[R, N]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
from onnxcomp.methods.repair.block_tune import tune_part, tuning_work
from onnxcomp.methods.repair.correspondence import has, reference_value
from onnxcomp.methods.repair.mlp_gauss_newton import fit_mlp, work_of
from onnxcomp.methods.repair.output_head import fit_logits
from onnxcomp.methods.repair.part_weights import reader_of
from onnxcomp.methods.repair.readers import FEEDS_ITSELF, Reader, Repair, downstream, inside, replace
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, cross_gram, gram, mean, norm2, var

__all__ = ["DAMP", "WHOLE", "Part", "reader_of", "refit_in_order", "refit_to_stream", "unfit_reason"]

# Pull of a refitted weight towards the weights as they are, relative to the mean of the inputs' squares. More damping
# follows the calibration data less: it is finite, and the errors of the layers before are those on this data only.
DAMP = 1e-3
FEW_ROWS = 16  # for each in-channel: with fewer, samples that no fit has read choose among dampings
MORE_DAMPING = (1, 10, 100)  # times the damping: with less than a row for each channel the last is often the best
CORE = 2e10  # multiplications a second of one core, float32, that costs are told with: AVX2 at 3 GHz
WHOLE = ("block-tune", "gauss-newton")  # repairs of all that follows a cut, feed-forward parts as a whole


@dataclass(frozen=True)
class _Moments:
    """Sums over the rows of one call of a layer: `x^T x` `[K, K]`, `x^T y` `[K, N]`, and of `x` `[K]` and `y` `[N]`."""

    gram: Float64
    cross: Float64
    x: Float64
    y: Float64
    rows: float

    def error(self, weight: Float64, bias: Float64 | None) -> float:
        """The squared error of `x W + b` over these rows, less the sum of `y^2`."""
        squared = float(np.vdot(weight, self.gram @ weight) - 2 * np.vdot(weight, self.cross))
        if bias is None:
            return squared
        return squared + float(2 * bias @ (self.x @ weight) + self.rows * bias @ bias - 2 * bias @ self.y)


@dataclass(frozen=True)
class Part:
    """What represents a value `[..., d]` of the uncut model after the cut: channels `[d']`, or a projection `[d, d']`.

    With `centred` the mean over the `d` channels is subtracted first.
    """

    name: str
    of: Array | ir.TensorProtocol
    centred: bool = False

    def __call__(self, a: Float64) -> Float64:
        """Statistics `[..., d]` of the uncut value as those of the cut one: `[..., d']`."""
        if isinstance(self.of, np.ndarray):
            return a[..., self.of] if self.of.ndim == 1 else np.asarray(a @ self.of)
        basis = np.asarray(self.of.numpy(), np.float64)
        projected = np.asarray(a @ (basis - basis.mean(axis=0) if self.centred else basis))
        release_pages([self.of])  # a basis for every norm: together they may not fit into memory
        return projected


def refit_in_order(
    g: Graph,
    uncut: Graph,
    env: Env,
    readers: Iterable[Reader],
    streams: Mapping[str, Part] | None = None,
    how: Repair = "least-squares",
) -> None:
    """Refit the weights and biases of the readers of cut axes, in topological order, each on the graph repaired so far.

    `streams` are residual sums that were cut themselves, by name, with the part of the uncut sum that each represents:
    the linears added to them are refitted to that. `how` says what else is fitted: with `block-tune` and `gauss-newton`
    every linear downstream of a cut that is added to the stream, and feed-forward parts with all their weights.

    A linear that is added to the residual stream has as its target the uncut stream after it less what the stream
    carries now, so that it compensates earlier errors too; any other linear its own uncut output. A weight that reads
    what it gave keeps its numbers. Uncut is the original
    where it has these values in the same widths, else the graph before the cut. Law: no layer's squared error on the
    calibration data is larger than without repair, given the same inputs.
    """
    g.sort()
    order = {node: i for i, node in enumerate(g.nodes())}
    here = _fitted_together(g, inside(g, readers))
    changed = downstream(o for r in here for x in r.linears for o in x.node.outputs) if how in WHOLE else set()
    targets: dict[blocks.Linear, tuple[str, Part | None]] = {}  # of linears that are added to the stream
    for x in blocks.linears(g):
        end = "" if (joined := residual_sum(x)) is None else str(joined.end.name)
        if end in (streams or {}) and not unfit_reason(g, x):
            part = (streams or {})[end]
            targets[x] = part.name, part
        elif end and x.output in changed and has(uncut, end) and not unfit_reason(g, x):
            targets[x] = end, None
    steps: list[tuple[int, Reader | blocks.Linear]] = [(order[x.node], x) for x in targets]
    steps += [(min(order[x.node] for x in r.linears), r) for r in here if r.linears[0] not in targets]
    label = _label(g, targets, how)
    for i, (_, step) in enumerate(sorted(steps, key=lambda s: s[0])):
        env.progress(label, i, len(steps))
        if isinstance(step, Reader):
            _fit(g, uncut, env, step)
        else:
            name, represented = targets[step]
            refit_to_stream(g, uncut, env, step, name, part=represented, how=how)
        if g.spool is not None:
            release_weights(g.model)
    if how == "gauss-newton" and steps:
        fit_logits(g, env)


def _label(g: Graph, fitted: Iterable[blocks.Linear], how: Repair) -> str:
    """What is about to be done, for people who wait; for a repair of whole parts with the most that it costs."""
    ends = {x.node for x in fitted}
    parts = [m for m in blocks.mlps(g) if m.down.node in ends and not m.inner]
    work = sum(map(work_of, parts)) if how == "gauss-newton" else sum(map(tuning_work, parts))
    cost = f", at most some {max(1, round(work / CORE / 60))} min on one core" if how in WHOLE and work else ""
    return f"repair by {how}{cost}"


def _fitted_together(g: Graph, readers: Iterable[Reader]) -> list[Reader]:
    """The readers by weight, without those whose weight reads what it gave, which is noted."""
    by_weight: dict[ir.Value, Reader] = {}
    for r in readers:
        first = by_weight.setdefault(r.linears[0].weight, r)
        by_weight[r.linears[0].weight] = Reader(r.slot, tuple(dict.fromkeys((*first.linears, *r.linears))))
    for r in (r for r in by_weight.values() if r.feeds_itself):
        g.note(r.linears[0].site, FEEDS_ITSELF)
    return [r for r in by_weight.values() if not r.feeds_itself]


def refit_to_stream(
    g: Graph,
    uncut: Graph,
    env: Env,
    x: blocks.Linear,
    target: str,
    damp: float = DAMP,
    part: Part | None = None,
    how: Repair = "least-squares",
) -> None:
    """Refit a linear that is added to the residual stream, so that the stream comes closest to an uncut `target`.

    Only a `part` of that value counts, by default all of it. With `block-tune` and `gauss-newton` the feed-forward part
    that ends in the linear is then fitted too, all its weights together. Law: the squared error of the stream on the
    calibration data does not grow (`block-tune`: that of the layer's output on rows that no fit has read).
    """
    joined = residual_sum(x)
    assert joined is not None
    free = x.bias is not None
    factors = 1.0 if joined.scale is None else g.array(joined.scale).reshape(-1).astype(np.float64)

    def moments(world: Env) -> list[_Moments]:
        found = _moments(g, uncut, world, x, free, (uncut.value(target), joined.others), part)
        return [dataclasses.replace(found, cross=found.cross / factors, y=found.y / factors)]

    _solve(g, reader_of(x), env, moments, free, damp)
    if how == "block-tune":
        tune_part(g, uncut, env, x, joined, target, part)
    elif how == "gauss-newton" and (
        mlp := next((m for m in blocks.mlps(g) if m.down.node is x.node and not m.inner), None)
    ):
        fit_mlp(g, *reference_value(env.original, uncut, uncut.value(target)), env, mlp, joined, part)


def unfit_reason(g: Graph, x: blocks.Linear) -> str:
    """Why a linear that is added to the stream cannot be refitted on its own, empty if it can."""
    if x.quantized:
        return "its weights are quantized"
    if len(list(x.weight.uses())) > 1:
        return "its weights are shared, so they cannot be fitted for one place"
    joined = residual_sum(x)
    factors = np.ones(1) if joined is None or joined.scale is None else g.array(joined.scale)
    if factors.size not in (1, x.sizes[1]) or not factors.all():
        return "what it gives is scaled by zeros, or not channel by channel"
    return "" if g.is_constant(x.weight) else "its weights are computed"


def _fit(g: Graph, uncut: Graph, env: Env, reader: Reader) -> None:
    """Refit one weight to the uncut outputs of its linears, with the bias where they have the same one."""
    biases = {x.bias for x in reader.linears}
    free = len(biases) == 1 and None not in biases

    def moments(world: Env) -> list[_Moments]:
        return [_moments(g, uncut, world, x, free, _place(x)) for x in reader.linears]

    _solve(g, reader, env, moments, free, DAMP)


def _solve(
    g: Graph, reader: Reader, env: Env, moments: Callable[[Env], list[_Moments]], free: bool, damp: float
) -> None:
    """Store the weight, and with `free` the bias, of least squared error over all calls of a layer.

    Of few rows the damping is raised where samples that no fit has read then err less.
    """
    calls = moments(env)
    weight = reader.weight(g)
    first, *rest = calls  # the statistics of a single call are not copied
    squares, cross = (np.asarray(sum((getattr(m, k) for m in rest), getattr(first, k))) for k in ("gram", "cross"))
    rows = sum(m.rows for m in calls)
    means = None
    if free:
        means = Means(np.asarray(sum(m.x for m in calls)) / rows, np.asarray(sum(m.y for m in calls)) / rows, rows)
    spare = env.unseen() if rows < FEW_ROWS * len(weight) else None
    unseen = [] if spare is None else moments(spare)
    fits = [affine.linear(squares, cross, weight, damp * k, means) for k in (MORE_DAMPING if unseen else (1,))]
    best = int(np.argmin([sum(m.error(*f) for m in unseen) for f in fits]))
    if best:
        g.note(reader.linears[0].site, f"damped {MORE_DAMPING[best]} times more: few rows, and unseen samples err less")
    fitted, bias = fits[best]
    replace(g, reader, fitted.astype(weight.dtype), bias)


def _place(x: blocks.Linear) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    """The value after a linear that is compared, and what else is added there."""
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
    """The moments of one call of a layer with its target, or a `part` of it, less what else is added there.

    Without `free` the bias is kept, so it is subtracted from the target too.

    Raises `ModelError` where the target has another width.
    """
    out, stream_operands = place
    source = x.source
    against, target = reference_value(env.original, uncut, uncut.value(str(out.name)))
    needs: dict[str, Need] = {"gram": gram(source), "cross": cross_gram(source, target, other_of="original")}
    needs |= {"mean": mean(source), "var": var(source), "norm": norm2(source), "y": mean(target, of="original")}
    for i, v in enumerate(stream_operands):
        needs |= {f"less {i}": cross_gram(source, v), f"less y {i}": mean(v)}
    stats = env.collect(g, needs.values(), against)
    values: Mapping[str, Array] = {k: np.asarray(stats[n], np.float64) for k, n in needs.items()}
    rows = affine.count(values["norm"], values["mean"], values["var"])
    y, cross = (values["y"], values["cross"]) if part is None else (part(values["y"]), part(values["cross"]))
    if len(y) != x.sizes[1]:
        raise ModelError(f"'{target}' was {len(y)} wide in the model to fit to, and is {x.sizes[1]} now")
    for i in range(len(stream_operands)):
        y, cross = y - values[f"less y {i}"], cross - values[f"less {i}"]
    if not free and x.bias is not None:
        bias = g.array(x.bias).reshape(-1).astype(np.float64)
        y, cross = y - bias, cross - rows * np.outer(values["mean"], np.broadcast_to(bias, y.shape))
    return _Moments(values["gram"], cross, rows * values["mean"], rows * y, rows)
