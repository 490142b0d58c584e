"""Simulate clip features for videos whose real features are not at hand."""
