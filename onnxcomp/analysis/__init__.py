"""What is true of the values of a graph before it runs: shapes, sizes, contents, bounds, element types."""
