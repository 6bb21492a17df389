"""The setting of malloc that keeps large blocks."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
{first}
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    ones = torch.ones(20_000_000)  # 80 MB
    return (ones + 1).sum()
for _ in range(5):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def count_faults(first: str) -> int:
    """Page faults in five steps that allocate and free blocks of 80 MB, after five steps to warm up."""
    words = [sys.executable, "-c", FAULTS.format(first=first)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_large_block_that_was_freed_is_used_again_without_new_pages() -> None:
    without, kept = count_faults(""), count_faults("import shard_tools.system.allocator")
    assert kept < without / 5
