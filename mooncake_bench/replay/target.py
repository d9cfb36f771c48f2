"""Who answers at the URL: which model, is it our cluster, and what does its clock say?

Control calls only (httpx); no load goes through here.
"""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import polars as pl

from mooncake_bench.records import SAMPLES
from mooncake_bench.replay.client import Address
from mooncake_bench.replay.errors import ReplayError

CONTROL_TIMEOUT_S = 10.0
PINGS = 3
TOKEN_VARIABLE = "MOONCAKE_BENCH_TOKEN"
"""Environment variable with the endpoint's bearer token: never a flag, so never in a record."""


class Target(msgspec.Struct, frozen=True):
    """An endpoint that answered. `info` is our cluster's own description, {} of other servers.

    `clock_ahead_s` is the server's clock minus our time.perf_counter(), in seconds, known only of
    our cluster; `clock_error_s` bounds its error (half a round trip).
    """

    url: str
    address: Address
    path: str
    model: str
    info: dict[str, Any] = {}
    clock_ahead_s: float | None = None
    clock_error_s: float = 0.0

    @property
    def host_header(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]


def find_target(url: str, model: str = "") -> Target:
    """Look at the endpoint before any load. Raises ReplayError where nothing usable answers."""
    address, path = _parse(url)
    with _client(url) as http:
        model = model or _first_model(http, url)
        info = _info(http)
        ahead_s, error_s = _compare_clocks(http) if info else (None, 0.0)
    return Target(url, address, path, model, info, ahead_s, error_s)


def fetch_samples(
    target: Target, start: float, after_s: float = -1.0, timeout_s: float = CONTROL_TIMEOUT_S
) -> pl.DataFrame:
    """The cluster's samples later than that, in seconds from `start` (of time.perf_counter).

    Empty for other servers and for one that no longer answers: samples are an extra.
    """
    empty = pl.DataFrame(schema=SAMPLES)
    if target.clock_ahead_s is None:
        return empty
    start_there_s = start + target.clock_ahead_s
    try:
        with _client(target.url) as http:
            after = {"after": repr(start_there_s + max(after_s, -1.0))}
            answer = http.get("cluster/samples", params=after, timeout=timeout_s)
            rows = answer.json()["samples"] if answer.status_code == 200 else []
        frame = pl.DataFrame(rows, schema=SAMPLES, orient="row", strict=False)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return empty
    moved = frame.with_columns(pl.col("time_s") - start_there_s)
    return moved.filter(pl.col("time_s") >= 0.0, pl.col("time_s") > after_s).sort(
        "time_s", maintain_order=True
    )


def authorization() -> dict[str, str]:
    """The header that the endpoint's token makes, if there is a token. Raises ReplayError."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token.isascii() or not token.isprintable():
        raise ReplayError(f"{TOKEN_VARIABLE}: not printable ASCII; set it to the token alone")
    return {"Authorization": f"Bearer {token}"} if token else {}


def control_url(url: str) -> str:
    """The base of the server's own pages: the URL without a last /v1, with a last slash."""
    return url.rstrip("/").removesuffix("/v1") + "/"


def _client(url: str) -> httpx.Client:
    # No proxies from the environment: control calls go where the load goes.
    return httpx.Client(
        base_url=control_url(url),
        timeout=CONTROL_TIMEOUT_S,
        trust_env=False,
        headers=authorization(),
        verify=url.startswith("https:"),  # Reading certificates takes time and memory.
    )


def _parse(url: str) -> tuple[Address, str]:
    """Address and path prefix ("" or like "/prefix") of the URL."""
    remedy = "write it like http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ReplayError(f"--url {url}: {str(error).lower()}; {remedy}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ReplayError(f"--url {url or '(none)'}: no http:// or https:// address; {remedy}")
    is_tls = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, port or (443 if is_tls else 80), is_tls), path


def _first_model(http: httpx.Client, url: str) -> str:
    try:
        answer = http.get("v1/models")
    except httpx.ConnectError as error:
        # The system's words for it: "[Errno 111] Connection refused".
        why = str(error).rpartition("] ")[2].lower() or "connection failed"
        raise ReplayError(
            f"{url}: nothing answers there ({why}); start the server or correct --url"
        ) from None
    except httpx.HTTPError as error:
        raise ReplayError(
            f"{url}: no answer to GET /v1/models ({type(error).__name__}); is it an HTTP server?"
        ) from None
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        if answer.status_code in (401, 403):
            raise ReplayError(
                f"{url}: GET /v1/models answers {answer.status_code}; "
                f"set {TOKEN_VARIABLE} to its token"
            ) from None
        return "default"


def _info(http: httpx.Client) -> dict[str, Any]:
    try:
        answer = http.get("cluster/info")
        value = answer.json() if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return value if isinstance(value, dict) and "system" in value else {}


def _compare_clocks(http: httpx.Client) -> tuple[float | None, float]:
    """The server's clock minus ours, from the quickest of a few pings, and its error bound."""
    best: tuple[float, float] | None = None
    no_rows = {"after": "1e18"}
    for _ in range(PINGS):
        before = time.perf_counter()
        try:
            there_s = float(http.get("cluster/samples", params=no_rows).json()["now_s"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            continue
        after = time.perf_counter()
        error_s = (after - before) / 2
        if best is None or error_s < best[1]:
            best = (there_s - (before + after) / 2, error_s)
    return best if best is not None else (None, 0.0)
