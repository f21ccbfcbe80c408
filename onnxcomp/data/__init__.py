"""Where batches come from, and what a model is fed."""
