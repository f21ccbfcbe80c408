"""Equivalent forms of the sites of a graph, and the choice among them by measurement or from the target's table."""
