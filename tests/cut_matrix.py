"""A quarter of the heads, channels or layers of one graph: equal to the masked model, sizes as predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp import blocks, coupling
from onnxcomp.blocks import branches
from onnxcomp.canonical import canonicalize
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from onnxcomp.methods.width.base import Width
from onnxcomp.methods.width.places import Place
from onnxcomp.target import CPU
from tests import cuts, matrix, zoo

SHAPES = ((2, 12, "right"), (3, 17, "left"))
TOLERANCE = 2e-6  # relative to the largest element
ALIKE = 5e-6  # between exports of one model
Feeds = list[dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """What became of one kind of cut: the smaller model with its first output, or why nothing was cut."""

    model: Graph | None = None
    output: Any = None
    declined: tuple[str, ...] = ()


def canonical(at: Any) -> Graph:
    """A graph of the matrix, raised; what recognition declined is not the matter here."""
    return Graph(_raised(at).clone().model)


@functools.lru_cache(maxsize=8)  # the tests of one graph follow each other
def _raised(at: Any) -> Graph:
    g = matrix.load(at)
    canonicalize(g)
    return g


def feeds(a: zoo.Architecture, g: Graph) -> Feeds:
    """Inputs of both shapes."""
    return [matrix.taken(g, zoo.feeds(a, *shape)) for shape in SHAPES]


def heads(a: zoo.Architecture, g: Graph) -> Cut:
    """A quarter of the heads of every attention."""
    return _width(a, g, "prune-heads")


def channels(a: zoo.Architecture, g: Graph) -> Cut:
    """A quarter of the channels of every feed-forward part."""
    return _width(a, g, "prune-ffn")


def hidden(a: zoo.Architecture, g: Graph) -> Cut:
    """A quarter of the channels of the residual stream, where its norms allow it."""
    return _width(a, g, "prune-hidden", ALIKE)  # every layer's rounding adds up, and squared gates triple it


def layers(a: zoo.Architecture, g: Graph) -> Cut:
    """A quarter of the layers, or one of two, by block influence on random inputs."""
    found, data = branches.layer_branches(g), feeds(a, g)
    p = catalog.load("drop-layers")(ratio=0.25 if len(found) >= 4 else 0.5, protect=0, repair="none")
    try:
        result = PassManager([p]).run(g, data, data)
    except RecipeError:
        return Cut(declined=tuple(b.why for b in found))
    stay = {d.site for d in result.report.steps[0].declined}
    gone = [b for b in found if b.name not in stay]
    assert len(gone) == max(1, len(found) // 4)
    past = {str(b.exit.name): str(b.entry.name) for b in gone if b.entry and b.exit}
    mask = handed_on(g, past, {str(v.name) for v in result.model.outputs})
    assert parameters(result.model) == parameters(mask)
    assert macs(result.model) == macs(mask) < macs(g)
    return Cut(result.model, compared(mask, result.model, data))


def handed_on(g: Graph, past: dict[str, str], outputs: set[str]) -> Graph:
    """A copy where the named values are their substitutes, edited by name, and what is dead for some outputs is not."""
    model = ir.from_proto(ir.to_proto(g.model))
    values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
    for old, new in past.items():
        node = values[old].producer()
        values[old].name = f"{old}.before"
        again = ir.node("Identity", [values[new]], outputs=[ir.Value(name=old)])
        model.graph.insert_before(node, again)
        for user, i in tuple(values[old].uses()):
            user.replace_input_with(i, again.outputs[0])
        for i, v in enumerate(model.graph.outputs):
            if v is values[old]:
                model.graph.outputs[i] = again.outputs[0]
        values[old] = again.outputs[0]
    kept = [v for v in model.graph.outputs if v.name in outputs]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    return Graph(model)


def compared(mask: Graph, result: Graph, data: Feeds, tolerance: float = TOLERANCE) -> Any:
    """The result's first output at the first shape, after both gave the same at all shapes."""
    result.verify()
    cuts.assert_same(mask, result, *data, tolerance=tolerance)
    return next(iter(cuts.run(result, data[0]).values()))


def experts(a: zoo.Architecture, g: Graph) -> Cut:
    """A quarter of the experts of every mixture, by usage on random inputs; the masked model never chooses them."""
    data, mask = feeds(a, g), g.clone()
    if not blocks.experts(g):
        return Cut(declined=("it has no experts",))
    result = PassManager([catalog.load("prune-experts")(ratio=0.25)], allow_unchanged=True).run(g, data, data)
    step = result.report.steps[0]
    if step.declined:
        return Cut(declined=tuple(d.why for d in step.declined))
    for whole, cut in zip(blocks.experts(mask), blocks.experts(result.model), strict=True):
        assert cut.count == whole.count - whole.count // 4
        cuts.never_choose(mask, whole, cuts.removed_experts(mask, whole, result.model, cut))
    return Cut(result.model, compared(mask, result.model, data))


KINDS: dict[str, Callable[[zoo.Architecture, Graph], Cut]] = {"heads": heads, "channels": channels, "layers": layers}
WIDER = {**KINDS, "hidden": hidden, "experts": experts}  # of architectures beyond the matrix

# A cache with fewer heads is another interface: tests/coupling/test_rules.py compares one with a cache cut alike.
OTHERWISE = {("gpt2-cache", "heads")}


# ---- widths ----------------------------------------------------------------------------------------------------------


def _width(a: zoo.Architecture, g: Graph, name: str, tolerance: float = TOLERANCE) -> Cut:
    p = catalog.load(name)(ratio=0.25, ranking="layer", score="magnitude", repair="none", multiple_of=1)
    work = g.clone()
    places, keeps = planned(p, work)
    if not places:
        return Cut(declined=tuple(d.why for d in work.declined) or ("there is nothing of that kind",))
    mask = g
    for place, keep in zip(places, keeps, strict=True):
        mask = cuts.masked(mask, place.group, np.setdiff1d(np.arange(place.group.units), keep))
    result = PassManager([p]).run(g)
    step = result.report.steps[0]
    alone = {d.site for d in work.declined}  # what has no place stays, and nothing else
    assert {d.site for d in step.declined} == alone, [f"{d.site}: {d.why}" for d in step.declined]
    assert step.changed == step.eligible - len(alone)
    predicted = [(x.group, keep) for x, keep in zip(places, keeps, strict=True)]
    assert parameters(result.model) == parameters(g, predicted) < parameters(g)
    assert macs(result.model) == macs(g, predicted) < macs(g)
    return Cut(result.model, compared(mask, result.model, feeds(a, g), tolerance))


def planned(p: Width, g: Graph) -> tuple[list[Place], list[np.ndarray]]:
    """The places and what stays of each."""
    places = p.places(coupling.Coupling(g))
    candidates = p._candidates(g, places, [p._scores(g, x, None) for x in places], CPU)  # type: ignore[arg-type]
    return places, p._amounts(g, places, candidates)
