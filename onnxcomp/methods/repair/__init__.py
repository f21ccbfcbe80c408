"""Closed-form and iterative repair after a cut."""
