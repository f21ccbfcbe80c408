"""The layers of a model before and after: heads, widths, element types of weights, and the error of the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.layers import Layer, Unit, layers
from onnxcomp.data.narrowed import suited, without_caches
from onnxcomp.engine.probe import fitted
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.reports.outcome import LayerMap, StreamError
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.engine.walk import Walk

__all__ = ["layer_map"]

SAMPLES = 4  # run one by one where that goes, so that padding is not compared; layers differ by factors: few do
SMALL = 128 << 20  # bytes of weights from which on one sample has to do: loading and running take seconds then
LARGEST = 1 << 30  # bytes from which on a model is not run for this: both are loaded once more, whole


def layer_map(walk: Walk, host: Target, memory: int | None = None) -> tuple[tuple[LayerMap, ...], str]:
    """Each layer of the original as passes know it, with what became of it; none where no pass lost anything.

    And why the error of the stream was not measured, empty where it was: models above `memory` bytes are not run.
    """
    if not any(s.fidelity == "lossy" and s.changed for s in walk.report.steps):
        return (), ""
    original, result = walk.exact, walk.unlowered or walk.graph
    before, after = layers(original), layers(result)
    by_name = {x.name: layer for layer in after for x in layer.linears}
    errors, why = _errors(walk, before, result, host, min(LARGEST, memory or LARGEST))
    found = []
    for layer in before:
        now = next((by_name[x.name] for x in layer.linears if x.name in by_name), None)
        weights = Counter(_dtype(x.weight.dtype) for x in now.linears) if now is not None else Counter[str]()
        stream = tuple(StreamError(part, name, errors.get(name)) for part, name in _ends(layer))
        sizes = ((_heads(layer), _heads(now)), (_kv_heads(layer), _kv_heads(now)), (_width(layer), _width(now)))
        found.append(LayerMap(layer.index, *sizes, dict(weights.most_common()), stream))
    return tuple(found), why if found else ""


def _heads(layer: Layer | None) -> int:
    return sum(a.heads for a in layer.attentions) if layer is not None else 0


def _kv_heads(layer: Layer | None) -> int:
    return sum(a.kv_heads for a in layer.attentions) if layer is not None else 0


def _width(layer: Layer | None) -> int:
    return sum(m.width for m in layer.mlps) if layer is not None else 0


def _dtype(kind: ir.DataType | None) -> str:
    return "unknown" if kind is None else str(kind.numpy().name)


def _ends(layer: Layer) -> list[tuple[str, str]]:
    """What each residual branch of a layer is, and the name of the stream behind it."""
    return [(_part(u), str(u.residual.end.name)) for u in layer.units if u.residual is not None]


def _part(u: Unit) -> str:
    return " and ".join(x for x, there in (("attention", u.attends), ("feed-forward", u.feeds_forward)) if there)


def _errors(
    walk: Walk, before: Sequence[Layer], result: Graph, host: Target, most: int
) -> tuple[dict[str, float], str]:
    """Relative L2 error of the stream by the name of its value, where both models have it; else why there is none."""
    original, reference = walk.exact, walk.reference
    there = {str(v.name) for node in result.nodes() for v in node.outputs}
    names = [name for layer in before for _, name in _ends(layer) if name in there]
    size = max(original.nbytes, result.nbytes)
    if reference is None:
        return {}, "there was no data to judge on"
    if size > most:
        return {}, f"models above {most >> 20:,} MiB are not run once more for it; onnxcomp validate --by-layer does"
    if not names:
        return {}, "no value of the original's residual stream is in the result by its name"
    few = reference.data.singly(SAMPLES if size <= SMALL else 1)
    try:
        of_result = few.of_result()
        taken = suited(of_result, original, result)
        feeds = [b.feeds for b in (few if taken is of_result else without_caches(few, original))]
        right = _run(original, feeds, names, host)
        made = _run(result, [fitted(b.feeds, original, result) for b in taken], names, host)
    except OnnxcompError as e:  # such as an operator that only the lowered model has
        return {}, f"the model before lowering did not run: {e}"
    errors = {n: _error([x[n] for x in right], [y[n] for y in made]) for n in names if _fit(right, made, n)}
    return errors, "" if errors else "the residual stream of the result has another width or length"


def _run(
    g: Graph, feeds: Sequence[Mapping[str, Array]], names: Sequence[str], host: Target
) -> list[Mapping[str, Array]]:
    with Session(g, host, taps=names) as session:
        return [session.run(x, names) for x in feeds]


def _fit(right: Sequence[Mapping[str, Array]], made: Sequence[Mapping[str, Array]], name: str) -> bool:
    return all(x[name].shape == y[name].shape for x, y in zip(right, made, strict=True))


def _error(right: Sequence[Array], made: Sequence[Array]) -> float:
    noise = sum(float(np.square(y.astype(np.float64) - x).sum()) for x, y in zip(right, made, strict=True))
    signal = sum(float(np.square(x.astype(np.float64)).sum()) for x in right)
    return float(np.sqrt(noise / signal)) if signal > 0 else 0.0
