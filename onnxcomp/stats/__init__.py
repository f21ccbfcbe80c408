"""Statistics as values: the expression that asks for a statistic is also the key that reads it.

`needs()` yields `absmax(v)`; later `env.stats[absmax(v)]` is the answer. A channel is an index of the last axis.
"""

from onnxcomp.stats.kinds.cosines import cosine
from onnxcomp.stats.kinds.extremes import absmax, minmax
from onnxcomp.stats.kinds.grams import cross_gram, gram
from onnxcomp.stats.kinds.histograms import histogram
from onnxcomp.stats.kinds.integer_counts import counts
from onnxcomp.stats.kinds.moments import mean, norm2, var
from onnxcomp.stats.kinds.row_samples import paired, sample
from onnxcomp.stats.kinds.shifts import shift
from onnxcomp.stats.statistic import Accumulator, Need, Of, Per, Stat, Statistic, Stats, finite, name_of, no_rows

__all__ = [
    "Accumulator",
    "Need",
    "Of",
    "Per",
    "Stat",
    "Statistic",
    "Stats",
    "absmax",
    "cosine",
    "counts",
    "cross_gram",
    "finite",
    "gram",
    "histogram",
    "mean",
    "minmax",
    "name_of",
    "no_rows",
    "norm2",
    "paired",
    "sample",
    "shift",
    "var",
]
