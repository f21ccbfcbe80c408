"""Models on disk: read without copying, written atomically."""
