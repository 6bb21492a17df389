"""The setting of malloc that keeps large blocks."""

import os
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


@pytest.mark.skipif(sys.platform != "linux", reason="set together with glibc's malloc")
@pytest.mark.parametrize("chosen", [{}, {"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}])
def test_arrow_uses_the_same_malloc_unless_the_user_chose_another(chosen: dict[str, str]) -> None:
    script = "import shard_tools.system.allocator, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    others = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env={**others, **chosen}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == chosen.get("ARROW_DEFAULT_MEMORY_POOL", "system")


def count_faults(first: str) -> int:
    """Page faults in five steps that allocate and free blocks of 80 MB, after five steps to warm up."""
    words = [sys.executable, "-c", FAULTS.format(first=first)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_large_block_that_was_freed_is_used_again_without_new_pages() -> None:
    without, kept = count_faults(""), count_faults("import shard_tools.system.allocator")
    assert kept < without / 5
