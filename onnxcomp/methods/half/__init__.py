"""Half precision: which nodes can run in it, whether their values fit, and the edit."""
