"""Promises of the program, each a test with a name."""

import os

import hypothesis

# One thread for each process, before torch is imported: `make test` starts as many processes as there are cores, and
# what is compared bit for bit was computed with as many threads. The tests' models are too small to gain by more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines: how long a machine takes is what the benchmarks measure.
hypothesis.settings.register_profile("needlestream", deadline=None, max_examples=60)
hypothesis.settings.load_profile("needlestream")
