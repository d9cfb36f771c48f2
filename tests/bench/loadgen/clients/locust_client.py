"""What does Locust's own client reach, used by hand as well as it can be? A peer of the bench.

    PLAN=plan.json OUT=out.json locust -f locust_client.py --headless -u USERS --host URL

Open loop: one dispatcher spawns a greenlet a request. Closed loop: each user sends in turn.
"""

import json
import os
import time
from itertools import count
from pathlib import Path

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, constant, events, task

PLAN = json.loads(Path(os.environ["PLAN"]).read_text())
now_ns = time.perf_counter_ns
records: list[dict] = []
numbers = count()


class Replay(FastHttpUser):
    wait_time = constant(0)
    concurrency = 5000

    @task
    def replay(self) -> None:
        if "due_s" not in PLAN:
            self.send(next(numbers), now_ns())
            return
        pool = Pool()
        self.send(-1, 0)  # Warm.
        start_ns = now_ns() + 500_000_000
        for rid, due_s in enumerate(PLAN["due_s"]):
            due_ns = start_ns + int(due_s * 1e9)
            if (left_ns := due_ns - now_ns()) > 0:
                gevent.sleep(left_ns / 1e9)
            pool.spawn(self.send, rid, due_ns)
        pool.join()
        self.environment.runner.quit()
        gevent.sleep(3600)

    def send(self, rid: int, due_ns: int) -> None:
        body = {
            "model": "mock",
            "messages": [{"role": "user", "content": "the " * 100}],
            "max_tokens": PLAN["tokens"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record = {"rid": str(rid), "due_ns": due_ns, "sent_ns": now_ns(), "times_ns": []}
        headers = {"Content-Type": "application/json", "X-Request-Id": str(rid)}
        with self.client.post(
            "/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
            stream=True,
            catch_response=True,
        ) as answer:
            while event := answer._response.readline(b"\n\n"):
                at = now_ns()
                if event.startswith(b"data: {"):
                    choices = json.loads(event[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        record["times_ns"].append(at)
                elif b"[DONE]" in event:
                    break
            answer._response.read()  # Or the socket does not go back to the pool.
        records.append(record)


@events.quitting.add_listener
def write(**_: object) -> None:
    Path(os.environ["OUT"]).write_text(json.dumps(records))
