"""From shards to batches on the device: plan, draws, reader, graph, loader."""
