"""The layers of a model before and after: heads, widths, element types of weights, and the error of the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.layers import Layer, Unit, layers
from onnxcomp.data.inputs import Batch
from onnxcomp.data.narrowed import suited
from onnxcomp.data.vocabulary import between
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.reports.outcome import LayerMap, StreamError
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.engine.walk import Walk

__all__ = ["layer_map"]

SAMPLES = 4  # run one by one, so that padding is not compared; layers differ by factors, so few are enough
# Bytes of weights from which on a model is not run for this: loading it twice more would take a job seconds.
LARGEST = 128 << 20


def layer_map(walk: Walk, host: Target) -> tuple[LayerMap, ...]:
    """Each layer of the original as passes know it, with what became of it; none where no pass lost anything."""
    if not any(s.fidelity == "lossy" and s.changed for s in walk.report.steps):
        return ()
    original, result = walk.exact, walk.unlowered or walk.graph
    before, after = layers(original), layers(result)
    by_name = {x.name: layer for layer in after for x in layer.linears}
    errors = _errors(walk, before, result, host)
    found = []
    for layer in before:
        now = next((by_name[x.name] for x in layer.linears if x.name in by_name), None)
        weights = Counter(_dtype(x.weight.dtype) for x in now.linears) if now is not None else Counter[str]()
        stream = tuple(StreamError(part, name, errors.get(name)) for part, name in _ends(layer))
        sizes = ((_heads(layer), _heads(now)), (_kv_heads(layer), _kv_heads(now)), (_width(layer), _width(now)))
        found.append(LayerMap(layer.index, *sizes, dict(weights.most_common()), stream))
    return tuple(found)


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


def _errors(walk: Walk, before: Sequence[Layer], result: Graph, host: Target) -> dict[str, float]:
    """Relative L2 error of the stream by the name of its value, where both models have it and it is cheap to run."""
    original, reference = walk.exact, walk.reference
    if reference is None or max(original.nbytes, result.nbytes) > LARGEST or between(original, result) is not None:
        return {}
    there = {str(v.name) for node in result.nodes() for v in node.outputs}
    names = [name for layer in before for _, name in _ends(layer) if name in there]
    if not names:
        return {}
    few = reference.data.spread(SAMPLES).rebatch(1)
    try:
        right = _run(original, few, names, host)
        made = _run(result, suited(few, original, result), names, host)
    except (DataError, ModelError):  # a batch size that is fixed, an operator that only the lowered model has
        return {}
    return {
        name: _error([x[name] for x in right], [y[name] for y in made]) for name in names if _fit(right, made, name)
    }


def _run(g: Graph, data: object, names: Sequence[str], host: Target) -> list[Mapping[str, Array]]:
    batches: list[Batch] = list(data)  # type: ignore[call-overload]
    with Session(g, host, taps=names) as session:
        return [session.run(b.feeds, names) for b in batches]


def _fit(right: Sequence[Mapping[str, Array]], made: Sequence[Mapping[str, Array]], name: str) -> bool:
    return all(x[name].shape == y[name].shape for x, y in zip(right, made, strict=True))


def _error(right: Sequence[Array], made: Sequence[Array]) -> float:
    noise = sum(float(np.square(y.astype(np.float64) - x).sum()) for x, y in zip(right, made, strict=True))
    signal = sum(float(np.square(x.astype(np.float64)).sum()) for x in right)
    return float(np.sqrt(noise / signal)) if signal > 0 else 0.0
