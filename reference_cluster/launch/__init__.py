"""How the processes of a live cluster are started, and ended."""
