"""Build TensorRT engines, write them, and decide from their layers which precision they have."""
