"""How is the live cluster started? The cluster of `simulate` on the real clock, behind HTTP.

`[workers] placement` says where its instances are: each in a process of its own, beside one of the
Conductor (which this module is when run: python -m reference_cluster.serve), or all in one.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn

from reference_cluster.api import Front
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.errors import ServeError
from reference_cluster.launch.local import Supervisor
from reference_cluster.launch.process import die_with_parent, read_cluster

DRAIN_S_MAX = 3  # For what is being served when the server is told to end.


def serve(
    config: ClusterConfig,
    profile: Profile,
    host: str,
    port: int,
    token: str | None,
    on_listening: Callable[[str], None],
) -> None:
    """Serve until interrupted. Port 0 takes a free one; `on_listening` is told the URL.

    Raises ServeError where the port is taken, or the address is not this machine's own and no
    token protects it.
    """
    if not is_loopback(host) and not token:
        raise ServeError(f"host {host} is open to others; give --token, or use 127.0.0.1")
    for address in (config.conductor.publish_events, config.conductor.replay_events):
        if address is not None and not address.endswith("*"):
            # Said here, in a line, rather than by a process that does not start.
            event_port = int(address.rpartition(":")[2])
            listen("127.0.0.1", event_port, "another [conductor] address").close()
    with listen(host, port) as listening:
        url = f"http://{host}:{listening.getsockname()[1]}"
        if config.workers.placement == "processes":
            supervisor = Supervisor(config, profile, listening, token)
            supervisor.run(lambda: on_listening(url))
        else:
            on_listening(url)
            run_front(Front(config, profile, token), listening)


def run_front(front: Front, listening: socket.socket) -> None:
    """Answer HTTP in this process until it is told to end."""
    settings = uvicorn.Config(
        front.app(),
        # uvloop's clock ticks in milliseconds, too coarse for stamps; asyncio's is exact.
        loop="asyncio",
        http="httptools",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S_MAX,
    )
    uvicorn.Server(settings).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int, instead: str = "another --port") -> socket.socket:
    """A bound socket; raises ServeError, which tells what to give instead."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it; without it an answer can wait 40 ms for the client's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        remedy = f"stop what listens there or give {instead}"
        raise ServeError(f"{host}:{port}: {error.strerror}; {remedy}") from None
    return listening


def main() -> None:
    """The Conductor's process, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="reference_cluster.serve", description=__doc__)
    parser.add_argument("--directory", required=True, help="where the cluster's processes meet")
    parser.add_argument("--parent", type=int, required=True, help="the process to die with")
    parser.add_argument("--listen", type=int, required=True, help="descriptor of a bound socket")
    parser.add_argument("--tell", type=int, required=True, help="descriptor to say on: ready")
    asked = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="conductor: %(message)s")
    die_with_parent(asked.parent)
    config, profile = read_cluster(asked.directory)
    token = os.environ.get("MOONCAKE_BENCH_TOKEN")
    front = Front(config, profile, token, asked.directory)
    front.on_ready = lambda: os.write(asked.tell, b"ready")
    run_front(front, socket.socket(fileno=asked.listen))


if __name__ == "__main__":
    main()
