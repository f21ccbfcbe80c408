"""The data that a model is made and judged with, and what has to be said of it."""

from __future__ import annotations

from typing import Any

from onnxcomp.data.datasets import Dataset, as_dataset, overlap
from onnxcomp.engine.probe import probe
from onnxcomp.graph import Graph
from onnxcomp.reports.outcome import DataUsed

__all__ = ["HELD_OUT", "datasets", "described"]

HELD_OUT = 5  # calibration samples from which on one in so many is held out where there is no evaluation data


def datasets(
    g: Graph, calibration: Any, evaluation: Any, *, made_up: bool
) -> tuple[Dataset | None, Dataset | None, list[str]]:
    """Both sources as datasets, with notes; without evaluation data one fifth of the calibration data is held out.

    Where that leaves nothing to judge on, random inputs may be `made_up`. Passes fit to calibration data
    as the result takes it.
    """
    notes = []
    calib = as_dataset(calibration, g) if _given(calibration) else None
    evalu = as_dataset(evaluation, g) if _given(evaluation) else None
    if calib is not None and evalu is None and len(calib) >= HELD_OUT:
        calib, evalu = calib.split(HELD_OUT)
        total = len(calib) + len(evalu)
        notes.append(f"no evaluation data: {len(evalu)} of {total} calibration samples were held out to judge")
    elif calib is not None and evalu is not None and (shared := overlap(calib, evalu)):
        notes.append(f"{shared} evaluation samples are also in the calibration data: accuracy is overrated")
    if evalu is None and made_up:
        evalu, note = probe(g)
        notes.append(note)
    if any(d is not None and d.random for d in (calib, evalu)):
        notes.append("random data was used: it proves shapes and speed, not accuracy")
    notes += dict.fromkeys(f"{d.name}: {note}" for d in (calib, evalu) if d is not None for note in d.notes)
    return calib if calib is None else calib.of_result(), evalu, notes


def described(data: Dataset | None) -> DataUsed | None:
    """The source and number of samples of a dataset."""
    return None if data is None else DataUsed(data.name, len(data))


def _given(data: Any) -> bool:
    return data is not None and not (isinstance(data, (tuple, list)) and not data)
