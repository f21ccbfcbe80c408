"""Gaps that left-out branches leave in the residual stream, and the linears around them that make up for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear, NormSite
from onnxcomp.blocks.branches import Branch, residual_sum
from onnxcomp.blocks.caches import remove_ports
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.output_head import fit_logits
from onnxcomp.methods.repair.sequential import behind, to_stream, unfit
from onnxcomp.pipeline import Env

__all__ = ["Gap", "close", "leave_out"]

DAMP = 0.03  # of the inputs' mean square: a layer is more than a cut, and is not to be learnt by heart
READ = "what comes before it is read elsewhere as well"
NOTHING = "no linear before it is added to the stream as it is"


@dataclass(frozen=True)
class Gap:
    """One place where branches were left out: the stream there, and the one behind them in the uncut model.

    `read` says that others than the branches read the stream there, which then must stay what it is.
    """

    entry: str
    exit: str
    sites: tuple[Site, ...]
    read: bool = False


def leave_out(g: Graph, b: Branch, gaps: Iterable[Gap] = ()) -> list[Gap]:
    """Hand the stream past a branch, and take its caches off the interface; the gaps there are now.

    Gaps of neighbours become one.
    """
    assert b.entry is not None
    assert b.exit is not None
    before, behind = str(b.entry.name), str(b.exit.name)
    public, users = b.entry.is_graph_output(), set(b.entry.uses())
    g.replace(b.exit, b.entry)
    for ports in b.cache_ports:
        remove_ports(g, ports)
    g.note(b.site, ", ".join(["left out", *(f"with {p}" for p in b.cache_ports if str(p))]))
    g.sweep()  # what is dead must not be seen as a part of a layer in the next round
    read = public or not users.isdisjoint(b.entry.uses())
    known = {x.entry: x for x in gaps}
    parts = [x for x in (known.pop(before, None), known.pop(behind, None)) if x is not None]
    after = next((x.exit for x in parts if x.entry == behind), behind)
    sites = (*(s for x in parts for s in x.sites), b.site)
    return [*known.values(), Gap(str(b.entry.name), after, sites, read or any(x.read for x in parts))]


def close(g: Graph, uncut: Graph, env: Env, gaps: Iterable[Gap], whole: bool = False) -> None:
    """Fit the linears that write to the stream before and behind gaps, in topological order, each on the graph by then.

    Right before a gap the target is the stream behind it in the uncut model, so that the linear takes over what it can
    of the branches (LLM-Streamline, arXiv 2403.19135; ReplaceMe, arXiv 2505.02819, here in place of weights that are
    there); further on it is the uncut stream at the same place. Law: no place's squared error on the calibration data
    grows. Where nothing can be fitted, a note says why.
    """
    g.model.graph.sort()
    order = {node: i for i, node in enumerate(g.nodes())}
    found = ((x, residual_sum(x)) for x in sorted(blocks.linears(g), key=lambda x: order[x.node]))
    writers = [(x, found.end) for x, found in found if found is not None]
    gaps = [gap for gap in gaps if has(g, gap.entry)]  # what was only there for a branch is gone with it
    ends = {end: gap for gap in gaps if (end := _end(g, uncut, gap, writers)) is not None}
    after = behind(g.value(gap.entry) for gap in gaps)
    for x, end in writers:
        gap = ends.get(end)
        if gap is None and (x.source not in after or not has(uncut, str(end.name))):
            continue
        if why := unfit(g, x):
            g.note(x.site, f"not repaired: {why}")
            continue
        to_stream(g, uncut, env, x, str(end.name) if gap is None else _target(g, uncut, gap), DAMP, whole=whole)
    if whole and gaps:
        fit_logits(g, env)


def _end(g: Graph, uncut: Graph, gap: Gap, writers: Iterable[tuple[Linear, ir.Value]]) -> ir.Value | None:
    """The sum before a gap that linears can bring to the stream behind it; None, with a note, where there is none."""
    end, _ = _ends(g, uncut, gap)
    why = READ if gap.read else "" if any(e is end for _, e in writers) else NOTHING
    for site in gap.sites if why else ():
        g.note(site, f"the gap is not repaired: {why}")
    return None if why else end


def _ends(g: Graph, uncut: Graph, gap: Gap) -> tuple[ir.Value, ir.Value]:
    """The sums before a gap and, in the uncut model, behind it: before norms, or before lists of tokens get a shape."""
    if (norms := _norms(g, uncut, gap)) is not None:
        return norms[0].input, norms[1].input
    here, there = g.value(gap.entry), uncut.value(gap.exit)
    inner = [m.inputs[0] for v in (here, there) if (m := v.producer()) is not None and m.op_type == "Reshape"]
    if len(inner) == 2 and inner[0] is not None and inner[1] is not None:
        return inner[0], inner[1]
    return here, there


def _target(g: Graph, uncut: Graph, gap: Gap) -> str:
    """The value of the uncut model for the sum before a gap; a norm behind that takes over what the one there did."""
    target = str(_ends(g, uncut, gap)[1].name)
    if (norms := _norms(g, uncut, gap)) is not None:
        here, there = norms
        for old, new in ((here.gain, there.gain), (here.bias, there.bias)):
            if old is not None and new is not None:
                g.put(old, uncut.array(new), users=[here.node])
        g.set_attr(here.node, epsilon=there.node.attributes.get_float("epsilon", 1e-5))
    return target


def _norms(g: Graph, uncut: Graph, gap: Gap) -> tuple[NormSite, NormSite] | None:
    """The norms that make the stream before and behind a gap, in models that normalize after adding."""
    here = next((n for n in blocks.norms(g) if n.output.name == gap.entry), None)
    there = next((n for n in blocks.norms(uncut) if n.output.name == gap.exit), None)
    same = here and there and (here.kind, here.bias is None) == (there.kind, there.bias is None)
    return (here, there) if here and there and same else None
