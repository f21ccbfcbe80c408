"""Tuning of a feed-forward part or an attention's output, with the norm behind it, towards the uncut layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcomp import blocks
from onnxcomp.blocks import Linear, Mlp, NormSite
from onnxcomp.blocks.branches import ResidualSum
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.values import users_of
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.block_tune import ROWS_READ, Affine, Block, Norm, Rows, tune
from onnxcomp.methods.repair import part_weights
from onnxcomp.methods.repair.correspondence import reference_value
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, paired

__all__ = ["tune_part", "tuning_work"]

ROWS = 1 << 16  # calibration rows at most: more than the steps of a tuning read
LEAST_ROWS = 64  # even where memory is said to be less
HELD = 32  # bytes of memory for each element of a row: pairs of float32 while they grow, and as rows
EVERY = 8  # one row of so many judges the states where the job has no samples to spare

Represented = Callable[[Float64], Float64]


@dataclass(frozen=True)
class _Place:
    """What is tuned: a linear that is added to the stream, the feed-forward part it ends, and the norm of the sum."""

    x: Linear
    joined: ResidualSum
    mlp: Mlp | None
    norm: NormSite | None

    @property
    def site(self) -> Site:
        """Where the gain is noted."""
        return self.x.site if self.mlp is None else self.mlp.site

    @property
    def first(self) -> Linear:
        """The linear whose input is that of the part."""
        return self.x if self.mlp is None else self.mlp.up


def tune_part(
    g: Graph, uncut: Graph, env: Env, x: Linear, joined: ResidualSum, target: str, part: Represented | None = None
) -> None:
    """Tune what ends in a linear that was fitted to the stream `target` of the uncut model, and note the gain.

    That is its feed-forward part, else the linear; where a norm alone reads the sum, the norm too, and the error is
    that of its output. A linear without either is the best already. `part` maps rows of the target to those of a
    narrower stream. Law: on rows of samples that no fit has read the squared error falls, or nothing changes.
    """
    place = _place(g, x, joined, tuned_norm=part is None)
    if place.mlp is None and place.norm is None:
        return
    end, goal = joined.end, uncut.value(target)
    if place.norm is not None:
        after = next((n for n in blocks.norms(uncut) if n.input is goal and n.kind == place.norm.kind), None)
        if after is None or len(users_of(goal)) > 1:
            place = _Place(place.x, joined, place.mlp, None)
        else:
            goal = after.output
    start = _read(g, place)
    fitted, unseen = _rows(g, env, place, start, str(end.name), reference_value(env.original, uncut, goal), part)
    found = tune(start, fitted, unseen)
    if found.part is start:
        g.note(place.site, "only fitted in closed form: tuning does not help on rows that no fit has read")
        return
    _write(g, place, found.part)
    gain = 1 - found.after / found.before
    g.note(place.site, f"tuned: squared error of the layer's output -{gain:.1%} on rows that no fit has read")


def tuning_work(m: Mlp) -> int:
    """Multiplications that the tuning of one part costs: forwards, and twice as many back."""
    return 3 * ROWS_READ * sum(x.sizes[0] * x.sizes[1] for x in m.linears)


def _place(g: Graph, x: Linear, joined: ResidualSum, *, tuned_norm: bool) -> _Place:
    mlp = next((m for m in blocks.mlps(g) if m.down.node is x.node and not m.inner), None)
    if mlp is not None and (why := part_weights.unfit_reason(g, mlp)):
        g.note(mlp.site, f"only its down projection is fitted: {why}")
        mlp = None
    norm = next((n for n in blocks.norms(g) if n.input is joined.end), None) if tuned_norm else None
    sole = norm is not None and len(users_of(joined.end)) == 1 and not joined.end.is_graph_output()
    shared = norm is not None and any(len(list(c.uses())) > 1 for c in (norm.gain, norm.bias) if c is not None)
    return _Place(x, joined, mlp, norm if sole and not shared else None)


def _read(g: Graph, place: _Place) -> Block:
    """The weights as they are, float32."""
    part = Affine(part_weights.affine(g, place.x)) if place.mlp is None else part_weights.read(g, place.mlp)
    scale = None if place.joined.scale is None else g.array(place.joined.scale).reshape(-1).astype(np.float32)
    if (n := place.norm) is None:
        return Block(part, scale)
    gain, bias = (None if v is None else g.array(v).reshape(-1).astype(np.float32) for v in (n.gain, n.bias))
    assert gain is not None
    epsilon = n.node.attributes.get_float("epsilon", 1e-5)
    return Block(part, scale, Norm(gain, bias, epsilon, centred=n.kind == "layer"))


def _write(g: Graph, place: _Place, tuned: Block) -> None:
    if place.mlp is None:
        part_weights.put_affine(g, place.x, tuned.part.weights[0])
    else:
        part_weights.write(g, place.mlp, tuned.part.weights)
    if place.norm is not None and tuned.norm is not None:
        for v, new in ((place.norm.gain, tuned.norm.gain), (place.norm.bias, tuned.norm.bias)):
            if v is not None and new is not None:
                old = g.array(v)
                g.put(v, new.reshape(old.shape).astype(old.dtype))


def _rows(
    g: Graph, env: Env, place: _Place, start: Block, end: str, goal: tuple[Graph, str], part: Represented | None
) -> tuple[Rows, Rows]:
    """Rows to fit, and rows of samples that no fit reads; of few samples every eighth row is left out instead."""
    spare = env.unseen()
    fitted = _collected(g, env, place, start, end, goal, part)
    if spare is not None:
        return fitted, _collected(g, spare, place, start, end, goal, part)
    is_left_out = np.arange(len(fitted)) % EVERY == EVERY - 1
    return fitted.take(~is_left_out), fitted.take(is_left_out)


def _collected(
    g: Graph, env: Env, place: _Place, start: Block, end: str, goal: tuple[Graph, str], part: Represented | None
) -> Rows:
    against, target = goal
    source, (d, n) = place.first.source, (place.first.sizes[0], place.x.sizes[1])
    count = max(LEAST_ROWS, min(ROWS, (env.memory or MEMORY) // (HELD * (d + n))))
    here: Need = paired(source, end, count)
    there: Need = paired(source, target, count, other_of="original")
    stats = env.collect(g, [here, there], against)
    x = np.asarray(stats[here][:, :d], np.float32)
    y = np.asarray(stats[there][:, d:], np.float32)
    y = y if part is None else part(y.astype(np.float64)).astype(np.float32)
    if place.first.bias is not None:
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
    rest: Array = np.asarray(stats[here][:, d:], np.float32)
    rest = np.concatenate([r.rest - start.added(r.x) for r in Rows(x, rest, y).pieces()])
    return Rows(x, rest, y)
