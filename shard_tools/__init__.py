"""From labels and snippet files to shards: simulate, pack, verify, look inside."""

from shard_tools.library_caches import place_library_caches

place_library_caches()  # before anything imports what needs them
