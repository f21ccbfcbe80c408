"""The tests; `tiny` builds the models they use."""
