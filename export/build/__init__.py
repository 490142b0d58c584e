"""Run one build of an engine: its configuration, conversion, and checks."""
