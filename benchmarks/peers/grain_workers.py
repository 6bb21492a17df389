"""Grain with worker processes, which pass whole batches on in shared memory."""

import grain

from benchmarks.peers.dataloader import one_thread
from benchmarks.peers.grain_dataset import Epochs, batches_of
from benchmarks.peers.spec import BATCHES_AHEAD, Loading, Spec


def build(spec: Spec, workers: int) -> Loading:
    """One thread in each process: several would wait for its Python lock."""
    batches = batches_of(spec).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD)
    # Each process fills a queue; a thread of this process empties it into another. The rest is under way between them.
    ahead = workers * (2 * BATCHES_AHEAD + 3)
    epochs = Epochs(batches.mp_prefetch(options, worker_init_fn=one_thread), spec, ahead)
    return Loading(epochs, settle=epochs.settle, close=epochs.close)
