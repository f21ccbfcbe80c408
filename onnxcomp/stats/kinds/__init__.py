"""One file per family of statistics: the need, the class that registers it, and its accumulator."""
