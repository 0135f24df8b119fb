"""KV caches: keys and values of past tokens."""
