"""What can a user get wrong about a plan?"""


class PlanError(ValueError):
    """A plan's file or its limits cannot be used; the message is one line with the remedy."""
