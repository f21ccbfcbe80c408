"""The linear that makes a model's logits, fitted so that its probabilities come closest to the original's."""

from __future__ import annotations

import numpy as np

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array
from onnxcomp.maths.newton_softmax import Classes, fit
from onnxcomp.methods.repair.mlp_gauss_newton import HELD, alone
from onnxcomp.methods.repair.readers import replace
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, paired
from onnxcomp.validation.outputs import View

__all__ = ["fit_logits"]

ROWS = 1 << 15  # at most, of the calibration data
WORK = 1 << 39  # multiplications of all rows with the table, at most: a round takes some thirty times that
FEW = 8  # rows for each channel, or nothing is fitted
TABLES = 4  # of classes, in float32, are held at a time


def fit_logits(g: Graph, env: Env) -> None:
    """Fit what is before a softmax to the original's probabilities, and say so.

    Fitted is a linear between the stream and a table of classes (`slice` makes one before a tied table), else the table
    itself, multiplied from the left where it has more classes than channels. Law: on calibration rows that were not
    fitted to, the divergence falls, or nothing changes.
    """
    found = {x.output.name: x for x in blocks.linears(g, tied=True)}
    there = {x.output.name: x for x in blocks.linears(env.original, tied=True)}
    for name in (r.name for r in View.of(g).outputs if r.logits):
        x, y = found.get(name), there.get(name)
        if x is None or y is None or x.quantized or y.quantized or x.sizes[1] != y.sizes[1]:
            continue  # with another vocabulary than the original's there is nothing to compare
        before = next((r for r in found.values() if r.output is x.source), None)
        turned = before if before is not None and len(list(x.source.uses())) == 1 else x
        if len(list(turned.weight.uses())) == 1 and g.is_constant(turned.weight) and not turned.quantized:
            _fit(g, env, x, turned, y)


def _fit(g: Graph, env: Env, x: Linear, turned: Linear, y: Linear) -> None:
    """Fit `turned`, which is `x` that makes the logits or the linear before it; `y` is the original's `x`."""
    (deep, classes), width = y.sizes, turned.sizes[0]
    memory, kept = env.memory or MEMORY, "not fitted to the original's probabilities"
    count = min(ROWS, memory // (HELD * (width + deep)), WORK // (deep * classes))
    if count < FEW * width or TABLES * 4 * deep * classes > memory:
        g.note(x.site, f"{kept}: too much work or memory for {classes:,} classes")
        return
    need: Need = paired(turned.source, y.source.name or "", count, other_of="original")
    rows = env.collect(g, [need], env.original)[need].astype(np.float32)
    if len(rows) < FEW * width:
        g.note(x.site, f"{kept}: {len(rows):,} rows of calibration data are too few for {width} channels")
        return
    start, there = _start(g, x, turned), _classes(env.original, y)
    result = fit(start, rows[:, :width], there, rows[:, width:])
    left = "rows that are left out of the fit"
    if result.part is start:
        g.note(x.site, f"{kept}: that does not help on {left}")
        return
    new = result.part.turn @ start.table if turned is x else result.part.turn
    replace(g, alone(turned), new.astype(g.array(turned.weight).dtype))
    gain = 1 - result.after / result.before
    g.note(x.site, f"fitted to the original's probabilities: divergence from them -{gain:.1%} on {left}")


def _start(g: Graph, x: Linear, turned: Linear) -> Classes:
    """What gives the logits now, with the matrix in it that is to be fitted."""
    if turned is x:
        return _classes(g, x)
    table = alone(x).weight(g).astype(np.float32)
    return Classes(alone(turned).weight(g).astype(np.float32), table, _bias(g, x) + _bias(g, turned) @ table)


def _classes(g: Graph, x: Linear) -> Classes:
    """A linear as a matrix before a table: one of the two does nothing, the larger one stays."""
    weight = alone(x).weight(g).astype(np.float32)
    k, n = weight.shape
    one = np.eye(min(k, n), dtype=np.float32)
    return Classes(one, weight, _bias(g, x)) if n > k else Classes(weight, one, _bias(g, x))


def _bias(g: Graph, x: Linear) -> Array:
    """`[N]`, zeros where there is none."""
    n = x.sizes[1]
    return np.zeros(n, np.float32) if x.bias is None else np.broadcast_to(g.array(x.bias), (1, n))[0].astype(np.float32)
