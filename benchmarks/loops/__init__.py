"""The training and prediction loops that train_bench compares ours with, a file for each. How to add one:

1. Copy `accelerate_loop.py`, the smallest, to a file of this folder. Its `train(job, turns)` trains an epoch for each
   turn and records what it did (`spec.Turn`); its `predictor(job)` returns a function that predicts all cadences and
   returns their logits in order. `feed.py` gives both the data set and its DataLoader.
2. Add a `Loop` with its name, module, feed, packages and how it differs from ours to `LOOPS` in `spec.py`.
3. Pin its packages in requirements-bench.txt. If they are not installed, its row says so and the others still run. Add
   what it imports to the `module` list of mypy's overrides in pyproject.toml, for `make lint`.
4. Try it: `python benchmarks/train_bench.py --peers NAME --cadences 64 --rounds 1`. Every loop runs in a process of its
   own (`__main__.py`). Before it is timed, `contest.py` checks what it trains on, or compares its logits with ours.
"""
