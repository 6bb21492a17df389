"""The parts of the needle benchmark (benchmarks/needle_bench.py), which the learning curve and others use too."""
