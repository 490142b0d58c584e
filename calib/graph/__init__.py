"""Rewrite ONNX graphs without torch: split, convert, unroll and equalize them, and count their multiply-adds."""
