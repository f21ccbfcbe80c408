"""Sensitivity: what each linear loses in the model's outputs by each quantized form; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.methods.quantize import linears, site_options
from onnxcomp.methods.quantize.site_options import INT8, Way
from onnxcomp.methods.quantize.weight_rounding import Method
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Sensitivity"]

MOST = 0.5  # share of all losses that the linears of the recipe's fragment make together


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Rank the linears by what int8, and weights of fewer bits, cost the model; the notes have it, nothing is edited.

    Each is rounded alone and the model run on calibration data, a fifth, that nothing was fitted to; the last note is a
    recipe's entry that spares those that lose most.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    any_place: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {"int8": False, "bits": (4,), "min_size": 3000}

    bits: tuple[Literal[8, 4, 3, 2], ...] = (8, 4, 3, 2)
    """Bits of weights that are tried, activations float."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """In-channels that share a scale there."""
    int8: bool = True
    """Also try int8 weights and inputs, as qdq with clip: output makes them."""
    by: Literal["int8", "8 bits", "4 bits", "3 bits", "2 bits"] = "4 bits"
    """The form that the order is by."""
    metric: str | None = None
    """What counts as loss: a gate's name; by default kl for scores of classes, else rel-l2 (squared)."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that are left out."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements are left out."""

    @property
    def wants_data(self) -> bool:
        """Losses are measured on data."""
        return True

    def run(self, g: Graph, env: Env) -> None:
        """Measure and note, the worst first."""
        found = [x for x in linears.chosen(g.clone(), self.skip, self.min_size) if not x.transposed]
        if not found or env.dry:
            return
        losses = self._losses(g, env.split(), [u.name for u in site_options.units(found)])
        by = self.by if self.by in next(iter(losses.values())) else next(iter(next(iter(losses.values()))))
        ranked = sorted(losses, key=lambda name: -losses[name][by])
        for name in ranked:
            g.note(name, ", ".join(f"{form}: {x:.3g}" for form, x in losses[name].items()), losses[name])
        g.note("recipe", self._entry(ranked, {name: losses[name][by] for name in ranked}, by))

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """None: nothing is edited."""
        return ()

    def _losses(self, g: Graph, env: Env, names: list[str]) -> dict[str, dict[str, float]]:
        """By the name of a weight's first linear what each form of it loses."""
        found = [u for u in site_options.units(linears.quantizable(g)) if u.name in names]
        metric, methods = site_options.metric_of(g, self.metric), [Method(bits, self.block) for bits in self.bits]
        ways: list[Way] = [*([INT8] if self.int8 else []), *methods]
        base = min(methods, key=lambda m: abs(m.bits - 4), default=Method(4, self.block))
        moments = site_options.moments_of(g, env, found, ways)
        table = site_options.measure(g, env, found, ways, base, metric, moments)
        labels = [f"{m.bits} bits" if isinstance(m, Method) else "int8" for m in ways]
        return {name: dict(zip(labels, losses, strict=True)) for name, losses in table.items()}

    @staticmethod
    def _entry(ranked: list[str], losses: Mapping[str, float], by: str) -> str:
        """A recipe's entry under which the linears that make half of the loss stay as they are, or get 8 bits."""
        spared, total = list[str](), 0.0
        for name in ranked:
            if spared and total >= MOST * sum(losses.values()):
                break
            spared.append(name)
            total += losses[name]
        if by in ("int8", "8 bits"):
            rest = "qdq: {" if by == "int8" else "quantize-weights: {bits: 8, "
            return f"{rest}skip: [{', '.join(map(_quoted, spared))}]}}"
        higher = ", ".join(f"{_quoted(name)}: 8" for name in spared)
        return f"quantize-weights: {{bits: {by[0]}, overrides: {{{higher}}}}}"


def _quoted(name: str) -> str:
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    return "'" + escaped.replace("'", "''") + "'"
