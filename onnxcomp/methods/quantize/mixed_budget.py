"""Budgets of `mixed-precision`: a size, a time, or a condition on the drift."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnxcomp.errors import RecipeError
from onnxcomp.validation.gates import MEASURED_ON_FILES, NAMES, Condition

__all__ = ["BUDGETS", "Budget"]

MEASURES = "|".join(name for name in NAMES if name not in MEASURED_ON_FILES)
NUMBER = r"\d{1,9}(\.\d{1,9})?"
BUDGETS = rf"^({NUMBER}(x|kB|MB|GB|ms)|({MEASURES})(<=|>=|<|>){NUMBER}(e-\d\d?)?%?)$"
SIZE = re.compile(r"(\d+\.?\d*)(x|kB|MB|GB|ms)")
SCALE = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "ms": 1e-3}


@dataclass(frozen=True)
class Budget:
    """Bytes relative to all in one option, or in all, a time, or a condition: `1.05x`, `12MB`, `3ms`, `kl<=0.01`."""

    text: str
    relative: float | None = None
    nbytes: float | None = None
    seconds: float | None = None
    condition: Condition | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read one; raises `RecipeError`."""
        if size := SIZE.fullmatch(text):
            number, unit = float(size[1]), size[2]
            if unit == "x":
                return cls(text, relative=number)
            amount = number * SCALE[unit]
            return cls(text, seconds=amount) if unit == "ms" else cls(text, nbytes=amount)
        try:
            condition = Condition.parse(text)
        except RecipeError as e:
            wanted = "neither a size or time, such as 1.05x, 12MB or 3ms, nor a gate"
            raise RecipeError(f"budget '{text}' is {wanted}: {e}") from None
        if condition.name in MEASURED_ON_FILES or condition.output is not None:
            raise RecipeError(f"budget '{text}': give a size such as 1.05x, or a gate on the drift of all outputs")
        return cls(text, condition=condition)

    def limit(self, base: float) -> float:
        """Bytes or seconds, where it is a size, maybe relative to so many, or a time."""
        return self.seconds or self.nbytes or (self.relative or 0.0) * base
