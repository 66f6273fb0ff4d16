"""KV caches of unrotated keys, dense and paged."""
