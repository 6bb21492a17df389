"""The program's promises: each is a test whose name states it."""

import os

import hypothesis

# One thread for each process, before torch is imported: `make test` starts as many processes as there are cores, and
# results that are compared bit for bit need equal numbers of threads. The tests' models are too small to gain by more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines: speed is for the benchmarks to measure.
hypothesis.settings.register_profile("needlestream", deadline=None, max_examples=60)
hypothesis.settings.load_profile("needlestream")
