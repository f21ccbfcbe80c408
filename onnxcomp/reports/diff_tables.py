"""What two models have otherwise, as tables."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from onnxcomp.machine import size_text
from onnxcomp.reports.tables import table

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["diff_headline", "diff_tables"]

SHOWN = 12  # changed nodes listed, unless all are asked for


def diff_headline(d: Any) -> str:
    """One line on a `ModelDiff`."""
    if d.equal:
        return f"equal: {d.same} nodes and {d.constants[0]} constants, up to names"
    shared, old, new = d.constants
    return (
        f"{d.same} nodes are the same, {len(d.changed)} changed, {len(d.removed)} removed, {len(d.added)} added; "
        f"{shared} constants are the same, {old} only in the first, {new} only in the second"
    )


def diff_tables(d: Any, *, every: bool = False) -> list[RenderableType]:
    """What changed, what is gone and new by operator, bytes by element type, and the interface."""
    shown: list[RenderableType] = [f"interface: {x}" for x in d.interface]
    if d.changed:
        rows = [(c.first.name, c.first.op, "; ".join(c.what)) for c in d.changed]
        listed = rows if every else rows[:SHOWN]
        shown.append(table("Changed", ("node", "operator", "what is otherwise"), listed, left=3))
        shown += [f"and {len(rows) - len(listed)} more (-v)"] if len(rows) > len(listed) else []
    for title, nodes in (("Only in the first", d.removed), ("Only in the second", d.added)):
        if nodes:
            counts = Counter(n.op for n in nodes)
            named = {op: [n.name for n in nodes if n.op == op] for op in counts}
            rows = [(op, ", ".join(named[op] if every else named[op][:3]), str(n)) for op, n in counts.most_common()]
            shown.append(table(title, ("operator", "nodes" if every else "such as", "number"), rows, left=2))
    if d.nbytes and not d.equal:
        sizes = [(t.lower(), size_text(a), size_text(b)) for t, (a, b) in d.nbytes.items()]
        shown.append(table("Bytes of constants", ("type", "first", "second"), sizes))
    return shown
