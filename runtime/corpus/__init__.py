"""Ground millions of queries and videos in shards, on any number of processes."""
