"""Measure once what a document reports: scaling, graph optimizations, long videos."""
