"""The parts of the learning check (benchmarks/learning_check.py)."""
