"""Moves bytes by RDMA verbs: `transport.py` is the front, `verbs.py` alone knows pyverbs."""
