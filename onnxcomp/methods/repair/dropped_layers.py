"""Gaps that dropped branches leave in the residual stream, and the refit of the linears around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear, NormSite
from onnxcomp.blocks.branches import Branch, residual_sum
from onnxcomp.blocks.caches import remove_ports
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.output_head import fit_logits
from onnxcomp.methods.repair.readers import Repair, downstream
from onnxcomp.methods.repair.sequential import Part, refit_to_stream, unfit_reason
from onnxcomp.pipeline import Env

__all__ = ["Gap", "leave_out", "refit_around_gaps", "targets_before_gaps"]

# Pull of a refitted weight towards the weight as it is, relative to the mean of the inputs' squares. Thirty times that
# of other repairs: the change that replaces whole layers is large, and would overfit the calibration data.
GAP_DAMP = 0.03
READ = "what comes before it is read elsewhere as well"
NOTHING = "no linear before it is added to the stream as it is"


@dataclass(frozen=True)
class Gap:
    """One place where branches were dropped: the stream there, and the stream after them in the uncut model.

    `read` says that others than the branches consume the stream there, so it must not change.
    """

    entry: str
    exit: str
    sites: tuple[Site, ...]
    read: bool = False


def leave_out(g: Graph, b: Branch, gaps: Iterable[Gap] = ()) -> list[Gap]:
    """Skip a branch and remove its caches from the interface; all gaps, those of neighbours joined into one."""
    assert b.entry is not None
    assert b.exit is not None
    before, downstream = str(b.entry.name), str(b.exit.name)
    public, users = b.entry.is_graph_output(), set(b.entry.uses())
    g.replace(b.exit, b.entry)
    for port in b.cache_ports:
        remove_ports(g, port)
    g.note(b.site, ", ".join(["dropped", *(f"with {p}" for p in b.cache_ports if str(p))]))
    g.sweep()  # dead nodes must not be recognised as part of a layer in the next round
    read = public or not users.isdisjoint(b.entry.uses())
    known = {x.entry: x for x in gaps}
    parts = [x for x in (known.pop(before, None), known.pop(downstream, None)) if x is not None]
    after = next((x.exit for x in parts if x.entry == downstream), downstream)
    sites = (*(s for x in parts for s in x.sites), b.site)
    return [*known.values(), Gap(str(b.entry.name), after, sites, read or any(x.read for x in parts))]


def refit_around_gaps(g: Graph, uncut: Graph, env: Env, gaps: Iterable[Gap], how: Repair = "least-squares") -> None:
    """Refit the linears that write to the stream before and after gaps, in order, each on the graph repaired so far.

    Right before a gap the target is the uncut stream after it, so that the linear replaces what it can of the branches
    (LLM-Streamline, arXiv 2403.19135; ReplaceMe, arXiv 2505.02819, here by changing weights that exist); further on it
    is the uncut stream at the same place. Law: no squared error on the calibration data grows. A note says where
    nothing can be refitted, and why.
    """
    g.sort()
    order = {node: i for i, node in enumerate(g.nodes())}
    joined = ((x, residual_sum(x)) for x in sorted(blocks.linears(g), key=lambda x: order[x.node]))
    writers = [(x, into.end) for x, into in joined if into is not None]
    gaps = [gap for gap in gaps if has(g, gap.entry)]  # a value that only a branch used was removed with it
    ends = {end: gap for gap in gaps if (end := _end(g, uncut, gap, writers)) is not None}
    after = downstream(g.value(gap.entry) for gap in gaps)
    for x, end in writers:
        gap = ends.get(end)
        if gap is None and (x.source not in after or not has(uncut, str(end.name))):
            continue
        if why := unfit_reason(g, x):
            g.note(x.site, f"not repaired: {why}")
            continue
        refit_to_stream(
            g,
            uncut,
            env,
            x,
            str(end.name) if gap is None else _target(g, uncut, gap),
            GAP_DAMP,
            how=how,
        )
    if how == "gauss-newton" and gaps:
        fit_logits(g, env)


def targets_before_gaps(g: Graph, uncut: Graph, gaps: Iterable[Gap]) -> dict[str, Part]:
    """By the sum before each gap the uncut stream after it, for a refit in which other parts are cut as well.

    A norm after that sum gets the parameters of the one after the gap. A note says where nothing can be refitted.
    """
    g.sort()
    found = [(x, into.end) for x in blocks.linears(g) if (into := residual_sum(x)) is not None]
    width = {str(end.name): x.sizes[1] for x, end in found}
    ends = ((gap, _end(g, uncut, gap, found)) for gap in gaps if has(g, gap.entry))
    named = [(gap, str(end.name)) for gap, end in ends if end is not None]
    return {end: Part(_target(g, uncut, gap), np.arange(width[end])) for gap, end in named}


def _end(g: Graph, uncut: Graph, gap: Gap, writers: Iterable[tuple[Linear, ir.Value]]) -> ir.Value | None:
    """The sum before a gap that linears can fit to the stream after it; None, with a note, where there is none."""
    end, _ = _ends(g, uncut, gap)
    why = READ if gap.read else "" if any(e is end for _, e in writers) else NOTHING
    for site in gap.sites if why else ():
        g.note(site, f"the gap is not repaired: {why}")
    return None if why else end


def _ends(g: Graph, uncut: Graph, gap: Gap) -> tuple[ir.Value, ir.Value]:
    """The sums before a gap and, in the uncut model, after it: before norms, or before a reshape of lists of tokens."""
    if (norms := _norms(g, uncut, gap)) is not None:
        return norms[0].input, norms[1].input
    here, there = g.value(gap.entry), uncut.value(gap.exit)
    inner = [m.inputs[0] for v in (here, there) if (m := v.producer()) is not None and m.op_type == "Reshape"]
    if len(inner) == 2 and inner[0] is not None and inner[1] is not None:
        return inner[0], inner[1]
    return here, there


def _target(g: Graph, uncut: Graph, gap: Gap) -> str:
    """The uncut target of the sum before a gap; a norm after that sum gets the parameters of that after the gap."""
    target = str(_ends(g, uncut, gap)[1].name)
    if (norms := _norms(g, uncut, gap)) is not None:
        here, there = norms
        for old, new in ((here.gain, there.gain), (here.bias, there.bias)):
            if old is not None and new is not None:
                g.put(old, uncut.array(new), users=[here.node])
        g.set_attr(here.node, epsilon=there.node.attributes.get_float("epsilon", 1e-5))
    return target


def _norms(g: Graph, uncut: Graph, gap: Gap) -> tuple[NormSite, NormSite] | None:
    """The norms that produce the stream before and after a gap, in post-norm models."""
    here = next((n for n in blocks.norms(g) if n.output.name == gap.entry), None)
    there = next((n for n in blocks.norms(uncut) if n.output.name == gap.exit), None)
    same = here and there and (here.kind, here.bias is None) == (there.kind, there.bias is None)
    return (here, there) if here and there and same else None
