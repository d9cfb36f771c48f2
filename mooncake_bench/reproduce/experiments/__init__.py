"""The experiments, a module for each kind."""
