"""A paged Llama in plain torch: real tokens, and the real bytes of their KV.

Read it in the order of a step: `scheduler.py` (who takes part), `llama.py` (the forward pass),
`attention.py`, `pages.py` (where KV lies), `sampling.py` (the next token). `architecture.py` and
`weights.py` say what is computed with what, `blocks.py` how KV becomes bytes that others can read.
In a live worker `engine.py` is in the scheduler's place: what an instance decides it does to the
`sequences.py` of its rank, and tells the other ranks (`ranks.py`).
"""
