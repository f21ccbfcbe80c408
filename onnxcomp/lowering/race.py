"""Timed comparison of equivalent micro-models: in turns, one session alive at a time, ratios within each round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.lowering.choices import Candidate
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["APPROXIMATE", "FINER", "MARGIN", "ROUNDS", "Entry", "median", "race", "unfinished", "winner"]

ROUNDS = 8
ALLOWED_LOSSES = 1  # rounds that a faster form may lose: an equal one wins 7 of 8 or more by chance in 3.5 % of cases
STRAIGHT = 6  # won rounds without a loss that decide as well: by chance in 1.6 %, with the rule above in 3.9 %
MARGIN = 0.02  # a form must be faster by more than this in a round to have won it
SLOWER = 0.97  # and at no shape slower than this
WINDOW = 0.012  # seconds of timed runs per form, shape and round
WARMUP = 3  # runs
LONG_RUN = 0.005  # seconds of a run from which on a single one is enough for warm-up
# The largest difference of equivalent forms relative to the largest output, which is rounding in another order.
EQUAL = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 1e-2, np.dtype(np.float64): 1e-9}

ROUNDING_EDGES = 1e-3  # share of 8-bit results that may differ by one code, where float noise crosses a rounding edge
APPROXIMATE = 1e-2  # as `EQUAL`, for approximations that the recipe allows
FINER = 5e-2  # as `EQUAL`, where the default rounds its inputs to 8 bits and the other form does not

Feeds = Mapping[str, Array]


@dataclass
class Entry:
    """A form in the comparison: its model, feeds per shape, seconds `[round][shape]`; `note` says why it was excluded.

    `tolerance` is how far its outputs may be from the default's, relative to the largest; 0 for float noise.
    """

    form: str
    model: Graph
    feeds: Sequence[Feeds]
    laps: list[tuple[float, ...]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    note: str = ""
    tolerance: float = 0.0

    @property
    def losses(self) -> int:
        """Rounds in which it was not clearly faster than the default."""
        return sum(r <= 1 + MARGIN for r in self.ratios)

    @property
    def lost(self) -> bool:
        """Whether it cannot win any more."""
        return bool(self.note) or self.losses > ALLOWED_LOSSES

    @property
    def won(self) -> bool:
        """Whether it is reliably faster than the default."""
        rounds = len(self.ratios)
        return not self.lost and (rounds >= ROUNDS or (rounds >= STRAIGHT and not self.losses))

    def candidate(self, default: Entry) -> Candidate:
        """The measured times; the ratio is the median over rounds, its interval omits one round at either end."""
        ms = tuple(float(x) * 1e3 for x in np.median(np.array(self.laps), axis=0)) if self.laps else ()
        if self is default or not self.ratios:
            return Candidate(self.form, ms, note=self.note)
        ordered = sorted(self.ratios)
        cut = ALLOWED_LOSSES if len(ordered) >= ROUNDS else 0
        low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
        return Candidate(self.form, ms, float(np.median(ordered)), low, high, self.note)


def race(entries: Sequence[Entry], target: Target, *, threads: int = 0, deadline: float | None = None) -> None:
    """Time all forms in turns until each has won or lost; the first is the default.

    If the default fails, timing ends with its note. After the deadline (`time.perf_counter`) no round begins.
    """
    default, running = entries[0], list(entries[1:])
    expected: dict[str, Array] = {}
    for turn in range(ROUNDS):
        if all(e.won for e in running) or (turn and deadline is not None and time.perf_counter() > deadline):
            break
        order = [default, *running]
        for entry in order if turn % 2 == 0 else order[::-1]:
            outputs = _lap(entry, target, threads, fetch=turn == 0)
            if turn == 0 and not entry.note:
                if entry is default:
                    expected = outputs
                else:
                    entry.note = _differs(expected, outputs, entry.tolerance)
        if default.note:
            return
        running = [e for e in running if not e.note]
        for entry in running:
            entry.ratios.append(_ratio(default.laps[-1], entry.laps[-1]))
        running = [e for e in running if not e.lost]


def winner(entries: Sequence[Entry]) -> Entry:
    """The fastest form that is reliably faster than the default and slower at no shape, else the default."""
    default = entries[0]
    even = [e for e in entries[1:] if e.won and np.median(_by_shape(default, e), axis=0).min() >= SLOWER]
    return max(even, key=lambda e: float(np.median(e.ratios)), default=default)


def unfinished(entries: Sequence[Entry]) -> bool:
    """Whether time ran out while a form might still have won."""
    return any(not e.lost and not e.won for e in entries[1:])


def _by_shape(default: Entry, other: Entry) -> Array:
    """How many times faster `other` is than the default, `[rounds, shapes]`."""
    ratios: Array = np.array(default.laps[: len(other.laps)]) / np.array(other.laps)
    return ratios


def _lap(entry: Entry, target: Target, threads: int, *, fetch: bool) -> dict[str, Array]:
    """Time one form at every shape, in one session; returns its outputs at the first shape if asked to `fetch` them."""
    outputs: dict[str, Array] = {}
    try:
        with Session(entry.model, target, threads=threads, prepack=True) as session:
            if fetch:
                outputs = session.run(entry.feeds[0])
            entry.laps.append(tuple(median(session, feeds) for feeds in entry.feeds))
    except OnnxcompError as e:
        entry.note = f"does not run: {e}"
    return outputs


def median(session: Session, feeds: Feeds, window: float = WINDOW) -> float:
    """Median seconds of a run over `window` seconds, at least three runs (two long ones), after a short warm-up."""
    began = time.perf_counter()
    session.run(feeds)
    is_long = time.perf_counter() - began >= LONG_RUN
    for _ in range(0 if is_long else WARMUP - 1):
        session.run(feeds)
    samples: list[float] = []
    until = time.perf_counter() + window
    while len(samples) < (2 if is_long else 3) or time.perf_counter() < until:
        begin = time.perf_counter()
        session.run(feeds)
        samples.append(time.perf_counter() - begin)
    return float(np.median(samples))


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster `other` is than `base`: the geometric mean over all shapes."""
    return float(np.exp(np.mean(np.log(np.array(base) / np.array(other)))))


def _differs(expected: Mapping[str, Array], outputs: Mapping[str, Array], tolerance: float) -> str:
    """How the outputs differ from the expected ones, empty where they are equal to float noise."""
    for name, a in expected.items():
        b = outputs.get(name)
        if b is None or b.shape != a.shape:
            return "makes other outputs"
        if a.dtype.itemsize == 1 and a.dtype.kind in "iu" and a.size:
            off = np.abs(a.astype(np.int16) - b.astype(np.int16))
            if off.max() > 1 or np.mean(off > 0) > ROUNDING_EDGES:
                return f"differs from the default by up to {off.max()} codes"
        if a.dtype.kind != "f" or a.size == 0:
            continue
        scale = float(np.abs(a).max())
        error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) if np.isfinite(b).all() else np.inf
        if not error <= (tolerance or EQUAL.get(a.dtype, 1e-2)) * max(scale, 1e-30):
            return f"differs from the default by {error / max(scale, 1e-30):.1e}"
    return ""
