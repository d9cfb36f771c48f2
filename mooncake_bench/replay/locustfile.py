"""How is a trace replayed under Locust?

locust -f mooncake_bench/replay/locustfile.py --headless --processes 2 \\
    --url http://127.0.0.1:8000 --trace conversation_trace.jsonl --out runs/one
"""

from __future__ import annotations

import locust  # noqa: F401  # first: it patches the standard library for gevent

from mooncake_bench.replay.users import TraceReplay

__all__ = ["TraceReplay"]
