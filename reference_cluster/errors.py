"""What can go wrong that a user can mend? Each message is one line with place and remedy."""

from __future__ import annotations


class ClusterError(Exception):
    """Any operating error of the reference cluster; the command line exits with 2."""


class ConfigError(ClusterError):
    """A configuration file, override or profile that cannot be used."""


class ServeError(ClusterError):
    """The live cluster cannot start: a port in use, an address that needs a token."""
