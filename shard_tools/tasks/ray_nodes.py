"""The nodes of a Ray cluster, and what each of them has."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray

from shard_tools.tasks.base import Need

DISK = "disk"
"""Name of the custom resource with which a node says how many bytes of temporary files it can hold."""
LOOK_SECONDS = 2.0
"""Time between two looks at the nodes."""
_NODES_SHOWN = 4  # in the progress line
_log = logging.getLogger(__name__)


@dataclass
class Nodes:
    """The nodes of the cluster, as they were at the last look."""

    alive: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What Ray says of each living node, by its id."""
    looked: float = float("-inf")

    def look(self, now: bool = False) -> bool:
        """Ask Ray for the nodes, and log those that are gone; return False, without asking, if this was just done.

        `now`: ask in any case.
        """
        if not now and time.monotonic() - self.looked < LOOK_SECONDS:
            return False
        found = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for gone in self.alive.keys() - found.keys():
            _log.warning("node %s is gone; what it worked on is done again elsewhere", self.name(gone))
        self.alive, self.looked = found, time.monotonic()
        return True

    @property
    def cores(self) -> int:
        """Cores of all living nodes."""
        return int(sum(self._has(node, "CPU") for node in self.alive))

    @property
    def gpus(self) -> int:
        """GPUs of all living nodes."""
        return int(sum(self._has(node, "GPU") for node in self.alive))

    @property
    def cores_of_actor(self) -> int:
        """Cores for a process that holds a GPU: its share of its node's cores. Without GPUs: one."""
        shares = [self._has(node, "CPU") / gpus for node in self.alive if (gpus := self._has(node, "GPU"))]
        return max(1, int(min(shares, default=1)))

    @property
    def actors(self) -> int:
        """How many processes that hold something prepared (ray_starters.py) the cluster has room for; at least one."""
        return max(1, self.gpus or self.cores)

    @property
    def declare_disk(self) -> bool:
        """Whether any node says how much disk it has: if so, only such nodes are given tasks that need disk."""
        return any(self._has(node, DISK) for node in self.alive)

    def fit(self, need: Need) -> list[str]:
        """The nodes that are large enough for a task when nothing else runs on them."""
        disk = need.disk if self.declare_disk else 0
        return [
            node
            for node in self.alive
            if self._has(node, "CPU") >= 1
            and self._has(node, "memory") >= need.memory
            and self._has(node, DISK) >= disk
        ]

    def name(self, node: str) -> str:
        """A node as messages name it: its host and the start of its id."""
        about = self.alive.get(node, {})
        return f"{about.get('NodeManagerHostname', 'unknown')}/{node[:6]}"

    def _has(self, node: str, resource: str) -> float:
        return float(self.alive[node]["Resources"].get(resource, 0))


class NodeCounts:
    """How many calls each node has finished, and how fast."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()
        self._began = time.monotonic()

    def add(self, node: str) -> None:
        """Count one call."""
        self._done[node] += 1

    def describe(self, nodes: int) -> str:
        """The nodes and their rates, the fastest first, in calls a second."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        rates = ", ".join(f"{node} {count / seconds:.3g}/s" for node, count in self._done.most_common(_NODES_SHOWN))
        return f"{nodes} nodes" + (f": {rates}" if rates else "")
