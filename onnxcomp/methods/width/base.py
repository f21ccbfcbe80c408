"""What the passes that cut widths share: score units, choose how many stay, remove the rest, repair what reads them.

A pass names the groups; how units are scored is in `scores`, how many are removed in `budgets`, repairs are in
`methods.repair`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import BeforeValidator, Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.coupling import Blocked, Coupling, prove
from onnxcomp.coupling.sizes import parameters
from onnxcomp.data.datasets import Dataset
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.allocation import Candidate, Normal, choose, normalised
from onnxcomp.maths.error_curves import Curve
from onnxcomp.methods.quantize.augmentation import widened
from onnxcomp.methods.repair import readers
from onnxcomp.methods.repair.readers import Reader, Repair
from onnxcomp.methods.repair.sequential import WHOLE, Part, refit_in_order
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.methods.width import amounts, budgets, scores, trial_cuts
from onnxcomp.methods.width.budgets import Clock
from onnxcomp.methods.width.places import UNREACHED, Cut, Place
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need
from onnxcomp.target import Target

__all__ = ["Ranking", "Score", "Width"]

# The score of FLAP was called by the paper's name before.
Score = Annotated[
    Literal["magnitude", "wanda", "fluctuation", "energy", "ablation"],
    BeforeValidator(lambda name: "fluctuation" if name == "flap" else name),
]
Ranking = Literal["curves", "sensitivity", "global", "layer"]
FLAT = "no trial cut lost anything on these samples, so all layers give the same share"
TRIED = ("curves", "sensitivity")  # rankings by trial cuts, which zero float weights and need statistics of the uncut
# How scores of different layers become comparable: FLAP standardizes them, ablation has one loss for all layers.
NORMALIZED: dict[str, Normal] = {"fluctuation": "standard", "ablation": "none"}


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
    """Cut until at most this share of all float parameters, of the model as the pass meets it, remains; no ratio."""
    macs: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cut until at most this share of all the model's multiplications with weights, per token, remains."""
    latency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cut until what is cut (its linears, its attention) takes at most this share of its time, measured here."""
    ranking: Ranking | None = None
    """What decides between layers: their error curves, one trial cut of each, the scores alone, the same share of each.

    By default curves where score or repair ask for data anyway and no weight is quantized, and else layer.
    """
    score: Score = "energy"
    """How much a unit matters: weight norm, |W||X|, fluctuation, output error after a refit, loss of the model."""
    repair: Repair = "least-squares"
    """How it is compensated: remaining weights refitted to the uncut layer, its mean in the bias, none: no repair.

    `block-tune` and `gauss-newton` refit every linear that adds to the residual stream after the cut, and whole
    feed-forward parts: by Adam, with the norms behind them, and by Gauss-Newton steps.
    """
    sequential: bool = True
    """Refit each layer on the inputs that the repaired layers before it produce; else on the uncut model's inputs.

    Only least squares has the choice: what is fitted beyond it is always sequential.
    """
    multiple_of: Annotated[int, Field(ge=0)] = 0
    """Widths become multiples of this; 0 takes what the target runs well (for heads: any count)."""
    floor: Annotated[int, Field(ge=1)] = 1
    """Units that every layer keeps at least."""
    uniform: bool = False
    """Keep the same share of every layer whatever the ranking, for runtimes that want one number for all."""
    metric: str | None = None
    """Gate name that ablation, curves and sensitivity measure; by default kl for logits, else rel-l2."""
    augment: bool = False
    """Choose and fit on copies of the texts with tokens replaced at random too, for texts of another kind."""
    skip: tuple[str, ...] = ()
    """Patterns of node names that are not cut."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be cut."""
        budgets_given = [b for b in (self.parameters, self.macs, self.latency) if b is not None]
        return all(b == 1 for b in budgets_given) if budgets_given else self.ratio == 0

    @property
    def wants_data(self) -> bool:
        """Magnitudes without repair need none."""
        return self._measures or self.ranking in TRIED

    @property
    def fits(self) -> bool:
        """Least squares and what builds on it."""
        return not self.is_identity and self.repair in (*WHOLE, "least-squares")

    @property
    def _measures(self) -> bool:
        return self.score != "magnitude" or self.repair != "none"

    @property
    def _ranked(self) -> Ranking:
        """The ranking asked for, by default the one that fits the other options."""
        if self.uniform:
            return "layer"
        return self.ranking or ("curves" if self._measures else "layer")

    @property
    def _by_clock(self) -> float | None:
        """The latency budget, None where there is none or it allows all."""
        return None if self.latency == 1 else self.latency

    @property
    def _in_order(self) -> bool:
        return self.repair in WHOLE or (self.sequential and self.repair == "least-squares")

    def planning(self) -> Width:
        """The pass for a dry run, with the same total size: units ranked by magnitude, without data and repair.

        Raises `RecipeError` for a latency budget: a dry run has no clock.
        """
        if self._by_clock is not None:
            raise budgets.no_clock(self.name, self._by_clock, "a dry run (--plan) has none")
        ranking = "global" if self._ranked in TRIED else self.ranking
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

    def calibration(self, data: Dataset, g: Graph) -> Dataset:
        """With copies of the texts where that is asked for."""
        return widened(data, g, self.name) if self.augment else data

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The statistics for score and repair, of the inputs of every linear that reads the axis."""
        if self.is_identity or not self.wants_data:
            return
        yield from dict.fromkeys(n for p in self.places(Coupling(g.clone())) for n in self._needs(p))

    def _needs(self, place: Place) -> Iterable[Need]:
        """What the score of one group asks for, and its repair where that is not sequential."""
        uses_uncut_inputs = not self._in_order or self._ranked in TRIED
        kinds = [*scores.NEEDS[self.score], *(readers.NEEDS[self.repair] if uses_uncut_inputs else ())]
        bias = readers.NEEDS["none" if self.repair == "none" else "bias"]
        return (
            need(s)
            for r in place.readers
            for s in r.sources
            for need in dict.fromkeys([*kinds, *(bias if r.feeds_itself else ())])
        )

    def _reached(self, g: Graph, places: Iterable[Place], env: Env) -> list[Place]:
        """The groups that some sample reaches; the others, of experts that no token is sent to, are declined."""
        reached = []
        for place in places:
            if all(env.stats.reached(n) for n in self._needs(place)):
                reached.append(place)
                continue
            for site in place.sites:
                g.decline(site, UNREACHED)
        return reached

    def run(self, g: Graph, env: Env) -> None:
        """Score the units, choose which stay, take the others out, and repair what reads the axis."""
        if self.is_identity:
            return
        if self.ranking is None and any(x.quantized for x in blocks.linears(g, tied=True)):
            dataclasses.replace(self, ranking="layer").run(g, env)  # a trial cut cannot zero quantized weights
            return
        coupling = Coupling(g)
        places = self._reached(g, self.places(coupling), env)
        if not places:
            return
        candidates = self._score(g, places, env)
        clock = self._clock(g, places, candidates, env)
        curves = self._curves(g, places, candidates, env)
        chooser, flat = self, curves is not None and not any(c.tells for c in curves)
        if flat:
            chooser, curves = dataclasses.replace(self, ranking="layer"), None
        keeps = chooser._amounts(g, places, candidates, curves, clock)
        said = [clock.describe(keeps, i) if clock else FLAT if flat else "" for i in range(len(keeps))]
        losses = [float(curves[i].at([len(k)])[0]) if curves else None for i, k in enumerate(keeps)]
        self._apply(g, env, coupling, [Cut(*x) for x in zip(places, keeps, said, losses, strict=True)])

    def _apply(self, g: Graph, env: Env, coupling: Coupling, cuts: Sequence[Cut]) -> None:
        """Take out what does not stay, and repair what reads it."""
        uncut = g.clone()
        self._repair(g, uncut, env, self._cut(g, env, coupling, cuts))

    def _cut(self, g: Graph, env: Env, coupling: Coupling, cuts: Sequence[Cut]) -> list[tuple[Place, Array]]:
        """Take units out of groups, and prove the sizes of what is left; the groups that were cut."""
        done = list[tuple[Place, Array]]()
        for cut in cuts:
            if why := cut.place.group.emptied(cut.keep):
                for site in cut.place.sites:
                    g.decline(site, why)
                continue
            self._take(g, cut, env)
            done.append((cut.place, cut.keep))
        prove(coupling.facts, g, [(p.group, keep) for p, keep in done])
        return [(p, keep) for p, keep in done if len(keep) < p.group.units]

    def _take(self, g: Graph, cut: Cut, env: Env) -> None:
        """Take the units that do not stay out of one group and note it, or decline its sites where all stay.

        A repair that is not sequential comes first: it needs the weights of the removed units.
        """
        place, keep = cut.place, cut.keep
        if len(keep) == place.group.units:
            for site in place.sites:
                g.decline(site, f"all {len(keep)} {self._unit(place)} stay: {self._why(place, env.target)}")
            return
        for reader in place.readers:
            if self.repair != "none" and (not self._in_order or reader.feeds_itself):
                readers.repair(g, reader, keep, env.stats, self.repair)
        g.take(place.group, keep)
        for site in place.sites:
            g.note(site, cut.describe(self._unit(place)), cut.values)

    def _repair(self, g: Graph, uncut: Graph, env: Env, cut: Sequence[tuple[Place, Array]]) -> None:
        """Sequential repair: refit the readers of what was cut, one after another, where that is asked for."""
        if self._in_order:
            self._refit(g, uncut, env, cut)

    def _refit(
        self,
        g: Graph,
        uncut: Graph,
        env: Env,
        cut: Sequence[tuple[Place, Array]],
        streams: Mapping[str, Part] | None = None,
    ) -> None:
        """Refit the readers of what was cut in order, and what is added to some `streams` towards what these are."""
        refit_in_order(g, uncut, env, [r for p, _ in cut for r in p.readers], streams, self.repair)

    def _readers(self, g: Graph, group: Group, linears: Sequence[Linear]) -> tuple[Reader, ...]:
        """What reads the axis of a group and can be refitted; raises `ModelError` where that cannot be as asked."""
        return readers.readers_of(group, linears)

    # ---- what is cut ---------------------------------------------------------------------------------------------

    def places(self, c: Coupling) -> list[Place]:
        """The groups with their sites, each group once; what cannot be cut is declined with the reason."""
        places: list[Place] = []
        blocked: list[Blocked] = []
        linears = blocks.linears(c.g, tied=True)
        for site, start in self.starts(c.g):
            at = (str(start.name), self.axis if self.axis >= 0 else (c.facts.rank(start) or 0) - 1)
            if (i := next((i for i, p in enumerate(places) if p.group.holds(*at)), None)) is not None:
                places[i] = dataclasses.replace(places[i], sites=(*places[i].sites, site))
                continue
            try:
                if (same := next((b for b in blocked if at in b.reached), None)) is not None:
                    raise same
                places.append(self._place(c, site, start, linears))
            except Blocked as e:
                blocked.append(e)
                c.g.decline(site, str(e))
            except ModelError as e:
                c.g.decline(site, str(e))
        return places

    def _place(self, c: Coupling, site: Site, start: ir.Value, linears: Sequence[Linear]) -> Place:
        if (pattern := skipped(self.skip, site.name, *site.nodes)) is not None:
            raise ModelError(f"skipped by the pattern '{pattern}'")
        group = self.group(c, start)
        consumers = self._readers(c.g, group, linears)
        quantized = next((r.quantized for r in consumers if r.quantized), None)
        zeroes_weights = self.score == "ablation" or self.ranking in TRIED
        if quantized is not None and (self.repair in (*WHOLE, "least-squares") or zeroes_weights):
            raise ModelError(
                f"linear '{quantized.name}' is quantized, and this needs float weights: cut the model before "
                "quantizing it, or say repair: bias or none, no ablation, and no ranking by curves or sensitivity"
            )
        if not consumers and (self.repair != "none" or self.score not in ("magnitude", "ablation")):
            raise ModelError("no linear reads it, so nothing can be measured; use score: magnitude and repair: none")
        return Place((site,), group, consumers)

    def _why(self, place: Place, target: Target) -> str:
        step = self._multiple(place, target)
        if place.group.units <= max(self.floor, step):
            return f"there are no fewer than {max(self.floor, step)} to keep (floor {self.floor}, multiples of {step})"
        return "the nearest count allowed" if self._ranked == "layer" else "they matter more than those of other layers"

    def _unit(self, place: Place) -> str:
        """What the units of a group are called."""
        return self.unit

    def _multiple(self, place: Place, target: Target) -> int:
        """The steps of a group's width."""
        return self.multiple_of or (target.width_multiple if self.aligned else 1)

    # ---- score and amount ----------------------------------------------------------------------------------------

    def _score(self, g: Graph, places: Sequence[Place], env: Env) -> list[Candidate]:
        """The groups with the score of every unit, in units of the model's loss where trial cuts rank the layers."""
        candidates = self._candidates(g, places, [self._scores(g, p, env) for p in places], env.target)
        if self._ranked != "sensitivity":
            return candidates
        return trial_cuts.scaled(g, [p.part for p in places], candidates, env, self.metric, self.repair)

    def _scores(self, g: Graph, place: Place, env: Env) -> Float64:
        """How much each unit of one group matters: `[units]`; of several consumers each counts the same."""
        if self.score == "magnitude":
            return scores.magnitude(g, place.group)
        if self.score == "ablation":
            return scores.ablation(place.group, env, self.metric, self.name)
        score = scores.SCORES[self.score]
        parts = [score(r.weight(g), r, env.stats, place.group.units) for r in place.readers]
        return parts[0] if len(parts) == 1 else np.asarray(sum(normalised(s, "l2") for s in parts))

    def _candidates(
        self, g: Graph, places: Sequence[Place], unit_scores: Sequence[Float64], target: Target
    ) -> list[Candidate]:
        """The groups with their scores, the parameters that one unit costs, and which counts are allowed."""
        groups = [p.group for p in places]
        total = parameters(g)
        costs = [max(1, total - parameters(g, [(x, np.arange(x.units - 1))])) for x in groups]
        how = NORMALIZED.get(self.score, "l2") if self._ranked == "global" else "none"
        return [
            Candidate(normalised(s, how), cost, p.group.parts, self._multiple(p, target), self.floor)
            for s, p, cost in zip(unit_scores, places, costs, strict=True)
        ]

    def _curves(
        self, g: Graph, places: Sequence[Place], candidates: Sequence[Candidate], env: Env
    ) -> list[Curve] | None:
        """The error curves of the layers; None where there is one layer, or something else ranks them."""
        if self._ranked != "curves" or len(candidates) < 2:
            return None
        left_out = self._droppable(g, places)
        return trial_cuts.curves(g, [p.part for p in places], candidates, env, self.metric, self.repair, left_out)

    def _droppable(self, g: Graph, places: Sequence[Place]) -> Collection[int]:
        """The numbers of the groups of which nothing need stay."""
        return ()

    def _clock(self, g: Graph, places: Sequence[Place], candidates: Sequence[Candidate], env: Env) -> Clock | None:
        """Measured times of every group, None without a latency budget."""
        if self._by_clock is None:
            return None
        return budgets.timed(self.name, self._by_clock, g, [p.group for p in places], candidates, env)

    def _amounts(
        self,
        g: Graph,
        places: Sequence[Place],
        candidates: Sequence[Candidate],
        curves: Sequence[Curve] | None = None,
        clock: Clock | None = None,
    ) -> list[Array]:
        """The units that stay in each group: by ratio, or so that every budget is met."""
        shares = {"parameters": self.parameters, "macs": self.macs}
        given = budgets.currencies(g, [p.group for p in places], shares, self.latency, clock)
        if curves is not None:
            return amounts.by_curves(self.name, self.unit, curves, given, self.ratio)
        ratio = budgets.ratio(self.name, self.unit, [c.budget for c in given], lambda r: self._choose(candidates, r))
        return self._choose(candidates, ratio if given else self.ratio)

    def _choose(self, candidates: Sequence[Candidate], ratio: float) -> list[Array]:
        return choose(candidates, ratio, "layer" if self._ranked == "layer" else "global", self.uniform)
