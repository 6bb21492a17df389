"""Loaders to compare with, each in a process of its own: `python -m benchmarks.peers NAME --workload raw ...`."""
