"""Gauss-Newton fit of all weights of a feed-forward part, so that the residual stream comes closer to a target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxcomp.blocks import Mlp
from onnxcomp.blocks.branches import ResidualSum
from onnxcomp.graph import Graph
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Float64
from onnxcomp.maths.newton import ROUNDS
from onnxcomp.maths.newton_mlp import fit
from onnxcomp.methods.repair.part_weights import read, unfit_reason, write
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, paired

__all__ = ["HELD", "WORK", "fit_mlp", "work_of"]

ROWS = 1 << 16  # calibration rows at most: the time of a round grows with them
LEAST_ROWS = 64  # even where memory is said to be less
RUNS = 35  # of the part over its rows that a round costs, about: products of the solver, gradients, tries of the step
# Multiplications of one part at most, about two minutes on one core: a wide part is fitted on fewer rows. A budget in
# seconds would make results depend on what else the machine does.
WORK = 1 << 41
HELD = 64  # bytes of memory for each element of a row: two float64 samples while they grow, as pairs, and split


def fit_mlp(
    g: Graph,
    against: Graph,
    target: str,
    env: Env,
    m: Mlp,
    to: ResidualSum,
    part: Callable[[Float64], Float64] | None = None,
) -> None:
    """Fit all weights and biases of a feed-forward part to a stream of the graph `against`, and note the gain.

    `to` is how its down projection is added to the stream; `part` maps the target's rows to those of a narrower stream.
    Law: on calibration rows that were held out of the fit, the stream's squared error falls, or nothing changes.
    """
    if why := unfit_reason(g, m):
        g.note(m.site, f"only its down projection is fitted: {why}")
        return
    d, n = m.up.sizes[0], m.down.sizes[1]
    source, end = m.up.source, to.end
    count = max(LEAST_ROWS, min(_rows(m), (env.memory or MEMORY) // (HELD * (d + n))))
    here: Need = paired(source, end, count)
    there: Need = paired(source, target, count, other_of="original")
    stats = env.collect(g, [here, there], against)
    x = np.asarray(stats[here][:, :d], np.float32)
    wanted = np.asarray(stats[there][:, d:], np.float64)
    missing = (wanted if part is None else part(wanted)) - stats[here][:, d:]  # [rows, n], of the stream
    if to.scale is not None:
        missing /= g.array(to.scale).reshape(-1)
    if m.up.bias is not None:
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
    start = read(g, m)
    fitted = fit(start, x, (start(x) + missing).astype(np.float32))
    if fitted.part is start:
        g.note(m.site, "only its down projection is fitted: more does not help on held-out rows")
        return
    write(g, m, fitted.part.weights)
    gain = 1 - fitted.after / fitted.before
    g.note(m.site, f"all its weights fitted: squared error of the stream -{gain:.1%} on held-out rows")


def work_of(m: Mlp) -> int:
    """Multiplications that the fit of one part costs at most."""
    return _rows(m) * ROUNDS * RUNS * _size(m)


def _rows(m: Mlp) -> int:
    """Calibration rows that the fit reads at most, memory aside."""
    return min(ROWS, WORK // (ROUNDS * RUNS * _size(m)))


def _size(m: Mlp) -> int:
    """Multiplications of one row."""
    return sum(x.sizes[0] * x.sizes[1] for x in m.linears)
