"""What came of a job: the report as values, as versioned JSON, and as tables."""
