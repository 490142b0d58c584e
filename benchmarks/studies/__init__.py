"""Measure once what a document reports about long videos."""
