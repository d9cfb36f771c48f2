"""How is the live cluster started? The cluster of `simulate` on the real clock, behind HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn

from reference_cluster.api import Front
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.errors import ServeError


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
    listening = listen(host, port)
    settings = uvicorn.Config(
        Front(config, profile, token).app(),
        # uvloop's clock ticks in milliseconds, too coarse for stamps; asyncio's is exact.
        loop="asyncio",
        http="httptools",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    on_listening(f"http://{host}:{listening.getsockname()[1]}")
    uvicorn.Server(settings).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises ServeError."""
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
        remedy = "stop what listens there or give another --port"
        raise ServeError(f"{host}:{port}: {error.strerror}; {remedy}") from None
    return listening
