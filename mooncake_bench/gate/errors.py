"""What keeps a gate from giving a verdict?"""


class GateError(ValueError):
    """A policy, a baseline or a run that cannot be used; one line with place and remedy."""


class Invalid(GateError):  # noqa: N818  # a verdict of its own: exit 3
    """Runs that can be read but say nothing about one another; one line with the remedy."""
