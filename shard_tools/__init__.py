"""From labels and snippet files to shards: simulate, pack, verify, inspect."""

from shard_tools.system.library_caches import place_library_caches

place_library_caches()  # before any import of the libraries that need them
