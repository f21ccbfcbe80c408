"""On its way to the rooms."""
