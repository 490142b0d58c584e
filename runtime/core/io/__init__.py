"""Read and write files that may be damaged or hostile, and replace files atomically."""
