"""What stops a replay before or after it has run, in one line with place and remedy."""

from __future__ import annotations


class ReplayError(ValueError):
    """Bad input to a replay: an endpoint that is down, a flag that cannot be; one line."""
