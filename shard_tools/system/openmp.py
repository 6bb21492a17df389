"""OpenMP settings for torch's threads. Import this before torch, which reads them once, when it is loaded.

By default OpenMP's threads spin while they wait for work, and two programs that spin on the same cores slow each other
down: on the same two cores, two trainings ran at 3 to 9 cadences/s each with spinning threads, and at 61 to 70 with
sleeping ones. For one training, sleeping cost nothing measurable (docs/performance.md). Variables that the user has set
are kept.
"""

import os

from shard_tools.system.cores import bound_cores, rank_cores

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# OpenMP respects the process's affinity, but not a container's quota or other ranks.
if rank_cores() < bound_cores():
    os.environ.setdefault("OMP_NUM_THREADS", str(rank_cores()))
