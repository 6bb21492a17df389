"""Benchmarks: loading, training, prediction, packing and finding needles, measured against others."""
