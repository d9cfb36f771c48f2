"""How do tests reach a live cluster? A real server on a free port, in a thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import uvicorn

from reference_cluster.api import Front
from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.launch.local import LocalWorkers
from reference_cluster.serve import listen
from tests.reference_cluster.small import a_profile, held

# An emulated machine takes longer for everything.
WAIT_S = float(os.environ.get("TEST_WAIT_S", "10"))
FAST = a_profile(
    prefill={"base_s": 0.002, "token_s": 1e-6}, decode={"base_s": 0.001}, link_bytes_per_s=1e9
)
# Nothing ends by itself within a test: prefills last 0.3 s, decodes 20 s.
SLOW = a_profile(prefill={"base_s": 0.3}, decode={"base_s": 0.02})


@contextmanager
def live(
    config: ClusterConfig, profile: Profile = FAST, token: str | None = None
) -> Iterator[tuple[httpx.Client, Front]]:
    """A server and a client of it. At the end everything must have been given back."""
    with ExitStack() as stack:
        directory = None
        if config.workers.placement == "processes":
            directory = stack.enter_context(LocalWorkers(config, profile)).directory
        yield from serving(Front(config, profile, token, directory))


def serving(front: Front) -> Iterator[tuple[httpx.Client, Front]]:
    listening = listen("127.0.0.1", 0)
    settings = uvicorn.Config(front.app(), loop="asyncio", log_level="critical", lifespan="on")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=20.0) as client:
            yield client, front
            wait_until(lambda: not still_held(front.cluster), lambda: still_held(front.cluster))
            front.cluster.check_integrity()
            headers = {"authorization": f"Bearer {front.token}"}
            wait_until(lambda: not problems(client, headers), lambda: problems(client, headers))
    finally:
        server.should_exit = True
        thread.join(10.0)
        listening.close()
    assert not thread.is_alive()


def problems(client: httpx.Client, headers: dict[str, str]) -> list[str]:
    """What the instances, wherever they are, find wrong with their books; and what they hold."""
    found = client.get("/cluster/integrity", headers=headers).json()["problems"].values()
    info = client.get("/cluster/info", headers=headers).json()
    busy = ("requests", "pinned_blocks", "lent", "coming")
    workers = [
        f"{row['name']} {row['state']} {key}={row[key]}"
        for row in info["workers"]
        for key in busy
        if row.get(key)
    ]
    return [*filter(None, found), *workers]


def still_held(cluster: Cluster) -> list[str]:
    """What instances in this process hold, or what the mirrors of others think these do."""
    if cluster.directory is None:
        return held(cluster)
    found = {f"{len(cluster.in_flight)} requests in flight": bool(cluster.in_flight)}
    for prefill in cluster.prefill:
        found[f"{prefill.name} has {prefill.requests}"] = bool(prefill.requests or prefill.queue)
        found[f"{prefill.name} runs"] = prefill.running is not None
        found[f"{prefill.name} predicts"] = prefill.backlog_s != 0.0
        found[f"{prefill.name} promises"] = bool(prefill.promised)
    for one in [*cluster.decode, *cluster.colocated]:
        found[f"{one.name} decodes"] = bool(one.batch.members or one.batch.context_tokens)
        found[f"{one.name} makes {one.waiting} wait"] = bool(one.waiting)
    for one in cluster.decode:
        expects = one.expected or one.expected_tokens or one.expected_kv_tokens
        found[f"{one.name} expects {expects}"] = bool(expects)
    for one in cluster.colocated:
        found[f"{one.name} predicts"] = bool(one.predicted_s)
        found[f"{one.name} has {one.started}"] = bool(one.started)
    return [what for what, is_so in found.items() if is_so]


def wait_until(is_so: Any, else_say: Any = lambda: "", within_s: float = WAIT_S) -> None:
    end_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end_s, f"it never happened: {else_say()}"
        time.sleep(0.005)
