"""A written model must run where its original runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcomp.data.datasets import load_data
from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.files.stored import Stored
from onnxcomp.runtime.runner import Runner
from onnxcomp.target import Target

__all__ = ["smoke"]

SHAPES = ({"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 12})


def smoke(original: Stored, written: Stored, target: Target) -> list[str]:
    """Run the written model on random inputs at two shapes (where its axes are dynamic).

    Raises `ModelError` where it fails or is not finite though the original is fine; a note where that is no better.
    """
    notes = []
    for shape in SHAPES:
        size = shape["batch"]
        data = load_data(
            "random", written.graph, written.path.parent, batch=size, samples=size, sequence=shape["sequence"]
        )
        feeds = next(iter(data)).feeds
        if problem := _trouble(written, feeds, target):
            if not _trouble(original, feeds, target):
                older = "; --opset 21 writes older operators" if "find an implementation" in problem else ""
                raise ModelError(
                    f"the result fails on random inputs at {shape}, the original does not: {problem}{older}"
                )
            notes.append(f"the original fails on random inputs at {shape} as well as the result: {problem}")
    return notes


def _trouble(model: Stored, feeds: Mapping[str, Any], target: Target) -> str:
    """What is wrong with one run, empty if nothing is."""
    try:
        with Runner(model, target) as session:
            outputs = session.run(feeds)
    except OnnxcompError as e:
        return str(e)
    bad = [name for name, y in outputs.items() if y.dtype.kind == "f" and not np.isfinite(y).all()]
    return f"output '{bad[0]}' is not finite" if bad else ""
