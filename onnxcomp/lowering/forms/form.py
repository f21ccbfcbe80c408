"""What a site and an equivalent form of it are: data and two functions, one that says no and one that rewrites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph, Site
from onnxcomp.target import Target

__all__ = ["FORMS_VERSION", "Context", "Form", "Kind", "Spot", "ints"]

FORMS_VERSION = 3  # part of the key of every remembered choice: raise it when a form's graph changes


@dataclass(frozen=True)
class Spot:
    """A place with several equivalent forms: its nodes as they stand, and what the forms of its kind need to know."""

    kind: str
    name: str
    nodes: tuple[ir.Node, ...]
    present: str
    data: Any = None

    @property
    def site(self) -> Site:
        """The place for passes and reports."""
        return Site(self.name, tuple(str(n.name) for n in self.nodes), self.kind)

    @property
    def outputs(self) -> list[ir.Value]:
        """Values of the spot that something outside of it reads, or that the model returns."""
        own = set(self.nodes)
        made = [v for n in self.nodes for v in n.outputs]
        return [v for v in made if v.is_graph_output() or any(u not in own for u, _ in v.uses())]


@dataclass
class Context:
    """What forms may know beyond their own nodes, and the helper values that sites of one graph share.

    `masks` says by value name what a mask does: `all`, `padding` (equal for all queries), `causal` (no later key),
    `window 8` (and none 8 or more places away), `causal+` (less than `causal`) or `other`; a mask that is missing there
    is taken for `other`. `once` lists what was made once for the whole graph.
    With `exact_rows` rows that see no key keep what the standard operator gives them.
    """

    g: Graph
    target: Target
    masks: Mapping[str, str] = field(default_factory=dict)
    once: list[ir.Value] = field(default_factory=list)
    exact_rows: bool = False
    _made: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)

    def mask(self, v: ir.Value | None) -> str:
        """What is known of a mask."""
        return "none" if v is None else self.masks.get(str(v.name), "other")

    def moves_rows(self, mask: ir.Value | None) -> str:
        """Why an operator that gives rows without a key something else does not fit, empty if it does."""
        free = not self.exact_rows or self.mask(mask).split()[0] in ("none", "all", "causal", "window")
        return "" if free else "rows that see no key would change"

    def shared(self, what: str, v: ir.Value, make: Callable[[], ir.Value], *, once: bool = False) -> ir.Value:
        """The helper value of that name derived from `v`, made once for all sites that read `v`.

        `once` says that this is one for the whole model (a mask), so that its cost is none of a single site.
        """
        if (what, v) not in self._made:
            self._made[what, v] = made = make()
            self.once += [made] if once else []
        return self._made[what, v]


@dataclass(frozen=True)
class Form:
    """One way to write a kind of site; `rewrite` edits the graph so that the spot stands in this form.

    `ops` are the operators it is made of that a target may lack; `refuse` says why a spot cannot take this form, or
    nothing. An `approximate` form is only taken where the recipe allows it.
    """

    name: str
    rewrite: Callable[[Context, Spot], None]
    ops: tuple[tuple[str, str], ...] = ()
    refuse: Callable[[Context, Spot], str] = lambda ctx, spot: ""
    approximate: bool = False

    def why_not(self, ctx: Context, spot: Spot, *, standard: bool, approximate: bool) -> str:
        """Why the spot cannot have this form on the target, empty if it can."""
        for domain, op in self.ops:
            if domain == CONTRIB and standard:
                return "not standard ONNX"
            if domain == CONTRIB and op not in ctx.target.contrib:
                return f"'{ctx.target.name}' has no kernel for {op}"
            if domain == "" and (op in ctx.target.lacks or NEW.get(op, 0) > ctx.target.max_opset):
                return f"'{ctx.target.name}' has no {op}"
        if self.approximate and not approximate:
            return "an approximation, which the recipe does not allow"
        return self.refuse(ctx, spot)


NEW = {"Attention": 23, "RMSNormalization": 23, "RotaryEmbedding": 23, "Gelu": 20}


@dataclass(frozen=True)
class Kind:
    """A kind of site: where it is found, and its forms; the first legal one is the default without a table."""

    name: str
    find: Callable[[Graph], list[Spot]]
    forms: tuple[Form, ...]

    def form(self, name: str) -> Form:
        """The form of that name; raises `KeyError`."""
        return {f.name: f for f in self.forms}[name]


def ints(*xs: int) -> np.ndarray:
    """An int64 vector."""
    return np.array(xs, np.int64)
