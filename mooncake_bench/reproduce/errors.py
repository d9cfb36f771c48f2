"""What can a user get wrong about reproduce?"""


class ReproduceError(ValueError):
    """A figure or a directory that cannot be used; the message is one line with the remedy."""
