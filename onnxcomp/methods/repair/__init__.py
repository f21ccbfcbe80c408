"""Closed-form and iterative repair of what is left after a cut."""
