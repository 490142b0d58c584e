"""Measure the latency of models in turns on one machine, and report it."""
