"""Compare two models on the same queries, and report the differences."""
