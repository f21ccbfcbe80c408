"""The types of lowering: `Spot` (a matched site), `Form` (one way to write it: a check and a rewrite), `Kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph, Site
from onnxcomp.lowering.older_opsets import INTRODUCED
from onnxcomp.target import Target

__all__ = ["FORMS_VERSION", "Context", "Form", "Kind", "Spot", "ints"]

FORMS_VERSION = 6  # part of the key of every remembered choice: raise it when a form's graph changes


@dataclass(frozen=True)
class Spot:
    """A match of a kind in a graph: its nodes, the form in which they are `present`, and `data` for its forms.

    `detail` is what else its run time depends on than operators, types and sizes.
    """

    kind: str
    name: str
    nodes: tuple[ir.Node, ...]
    present: str
    data: Any = None
    detail: str = ""

    @property
    def site(self) -> Site:
        """The site, as passes and reports name it."""
        return Site(self.name, tuple(str(n.name) for n in self.nodes), self.kind)

    @property
    def outputs(self) -> list[ir.Value]:
        """Values of the spot with users outside of it, and those that are graph outputs."""
        nodes = set(self.nodes)
        values = [v for n in self.nodes for v in n.outputs]
        return [v for v in values if v.is_graph_output() or any(u not in nodes for u, _ in v.uses())]


@dataclass
class Context:
    """What forms know beyond their own nodes, and the helper values that sites of one graph share.

    `masks` holds the kind of masks by value name: `all`, `padding` (equal for all queries), `causal` (no later key),
    `window 8` (and none 8 or more positions away), `causal+` (fewer keys than `causal`) or `other`; a missing mask
    counts as `other`. `once` lists values that were made once for the whole graph.
    With `exact_rows`, queries whose mask hides every key keep the result of the standard operator. `inputs` of products
    with codes of few bits are rounded to `int8`, stay `float`, or are what is faster (`any`).
    """

    g: Graph
    target: Target
    masks: Mapping[str, str] = field(default_factory=dict)
    once: list[ir.Value] = field(default_factory=list)
    exact_rows: bool = False
    inputs: str = "any"
    _made: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)

    def mask(self, v: ir.Value | None) -> str:
        """The kind of a mask; `none` where there is none."""
        return "none" if v is None else self.masks.get(str(v.name), "other")

    def changes_masked_rows(self, mask: ir.Value | None) -> str:
        """Why an operator with another result for queries without a key is not allowed, empty if it is."""
        free = not self.exact_rows or self.mask(mask).split()[0] in ("none", "all", "causal", "window")
        return "" if free else "results of queries whose mask hides every key would change"

    def made(self, what: str, v: ir.Value) -> ir.Value | None:
        """The helper value of that name derived from `v`, if a site before has made it."""
        return self._made.get((what, v))

    def shared(self, what: str, v: ir.Value, make: Callable[[], ir.Value], *, once: bool = False) -> ir.Value:
        """The helper value of that name derived from `v`, made once for all sites that read `v`.

        `once` marks a value that exists once per model (a mask), whose cost must not be charged to a single site.
        """
        if (what, v) not in self._made:
            self._made[what, v] = made = make()
            self.once += [made] if once else []
        return self._made[what, v]


@dataclass(frozen=True)
class Form:
    """One way to write a kind of site; `rewrite` edits the graph so that the spot has this form.

    `ops` are its operators that a target may lack; `refuse` gives the reason why a spot cannot have this form, empty if
    it can. An `approximate` form is only chosen where the recipe allows it; a `finer` one rounds less than the others.
    """

    name: str
    rewrite: Callable[[Context, Spot], None]
    ops: tuple[tuple[str, str], ...] = ()
    refuse: Callable[[Context, Spot], str] = lambda ctx, spot: ""
    approximate: bool = False
    finer: bool = False

    def why_not(self, ctx: Context, spot: Spot, *, standard: bool, approximate: bool) -> str:
        """The reason why the spot cannot have this form on the target, empty if it can."""
        for domain, op in self.ops:
            if domain == CONTRIB and standard:
                return "not standard ONNX"
            if domain == CONTRIB and op not in ctx.target.contrib:
                return f"'{ctx.target.name}' has no kernel for {op}"
            if domain == "" and (op in ctx.target.lacks or INTRODUCED.get(op, 0) > ctx.target.newest_opset):
                return f"'{ctx.target.name}' has no {op}"
        if self.approximate and not approximate:
            return "an approximation, which the recipe does not allow"
        return self.refuse(ctx, spot)


@dataclass(frozen=True)
class Kind:
    """A kind of site: the function that finds it, and its forms; the first legal one is the default without a table.

    A kind that is not `timed` takes the form of the table.
    """

    name: str
    find: Callable[[Graph], list[Spot]]
    forms: tuple[Form, ...]
    timed: bool = True

    def form(self, name: str) -> Form:
        """The form of that name; raises `KeyError`."""
        return {f.name: f for f in self.forms}[name]


def ints(*xs: int) -> np.ndarray:
    """An int64 vector."""
    return np.array(xs, np.int64)
