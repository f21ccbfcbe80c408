"""What a cut must equal: the model with the same shapes whose weights are zero wherever the cut removes them."""

import numpy as np

from onnxcomp import coupling
from onnxcomp.analysis.facts import Facts
from onnxcomp.blocks import Experts
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Group
from onnxcomp.runtime.sessions import Session

NEVER = -1e9  # a score that a softmax makes zero


def masked(g: Graph, group: Group, gone) -> Graph:
    """A copy whose constants read and write zeros at the units `gone`."""
    copy = g.clone()
    for slot in group.slots:
        if slot.reads or slot.writes:
            v = copy.value(slot.value)
            a = copy.array(v).copy()
            a[tuple([slice(None)] * slot.axis + [slot.positions(np.asarray(gone))])] = 0
            copy.put(v, a, users=[copy.node(u) for u in slot.users] or None)
    return copy


def cut(g: Graph, group: Group, gone) -> Graph:
    """A copy without the units `gone`, valid, with the shapes that the group predicts."""
    copy, keep = g.clone(), np.setdiff1d(np.arange(group.units), gone)
    copy.take(group, keep)
    coupling.prove(Facts(g), copy, [(group, keep)])
    copy.infer_shapes()
    copy.verify()
    return copy


def removed_experts(g: Graph, whole: Experts, cut: Graph, left: Experts) -> list[int]:
    """Numbers of the experts whose columns a cut router does not have any more."""
    columns, kept = g.array(whole.router.weight).T, cut.array(left.router.weight).T
    return [i for i, column in enumerate(columns) if not any(np.array_equal(column, k) for k in kept)]


def never_choose(g: Graph, e: Experts, gone) -> None:
    """Give some experts scores that are never among the highest."""
    low = np.zeros(e.count, np.float32)
    low[list(gone)] = NEVER
    out = e.router.output
    g.replace(out, g.op("Add", out, low, like=out), users=[u for u, _ in out.uses()])
    g.sort()


def run(g: Graph, feeds) -> dict[str, np.ndarray]:
    with Session(g) as s:
        return s.run(feeds)


def assert_same(a: Graph, b: Graph, *feeds, tolerance: float = 2e-6) -> None:
    for x in feeds:
        for want, got in zip(run(a, x).values(), run(b, x).values(), strict=True):
            assert want.shape == got.shape
            assert np.max(np.abs(want - got)) <= tolerance * max(1e-30, np.max(np.abs(want)))


def check(g: Graph, group: Group, gone, *feeds) -> Graph:
    """Cut, compare with masked (which must differ from the original), and give the cut model."""
    mask, done = masked(g, group, gone), cut(g, group, gone)
    first, plain = (next(iter(run(m, feeds[0]).values())) for m in (mask, g))
    assert not np.array_equal(first, plain)
    assert_same(mask, done, *feeds)
    return done
