"""Static analysis of values: symbolic shapes, contents of small values, bounds, element types, layouts."""
