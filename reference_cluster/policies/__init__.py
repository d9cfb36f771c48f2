"""Pure decisions: no await, clock, I/O or logging; the same live and simulated."""
