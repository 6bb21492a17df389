"""WebDataset and its WebLoader, over the same tars."""

import torch
import webdataset as wds
from torch import Tensor

from benchmarks.bench_data import shard_urls
from benchmarks.peers.dataloader import Epochs, loader_options
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import snippet_of, transformed

_SHUFFLE_BUFFER = 64  # samples; about 50 MB per worker


def build(spec: Spec, workers: int) -> Loading:
    """The workers make whole batches, as its documentation advises; sending samples between processes is slow."""

    def to_sample(sample: dict[str, bytes]) -> tuple[str, Tensor]:
        return str(sample["__key__"]), transformed(snippet_of(sample["npy"]), spec.workload)

    def to_batch(samples: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
        keys, images = torch.utils.data.default_collate(samples)
        return list(keys), images

    urls = shard_urls(spec)
    # Shards are shared out among the workers, each of which reads its own from one end to the other.
    dataset = wds.WebDataset(urls, shardshuffle=len(urls) if spec.shuffles else False, empty_check=False)
    if spec.shuffles:
        dataset = dataset.shuffle(_SHUFFLE_BUFFER)
    # Not .decode(): it goes through np.load of a stream, which copies the values twice.
    dataset = dataset.map(to_sample).batched(spec.batch_size, collation_fn=to_batch)
    options = loader_options(spec, workers)
    loader = wds.WebLoader(dataset, batch_size=None, **options)
    return Loading(Epochs(loader, spec))
