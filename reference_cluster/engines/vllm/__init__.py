"""vLLM as the engine: its workers keep and hand on KV through our pool and transports.

Read `planner.py` (what vLLM's scheduler is told of the pool), `store.py` (where the bytes lie),
`mover.py` (how they come), then `connector.py`, which vLLM loads by the name of its module. Only
that one and `worker.py` import vLLM.
"""
