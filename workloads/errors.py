"""What can be wrong with a workload?"""


class TraceError(ValueError):
    """A trace, or a wish about one, that cannot be used: one line with place and remedy."""
