"""What moves KVCache blocks, or models the time it takes."""
