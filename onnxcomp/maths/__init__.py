"""Pure numpy: number formats, solvers and scores. Nothing here knows what a graph is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

RESAMPLES = 1000  # of a bootstrap: 25 lie beyond each bound of the 95 % interval
# In-channels between two updates of all later ones, as a matrix product ("lazy batch", GPTQ, section 3); SparseGPT
# chooses its zeros in spans of as many.
LAZY = 128

__all__ = ["LAZY", "RESAMPLES", "Array", "Float32", "Float64"]
