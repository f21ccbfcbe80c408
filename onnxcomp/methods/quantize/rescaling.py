"""What passes share that rescale the channels of linears' inputs, where rounding then errs less on left-out rows."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Float64
from onnxcomp.maths.trial_rounding import Trial, TrialRounding, most_columns
from onnxcomp.methods.quantize import gains, linears
from onnxcomp.methods.quantize.gains import Place
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, sample
from onnxcomp.target import Target

__all__ = ["Change", "Rescaling"]

ROWS = 512  # of each input; a quarter of them judge what the others propose
ROUNDS = 12  # of proposals on top of each other: each must lower the error by `least`, so a few are usual
LARGEST_GAIN = 1024.0  # of one channel: half types still hold weights that were multiplied by it
UNREACHED = "no sample of the data reaches it"


@dataclass(frozen=True)
class Change:
    """The linears read `(x - shift) / gain`, both `[K]`."""

    gain: Float64
    shift: Float64

    def after(self, first: Change) -> Change:
        """This change on top of another."""
        return Change(first.gain * self.gain, first.shift + first.gain * self.shift)


@dataclass(frozen=True)
class Rescaling(Pass):
    """A pass whose `proposals` are tried on the linears of each input, and folded into what makes the input."""

    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    plans: ClassVar[bool] = True

    bits: Literal[8, 4, 3, 2] = 8
    """Bits of the weights by whose rounding it is judged."""
    block: Literal[0, 16, 32, 64, 128, 256] = 0
    """In-channels that share a scale there; 0 is one scale per out-channel."""
    inputs: Literal[0, 4, 8] = 8
    """Bits of the inputs there; 0 leaves them float."""
    least: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the rounding error on left-out rows that must go, or else a site stays as it is."""
    multiply: bool = False
    """Where nothing that makes an input can take its gain, multiply by it at run time."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay as they are."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Linears with fewer weights stay as they are, since quantizers leave them in float."""

    @abc.abstractmethod
    def proposals(self, rows: Float64, *, shifts: bool) -> Iterable[Change]:
        """Changes to try, from rows `[T, K]` of the input as it is by then; without `shifts` shifts are zero."""

    @property
    def wants_data(self) -> bool:
        """Channels are known by their data."""
        return True

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in linears.quantizable(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """Rows of each input."""
        return [sample(p.source, ROWS) for p in self._places(g.clone())]

    def run(self, g: Graph, env: Env) -> None:
        """Rescale one input after the other, the last ones first: a gain may change columns of earlier weights."""
        for place in reversed(self._places(g)):
            reached = env.dry or env.stats.reached(sample(place.source, ROWS))
            why = self._rescale(g, place, env) if reached else UNREACHED
            if why:
                for x in place.readers:
                    g.decline(x.site, why)

    def _places(self, g: Graph) -> list[Place]:
        return gains.places(g, linears.chosen(g, self.skip, self.min_size))

    def _rescale(self, g: Graph, place: Place, env: Env) -> str:
        """Fold the best change of an input; why there is none, empty if there is one."""
        if why := gains.unfit(place):
            return why
        if place.fold is None and not self.multiply:
            return "its gains would have to be multiplied at run time"
        if env.dry:
            return "without data no channel is larger than another"
        change, share = self._best(np.asarray(env.stats[sample(place.source, ROWS)], np.float64), g, place)
        if share == 1:
            return f"no proposal lowers the rounding error by {self.least:.0%}"
        if np.any(change.shift):
            gains.subtract(g, place, change.shift)
            place = next(p for p in self._places(g) if p.source is place.source)  # readers may have got a bias
        gains.divide(g, place, change.gain)
        g.note(place.readers[0].site, f"rounding errs {share:.2f} times as much as before")
        return ""

    def _best(self, rows: Float64, g: Graph, place: Place) -> tuple[Change, float]:
        """The change to which proposals on top of each other lead, and its error as a share of the plain one."""
        weights = [most_columns(g.array(x.weight)) for x in place.readers]
        trial = Trial(rows, weights, TrialRounding(self.bits, self.block, self.inputs))
        best, plain = Change(np.ones(rows.shape[1]), np.zeros(rows.shape[1])), trial.error()
        error = plain
        for _ in range(ROUNDS):
            now = (trial.seen - best.shift) / best.gain
            proposed = self.proposals(now, shifts=place.added is not None)
            tried = [Change(self._legal(c.gain, place), c.shift) for c in (p.after(best) for p in proposed)]
            errors = [trial.error(c.gain, c.shift) for c in tried]
            if not errors or not min(errors) < (1 - self.least) * error:
                break
            at = int(np.argmin(errors))
            best, error = tried[at], errors[at]
        return best, error / plain if error < plain else 1.0

    @staticmethod
    def _legal(gain: Float64, place: Place) -> Float64:
        return gains.tied(place, np.clip(gain, 1 / LARGEST_GAIN, LARGEST_GAIN))
