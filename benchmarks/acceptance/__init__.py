"""The legs of the GPU acceptance; `benchmarks.gpu` runs them."""
