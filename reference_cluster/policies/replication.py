"""Which blocks should every prefill instance hold? The ones that are asked for most."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from reference_cluster.request import Block


def hottest(uses: Mapping[Block, int], count: int) -> list[Block]:
    """The `count` most used blocks that were used twice or more, the most used first.

    Of equals the one that was seen first goes first: the beginnings of prefixes before their ends.
    """
    used = [(uses_of, -place, block) for place, (block, uses_of) in enumerate(uses.items())]
    candidates = (one for one in used if one[0] > 1)
    return [block for _, _, block in heapq.nlargest(count, candidates, key=lambda one: one[:2])]
