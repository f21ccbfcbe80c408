"""Equivalent forms of parts of a graph (attention, linears, norms) and the choice of the fastest on a target."""
