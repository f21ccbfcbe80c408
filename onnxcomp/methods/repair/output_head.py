"""Fit of the linear that produces a model's logits, so that its probabilities come closest to the original's."""

from __future__ import annotations

import numpy as np

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array
from onnxcomp.maths.newton_softmax import Classes, fit
from onnxcomp.methods.repair.mlp_gauss_newton import HELD
from onnxcomp.methods.repair.part_weights import reader_of
from onnxcomp.methods.repair.readers import replace
from onnxcomp.pipeline import Env
from onnxcomp.stats import Need, paired
from onnxcomp.validation.outputs import View

__all__ = ["fit_logits"]

ROWS = 1 << 15  # calibration rows at most: the time of a round grows with them
WORK = 1 << 39  # multiplications of all rows with the table at most: a Newton round takes some thirty times that
ROWS_PER_CHANNEL = 8  # at least: with fewer the matrix overfits the calibration data
TABLES = 4  # copies of the table of classes, in float32, that are in memory at a time


def fit_logits(g: Graph, env: Env) -> None:
    """Fit the linear before a softmax to the original's probabilities, and note the gain.

    That is the linear between the stream and a table of classes (`slice` adds one before a tied table), else the table
    itself, multiplied from the left where it has more classes than channels. Law: on calibration rows that were held
    out of the fit, the divergence falls, or nothing changes.
    """
    here = {x.output.name: x for x in blocks.linears(g, tied=True)}
    there = {x.output.name: x for x in blocks.linears(env.original, tied=True)}
    for name in (r.name for r in View.of(g).outputs if r.logits):
        x, y = here.get(name), there.get(name)
        if x is None or y is None or x.quantized or y.quantized or x.sizes[1] != y.sizes[1]:
            continue  # with another vocabulary than the original's there is nothing to compare
        before = next((r for r in here.values() if r.output is x.source), None)
        fitted = before if before is not None and len(list(x.source.uses())) == 1 else x
        if len(list(fitted.weight.uses())) == 1 and g.is_constant(fitted.weight) and not fitted.quantized:
            _fit(g, env, x, fitted, y)


def _fit(g: Graph, env: Env, x: Linear, fitted: Linear, y: Linear) -> None:
    """Fit `fitted`, the linear `x` that produces the logits or the linear before it; `y` is `x` in the original."""
    (deep, classes), width = y.sizes, fitted.sizes[0]
    memory, kept = env.memory or MEMORY, "not fitted to the original's probabilities"
    count = min(ROWS, memory // (HELD * (width + deep)), WORK // (deep * classes))
    if count < ROWS_PER_CHANNEL * width or TABLES * 4 * deep * classes > memory:
        g.note(x.site, f"{kept}: too much work or memory for {classes:,} classes")
        return
    need: Need = paired(fitted.source, y.source.name or "", count, other_of="original")
    rows = env.collect(g, [need], env.original)[need].astype(np.float32)
    if len(rows) < ROWS_PER_CHANNEL * width:
        g.note(x.site, f"{kept}: {len(rows):,} rows of calibration data are too few for {width} channels")
        return
    start, there = _start(g, x, fitted), _classes(env.original, y)
    result = fit(start, rows[:, :width], there, rows[:, width:])
    held_out = "held-out rows"
    if result.part is start:
        g.note(x.site, f"{kept}: that does not help on {held_out}")
        return
    new = result.part.turn @ start.table if fitted is x else result.part.turn
    replace(g, reader_of(fitted), new.astype(g.array(fitted.weight).dtype))
    gain = 1 - result.after / result.before
    g.note(x.site, f"fitted to the original's probabilities: divergence from them -{gain:.1%} on {held_out}")


def _start(g: Graph, x: Linear, fitted: Linear) -> Classes:
    """The logits as they are computed now, with the matrix that is to be fitted."""
    if fitted is x:
        return _classes(g, x)
    table = reader_of(x).weight(g).astype(np.float32)
    return Classes(reader_of(fitted).weight(g).astype(np.float32), table, _bias(g, x) + _bias(g, fitted) @ table)


def _classes(g: Graph, x: Linear) -> Classes:
    """A linear as a matrix before a table: the larger factor is the weight, the other one an identity."""
    weight = reader_of(x).weight(g).astype(np.float32)
    k, n = weight.shape
    one = np.eye(min(k, n), dtype=np.float32)
    return Classes(one, weight, _bias(g, x)) if n > k else Classes(weight, one, _bias(g, x))


def _bias(g: Graph, x: Linear) -> Array:
    """`[N]`, zeros where there is none."""
    n = x.sizes[1]
    return np.zeros(n, np.float32) if x.bias is None else np.broadcast_to(g.array(x.bias), (1, n))[0].astype(np.float32)
