"""Models on disk: loaded by memory mapping, written atomically."""
