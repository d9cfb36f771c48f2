"""What bytes does the KV of a modelled engine have? A pattern that only block and layer decide.

So any holder of a block can verify it, and a block in the wrong place, of the wrong layer, or with
two words that changed places, is seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]
GOLDEN, MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
MASK = (1 << 64) - 1


class Pattern:
    """Word w of layer i of block k is `mixed(k, i) + w`, modulo 2**64."""

    def __init__(self, layers: int, layer_bytes: int) -> None:
        assert layer_bytes % 8 == 0
        self.layers = layers
        self.ramp: Words = np.arange(layer_bytes // 8, dtype=np.uint64)
        self.expected: Words = np.empty(layer_bytes // 8, dtype=np.uint64)

    def write(self, key: int, layer: int, place: memoryview) -> None:
        """Compute one layer of a block."""
        words = np.frombuffer(place, dtype=np.uint64)
        np.add(self.ramp, np.uint64(mixed(key, layer)), out=words)

    def is_right(self, key: int, block: memoryview) -> bool:
        """Has a whole block, all its layers, the bytes it must have?"""
        words = np.frombuffer(block, dtype=np.uint64).reshape(self.layers, -1)
        for layer in range(self.layers):
            np.add(self.ramp, np.uint64(mixed(key, layer)), out=self.expected)
            if not np.array_equal(words[layer], self.expected):
                return False
        return True


def mixed(key: int, layer: int) -> int:
    """A word in which every bit depends on all of key and layer (after splitmix64)."""
    word = (key + (layer + 1) * GOLDEN) & MASK
    word = ((word ^ (word >> 30)) * MIX) & MASK
    return word ^ (word >> 27)
