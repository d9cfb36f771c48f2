"""What must whoever moves KV bytes be able to do?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Flow(Protocol):
    """One transfer under way."""

    def lift_cap(self) -> None:
        """All its bytes exist now: it may go as fast as the links let it."""

    def cancel(self) -> None:
        """Stop; `on_done` is not called any more."""


class Links(Protocol):
    """What the Conductor asks about the links between nodes, which are named by number."""

    def available_bytes_per_s(self, source: int) -> float:
        """What one more transfer from this node could get of its sending link now."""

    def sent_bytes_per_s(self, node: int) -> float:
        """What the node's sending link carries now."""


class Transport(Links, Protocol):
    """Moves bytes between nodes, over links that all transfers share."""

    def start(
        self,
        source: int,
        target: int,
        size_bytes: float,
        on_done: Callable[[], None],
        cap_bytes_per_s: float | None = None,
    ) -> Flow:
        """Begin to move; `cap_bytes_per_s` is how fast the source produces the bytes."""
