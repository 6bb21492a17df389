"""From labels and snippet files to shards: simulate, pack, verify, look inside."""
