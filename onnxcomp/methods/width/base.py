"""What the passes that cut widths share: scores of units, amounts, repair, cut; a pass names the groups."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.coupling import Blocked, Coupling, prove
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array, Float64, scores
from onnxcomp.maths.allocation import Candidate, Normal, choose, normalised
from onnxcomp.maths.elimination import elimination
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.readers import Reader, Repair
from onnxcomp.methods.repair.sequential import in_order
from onnxcomp.methods.width import budgets, trial_cuts
from onnxcomp.methods.width.budgets import Budget, Clock
from onnxcomp.pipeline import Edit, Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, Stats, gram, mean, norm2, var
from onnxcomp.target import Target

__all__ = ["Place", "Score", "Width"]

Score = Literal["magnitude", "wanda", "flap", "energy", "ablation"]
NORMAL: dict[str, Normal] = {"flap": "standard", "ablation": "none"}
MOST_VARIANTS = 2048
ASKED: dict[str, list[Callable[[str], Need]]] = {
    "wanda": [norm2],
    "flap": [var, mean],
    "energy": [gram],
    "magnitude": [],
    "ablation": [],
    "gauss-newton": [gram, mean, var],
    "least-squares": [gram, mean, var],
    "bias": [mean],
    "none": [],
}


@dataclass(frozen=True)
class Place:
    """One group with the sites it belongs to and the linears that read its axis."""

    sites: tuple[Site, ...]
    group: Group
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Width(Pass):
    """A pass that makes groups of coupled axes narrower."""

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    unit: ClassVar[str] = "units"
    aligned: ClassVar[bool] = True
    axis: ClassVar[int] = -1

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the units to cut; 0 without a budget changes nothing."""
    parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cut until at most this share of the parameters that the pass finds stays, instead of a ratio."""
    macs: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cut until at most this share of the multiplications with weights that it finds, per token, stays."""
    latency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cut until what is cut (its linears, its attention) takes at most this share of its time, measured here."""
    ranking: Literal["sensitivity", "global", "layer"] | None = None
    """What loses the model least over all layers (one trial cut a layer), what scores least, or the same share of each.

    By default sensitivity where score or repair ask for data anyway and no weight is quantized, and else layer.
    """
    score: Score = "energy"
    """How much a unit matters: its weights, |W||X|, its fluctuation, its output that others cannot make, its loss."""
    repair: Repair = "least-squares"
    """What makes up for the cut: the weights that stay, fitted to the uncut layer; its mean output; or nothing.

    `gauss-newton` fits all that is added to the residual stream behind the cut, and feed-forward parts as a whole.
    """
    sequential: bool = True
    """Fit layer after layer on what the cut model gives it, towards the uncut residual stream; else each alone.

    Only least squares has the choice: Gauss-Newton steps always go in order.
    """
    multiple_of: Annotated[int, Field(ge=0)] = 0
    """Widths become multiples of this; 0 takes what the target runs well (for heads: any count)."""
    floor: Annotated[int, Field(ge=1)] = 1
    """Units that every layer keeps at least."""
    uniform: bool = False
    """Keep the same share of every layer whatever the ranking, for runtimes that want one number for all."""
    metric: str | None = None
    """Gate name that ablation and sensitivity measure; by default kl for logits, else rel-l2."""
    skip: tuple[str, ...] = ()
    """Patterns of node names that stay whole."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be cut."""
        asked = [b for b in (self.parameters, self.macs, self.latency) if b is not None]
        return all(b == 1 for b in asked) if asked else self.ratio == 0

    @property
    def wants_data(self) -> bool:
        """Magnitudes without repair need none."""
        return self._measures or self.ranking == "sensitivity"

    @property
    def _measures(self) -> bool:
        return self.score != "magnitude" or self.repair != "none"

    @property
    def _ranked(self) -> Literal["sensitivity", "global", "layer"]:
        """The ranking that is asked for, or fits what else is."""
        if self.uniform:
            return "layer"
        return self.ranking or ("sensitivity" if self._measures else "layer")

    @property
    def _by_clock(self) -> float | None:
        """The share of time that is asked for, where it is less than all."""
        return None if self.latency == 1 else self.latency

    @property
    def _in_order(self) -> bool:
        return self.repair == "gauss-newton" or (self.sequential and self.repair == "least-squares")

    def planning(self) -> Width:
        """The same sizes in all without data: units are ranked by magnitude, nothing is repaired.

        Raises `RecipeError` for a latency budget: a dry run has no clock.
        """
        if self._by_clock is not None:
            raise budgets.no_clock(self.name, self._by_clock, "a dry run (--plan) has none")
        ranking = "global" if self._ranked == "sensitivity" else self._ranked
        return dataclasses.replace(self, score="magnitude", repair="none", ranking=ranking)

    @abc.abstractmethod
    def starts(self, g: Graph) -> Iterable[tuple[Site, ir.Value]]:
        """The sites, each with the value that is cut along `axis`."""

    def group(self, c: Coupling, start: ir.Value) -> Group:
        """The group of one site; raises `ModelError` where it cannot be cut."""
        return c.couple(start, self.axis)

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every place that has the kind of axis this pass cuts."""
        return [site for site, _ in self.starts(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """What score and repair ask of the inputs of the linears that read the axis."""
        if self.is_identity or not self.wants_data:
            return
        alone = not self._in_order or self._ranked == "sensitivity"
        asked = [*ASKED[self.score], *(ASKED[self.repair] if alone else ())]
        sources = (s for p in self.places(Coupling(g.clone())) for r in p.readers for s in r.sources)
        yield from dict.fromkeys(need(s) for s in sources for need in asked)

    def run(self, g: Graph, env: Env) -> None:
        """Score, choose, repair, cut, and prove the shapes."""
        if self.is_identity:
            return
        if self.ranking is None and any(x.quantized for x in blocks.linears(g, tied=True)):
            dataclasses.replace(self, ranking="layer").run(g, env)  # codes are not silenced for a trial
            return
        coupling = Coupling(g)
        places = self.places(coupling)
        if not places:
            return
        candidates = self._candidates(g, places, [self._scores(g, p, env) for p in places], env.target)
        if self._ranked == "sensitivity":
            parts = [(p.group, p.readers) for p in places]
            candidates = trial_cuts.scaled(g, parts, candidates, env, self.metric, self.repair)
        clock = self._clock(g, places, candidates, env)
        keeps = self._amounts(g, places, candidates, clock)
        uncut = g.clone()
        for i, (place, keep) in enumerate(zip(places, keeps, strict=True)):
            self._cut(g, place, keep, env, clock.told(keeps, i) if clock else "")
        prove(coupling.facts, g, [(p.group, keep) for p, keep in zip(places, keeps, strict=True)])
        cut = [(p, keep) for p, keep in zip(places, keeps, strict=True) if len(keep) < p.group.units]
        self._after(g, uncut, env, cut)

    def _after(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Repair the readers of what was cut, one after another where that is asked for."""
        if self._in_order:
            in_order(g, uncut, env, [r for p, _ in cut for r in p.readers], whole=self.repair == "gauss-newton")

    def _readers(self, g: Graph, group: Group, linears: Sequence[Linear]) -> tuple[Reader, ...]:
        """What reads the axis of a group and can be fitted; raises `ModelError` where that cannot be as asked."""
        return readers.readers_of(group, linears)

    def _cut(self, g: Graph, place: Place, keep: Array, env: Env, said: str) -> None:
        """Cut one group, with its readers repaired where each is for itself; or decline its sites."""
        if len(keep) == place.group.units:
            for site in place.sites:
                g.decline(site, f"all {len(keep)} {self.unit} stay: {self._why(place, env.target)}")
            return
        for reader in place.readers:
            if self.repair != "none" and not self._in_order:
                readers.repair(g, reader, keep, env.stats, self.repair)
        g.take(place.group, keep)
        for site in place.sites:
            g.note(site, f"{place.group.units} > {len(keep)} {self.unit}" + (f", {said}" if said else ""))

    # ---- what is cut ---------------------------------------------------------------------------------------------

    def places(self, c: Coupling) -> list[Place]:
        """The groups with their sites, each group once; what cannot be cut is declined with what blocked it."""
        found: list[Place] = []
        blocked: list[Blocked] = []
        linears = blocks.linears(c.g, tied=True)
        for site, start in self.starts(c.g):
            at = (str(start.name), self.axis if self.axis >= 0 else (c.facts.rank(start) or 0) - 1)
            if (i := next((i for i, p in enumerate(found) if p.group.holds(*at)), None)) is not None:
                found[i] = dataclasses.replace(found[i], sites=(*found[i].sites, site))
                continue
            try:
                if (same := next((b for b in blocked if at in b.reached), None)) is not None:
                    raise same
                found.append(self._place(c, site, start, linears))
            except Blocked as e:
                blocked.append(e)
                c.g.decline(site, str(e))
            except ModelError as e:
                c.g.decline(site, str(e))
        return found

    def _place(self, c: Coupling, site: Site, start: ir.Value, linears: Sequence[Linear]) -> Place:
        names = (site.name, *site.nodes)
        if (hit := next((p for p in self.skip if any(fnmatchcase(n, p) for n in names)), None)) is not None:
            raise ModelError(f"skipped by the pattern '{hit}'")
        group = self.group(c, start)
        read = self._readers(c.g, group, linears)
        held = next((r.quantized for r in read if r.quantized), None)
        tried = self.score == "ablation" or self.ranking == "sensitivity"
        if held is not None and (self.repair in ("gauss-newton", "least-squares") or tried):
            raise ModelError(
                f"linear '{held.name}' is quantized, and this needs float weights: cut the model before quantizing it, "
                "or say repair: bias or none, no ablation, and no ranking by sensitivity"
            )
        if not read and (self.repair != "none" or self.score not in ("magnitude", "ablation")):
            raise ModelError("no linear reads it, so nothing can be measured; use score: magnitude and repair: none")
        return Place((site,), group, read)

    def _why(self, place: Place, target: Target) -> str:
        step = self._multiple(target)
        if place.group.units <= max(self.floor, step):
            return f"there are no fewer than {max(self.floor, step)} to keep (floor {self.floor}, multiples of {step})"
        return "the nearest count allowed" if self._ranked == "layer" else "they matter more than those of other layers"

    def _multiple(self, target: Target) -> int:
        return self.multiple_of or (target.width_multiple if self.aligned else 1)

    # ---- how much ------------------------------------------------------------------------------------------------

    def _candidates(
        self, g: Graph, places: Sequence[Place], found: Sequence[Float64], target: Target
    ) -> list[Candidate]:
        """The groups with their scores, what a unit costs, and which counts are allowed."""
        groups = [p.group for p in places]
        whole = parameters(g)
        costs = [max(1, whole - parameters(g, [(x, np.arange(x.units - 1))])) for x in groups]
        how = NORMAL.get(self.score, "l2") if self._ranked == "global" else "none"
        return [
            Candidate(normalised(s, how), cost, x.parts, self._multiple(target), self.floor)
            for s, x, cost in zip(found, groups, costs, strict=True)
        ]

    def _clock(self, g: Graph, places: Sequence[Place], found: Sequence[Candidate], env: Env) -> Clock | None:
        if self._by_clock is None:
            return None
        return budgets.timed(self.name, self._by_clock, g, [p.group for p in places], found, env)

    def _amounts(
        self, g: Graph, places: Sequence[Place], found: Sequence[Candidate], clock: Clock | None = None
    ) -> list[Array]:
        """The units that stay in each group: by ratio, or by the budget that takes most."""
        groups = [p.group for p in places]
        asked = [("parameters", self.parameters, parameters), ("macs", self.macs, macs)]
        given = [budgets.counted(name, b, g, groups, count) for name, b, count in asked if b is not None]
        if clock is not None and self.latency is not None:
            given.append(Budget("latency", self.latency, clock.share))
        if not given:
            return self._choose(found, self.ratio)
        return self._choose(found, budgets.ratio(self.name, self.unit, given, lambda r: self._choose(found, r)))

    def _choose(self, candidates: Sequence[Candidate], ratio: float) -> list[Array]:
        return choose(candidates, ratio, "layer" if self._ranked == "layer" else "global", self.uniform)

    # ---- what matters --------------------------------------------------------------------------------------------

    def _scores(self, g: Graph, place: Place, env: Env) -> Float64:
        """How much each unit matters: `[units]`; several readers count the same."""
        count = place.group.units
        if self.score == "magnitude":
            return readers.magnitude(g, place.group)
        if self.score == "ablation":
            if count > MOST_VARIANTS:
                raise RecipeError(
                    f"{self.name}: score ablation would run the model {count} times for one layer; use energy"
                )
            edits = [_silence(place.group, u) for u in range(count)]
            return np.array([s.value for s in env.evaluate(edits, self.metric)])
        found = [self._of_reader(g, r, env.stats, count) for r in place.readers]
        return found[0] if len(found) == 1 else np.asarray(sum(normalised(s, "l2") for s in found))

    def _of_reader(self, g: Graph, reader: Reader, stats: Stats, count: int) -> Float64:
        weight, units = reader.weight(g), reader.units
        if self.score == "wanda":
            return scores.per_unit(scores.wanda(weight, reader.norm2(stats)).sum(axis=1), units, count)
        if self.score == "flap":
            return scores.per_unit(scores.flap(reader.var(stats), weight), units, count, mean=True)
        return elimination(reader.gram(stats), weight, units, count)


def _silence(group: Group, unit: int) -> Edit:
    """An edit that zeroes what reads one unit."""
    return lambda g: readers.silence(g, group, np.array([unit]))
