"""Gauss-Newton fit of all weights of a feed-forward part, so that the residual stream comes closer to a target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxcomp.blocks import Linear, Mlp
from onnxcomp.blocks.branches import ResidualSum
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Slot
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.activations import DERIVED
from onnxcomp.maths.newton_mlp import Ffn, fit
from onnxcomp.methods.repair.readers import Reader, replace
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, paired

__all__ = ["HELD", "fit_mlp", "reader_of"]

ROWS = 1 << 16  # calibration rows at most: the time of a round grows with them
LEAST_ROWS = 64  # even where memory is said to be less
HELD = 64  # bytes of memory for each element of a row: two float64 samples while they grow, as pairs, and split


def reader_of(x: Linear) -> Reader:
    """One linear as the reader of its own weight, with no axis that is cut."""
    return Reader(Slot(str(x.weight.name), int(x.transposed), ()), (x,))


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
    if why := _unfit(g, m):
        g.note(m.site, f"only its down projection is fitted: {why}")
        return
    d, n = m.up.sizes[0], m.down.sizes[1]
    source, end = m.up.source, to.end
    count = max(LEAST_ROWS, min(ROWS, (env.memory or MEMORY) // (HELD * (d + n))))
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
    start = _read(g, m)
    fitted = fit(start, x, (start(x) + missing).astype(np.float32))
    if fitted.part is start:
        g.note(m.site, "only its down projection is fitted: more does not help on held-out rows")
        return
    _write(g, m, fitted.part)
    gain = 1 - fitted.after / fitted.before
    g.note(m.site, f"all its weights fitted: squared error of the stream -{gain:.1%} on held-out rows")


def _unfit(g: Graph, m: Mlp) -> str:
    """Why only the down projection of a part can be fitted, empty if all its weights can."""
    if m.activation not in DERIVED:
        return f"the derivative of its activation '{m.activation}' is not known"
    inner = [x for x in m.linears if x is not m.down]
    if any(x.quantized or len(list(x.weight.uses())) > 1 or not g.is_constant(x.weight) for x in inner):
        return "weights before its activation are quantized, shared or computed"
    if len({x.bias is None for x in inner}) > 1:
        return "only one of up and gate has a bias"
    biases = [x for x in m.linears if x.bias is not None]
    if any(not g.is_constant(x.bias) or g.array(x.bias).size != x.sizes[1] for x in biases if x.bias is not None):
        return "a bias is computed, or the same for all channels"
    return ""


def _read(g: Graph, m: Mlp) -> Ffn:
    up, gate, down = (None if x is None else _affine(g, x) for x in (m.up, m.gate, m.down))
    assert up is not None
    assert down is not None
    return Ffn(up, gate, down, m.activation, m.down.bias is not None)


def _affine(g: Graph, x: Linear) -> Array:
    """Weight `[K, N]` with the bias as a last row where there is one."""
    weight = reader_of(x).weight(g)
    rows = [weight] if x.bias is None else [weight, g.array(x.bias).reshape(1, -1)]
    return np.concatenate(rows).astype(np.float32)


def _write(g: Graph, m: Mlp, part: Ffn) -> None:
    for x, w in ((m.up, part.up), (m.gate, part.gate), (m.down, part.down)):
        if x is not None and w is not None:
            free = x.bias is not None
            dtype = g.array(x.weight).dtype
            replace(g, reader_of(x), (w[:-1] if free else w).astype(dtype), w[-1].astype(np.float64) if free else None)
