"""The loaders that the loader benchmark compares ours with, a file for each. How to add one:

1. Copy `plain_loop.py`, the smallest peer, to a file of this folder. Its `build(spec, workers)` returns a `Loading`.
   Each iteration of `Loading.epochs` is one epoch of pairs `(keys, batch)`. `spec.py` says what a batch holds in each
   workload (`Spec.workload`); `transforms.py` makes it from a snippet. A peer that ends in a torch DataLoader needs
   only a Dataset: see `torch_dataloader.py`. One with files of its own format writes them once, with
   `bench_data.made_once`: see `lit_data.py`.
2. Add a `Contestant` with its name, module and packages to `CONTESTANTS` in `spec.py`.
3. Pin its packages in requirements-bench.txt. If they are not installed, its row says so and the others still run. Add
   what it imports to the `module` list of mypy's overrides in pyproject.toml, for `make lint`.
4. Try it: `python benchmarks/loader_bench.py --quick --peers NAME`. Every contestant runs in a process of its own
   (`__main__.py`), and its batches are compared with a reference before it is timed (`contest.py`): a row that is not
   timed says why.
"""
