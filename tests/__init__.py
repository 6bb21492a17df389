"""Promises of the program, each a test with a name."""

import hypothesis

# No deadlines: how long a machine takes is what the benchmarks measure.
hypothesis.settings.register_profile("needlestream", deadline=None, max_examples=60)
hypothesis.settings.load_profile("needlestream")
