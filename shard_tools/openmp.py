"""How torch's threads wait and how many they are: imported before torch, which reads this once, as it is loaded.

OpenMP's threads spin while they wait for work. Two programs that spin on the same cores take them from each other: of
two trainings side by side on two cores each ran at 3 to 9 cadences/s, where threads that sleep gave 61 to 70; alone,
sleeping cost nothing that could be measured (docs/performance.md). What the user has set stays.
"""

import os

from shard_tools.cores import bound_cores, rank_cores

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# OpenMP counts the cores that it may run on, but knows nothing of a container's quota, nor of other ranks.
if rank_cores() < bound_cores():
    os.environ.setdefault("OMP_NUM_THREADS", str(rank_cores()))
