"""The KVCache pool: which blocks are where, and which may be evicted."""
