"""Pure numpy: number formats, solvers and scores. Nothing here knows what a graph is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

__all__ = ["Array", "Float64"]
