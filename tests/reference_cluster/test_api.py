"""Does the live front serve OpenAI's clients, say no properly, and notice who has left?

A real server on a free port, in a thread, with profiles that take milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from reference_cluster.api import BODY_BYTES_MAX, Front
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.errors import ServeError
from reference_cluster.policies.batching import Chunk
from reference_cluster.samples import SAMPLE_COLUMNS
from reference_cluster.serve import listen, serve
from tests.reference_cluster.live import FAST, SLOW, live, wait_until
from tests.reference_cluster.small import a_config, write_profile

REPO = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.live, pytest.mark.timeout(60)]
BOTH = ["disaggregated", "colocated"]
PLACEMENTS = ["inside", "processes"]


@pytest.fixture(scope="module", params=[(one, place) for one in BOTH for place in PLACEMENTS])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[httpx.Client, Front]]:
    """One server of each system, in one process and in many, for tests that break nothing."""
    memory = {"device_tokens": 10_000}
    system, placement = request.param
    config = a_config(
        system=system,
        workers={"placement": placement},
        prefill_instances=2,
        colocated={"prefix_caching": True, **memory},
        decode=memory,
        sample_every_s=0.05,
    )
    with live(config) as both:
        yield both


@pytest.fixture
def client(server: tuple[httpx.Client, Front]) -> httpx.Client:
    return server[0]


PROMPT = list(range(1000, 1040))
OPTIONS = {"include_usage": True, "include_timeline": True}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 5, **fields}


def chat(*words: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": 5, **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; its last is [DONE]."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# ---- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_a_completion_streams_an_event_a_token(client: httpx.Client, max_tokens: int) -> None:
    """As many as were asked for; the last one carries the reason."""
    body = completion(stream=True, max_tokens=max_tokens, model="any")
    found = events(client.post("/v1/completions", json=body))
    reasons = [event["choices"][0]["finish_reason"] for event in found]
    assert reasons == [None] * (max_tokens - 1) + ["length"]
    assert all(event["choices"][0]["text"] for event in found)
    assert {event["object"] for event in found} == {"text_completion"}
    assert {event["model"] for event in found} == {"any"}
    assert len({event["id"] for event in found}) == 1


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_chat_streams_a_role_and_then_tokens(client: httpx.Client, max_tokens: int) -> None:
    """The role comes with no content and is no token."""
    body = chat("a", "b", stream=True, max_tokens=max_tokens)
    role, *tokens = events(client.post("/v1/chat/completions", json=body))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(tokens) == max_tokens
    assert all(event["choices"][0]["delta"]["content"] for event in tokens)
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"
    assert role["object"] == "chat.completion.chunk"


def test_a_whole_completion(client: httpx.Client) -> None:
    """Text of 7 tokens, and what it cost."""
    answer = client.post("/v1/completions", json=completion(max_tokens=7)).json()
    assert len(answer["choices"][0]["text"].split()) == 7
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 40
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["usage"]["total_tokens"] == 47
    assert "timeline" not in answer


def test_a_whole_chat(client: httpx.Client) -> None:
    """One message of the assistant's; the prompt has a token a word."""
    answer = client.post("/v1/chat/completions", json=chat("one", "two  three\n", "four")).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert len(answer["choices"][0]["message"]["content"].split()) == 5
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["object"] == "chat.completion"


def test_usage_tells_what_was_cached(client: httpx.Client) -> None:
    """The same 40 tokens again: all but the last are reused."""
    body = completion(stream=True, stream_options=OPTIONS, prompt=[*range(7000, 7040)])
    cached = []
    for _ in range(2):
        last = events(client.post("/v1/completions", json=body))[-1]
        assert last["choices"] == []
        cached.append(last["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 39]


STAMPS = (
    "placed_s",
    "fetched_s",
    "prefill_start_s",
    "prefill_end_s",
    "transferred_s",
    "first_token_s",
    "decode_start_s",
    "finished_s",
)


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeline_tells_what_happened_when(client: httpx.Client, stream: bool) -> None:
    """In seconds since the receipt, in order, with the places and predictions."""
    body = completion(stream=stream, stream_options=OPTIONS)
    response = client.post("/v1/completions", json=body)
    found = events(response)[-1] if stream else response.json()
    timeline = found["timeline"]
    stamps = [timeline[name] for name in STAMPS]
    assert stamps == sorted(stamps)
    assert stamps[0] >= 0.0
    assert timeline["prefill_busy_s"] > 0.0
    assert timeline["predicted_ttft_s"] > 0.0
    assert timeline["predicted_tbt_s"] > 0.0
    assert timeline["fetched_tokens"] == 0
    assert timeline["chunks"] == []
    if timeline["prefill"] != timeline["decode"]:
        assert 0.0 < timeline["transfer_start_s"] <= timeline["transferred_s"]
    assert timeline["prefill"].split("-")[0] in ("prefill", "colocated")
    assert timeline["decode"].split("-")[0] in ("decode", "colocated")


def test_a_stream_without_options_has_neither_usage_nor_timeline(client: httpx.Client) -> None:
    """As OpenAI's."""
    found = events(client.post("/v1/completions", json=completion(stream=True)))
    assert not any("usage" in event or "timeline" in event for event in found)


def test_many_at_once_are_all_served(client: httpx.Client) -> None:
    """40 streams at the same time, each with its own number of tokens."""
    url = str(client.base_url)

    async def main() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=20.0) as many:
            bodies = [completion(stream=True, max_tokens=1 + n, prompt=[n] * 25) for n in range(40)]
            answers = [many.post("/v1/completions", json=body) for body in bodies]
            return [len(events(answer)) for answer in await asyncio.gather(*answers)]

    assert asyncio.run(main()) == [1 + n for n in range(40)]


# ---- looking at it ---------------------------------------------------------------------------


def test_models_health_and_info(client: httpx.Client, server: tuple[httpx.Client, Front]) -> None:
    """What clients and tools ask first."""
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small"]
    assert client.get("/health").status_code == 200
    info = client.get("/cluster/info").json()
    assert info["source"] == "live-modelled"
    assert info["system"] == info["config"]["system"] == server[1].config.system
    assert info["profile"] == {"name": "small", "source": "a test", "error": "none"}


def test_samples_are_on_the_servers_clock(client: httpx.Client) -> None:
    """Rows of SAMPLE_COLUMNS, none of them later than now."""
    wait_until(lambda: client.get("/cluster/samples").json()["samples"])
    answer = client.get("/cluster/samples").json()
    assert all(len(row) == len(SAMPLE_COLUMNS) for row in answer["samples"])
    assert all(0.0 <= row[0] <= answer["now_s"] for row in answer["samples"])
    names = {row[1] for row in answer["samples"]}
    assert names in ({"prefill-0", "prefill-1", "decode-0"}, {"colocated-0"})


def test_samples_of_before_can_be_left_out(client: httpx.Client) -> None:
    """With `after` only later ones come; what is no number is told so."""
    wait_until(lambda: len(client.get("/cluster/samples").json()["samples"]) > 6)
    first_s = client.get("/cluster/samples").json()["samples"][0][0]
    later = client.get("/cluster/samples", params={"after": repr(first_s)}).json()["samples"]
    assert later
    assert all(row[0] > first_s for row in later)
    assert client.get("/cluster/samples", params={"after": "noon"}).status_code == 400


def test_metrics_have_vllms_names(client: httpx.Client) -> None:
    """Where the meaning is the same; and they count."""
    client.post("/v1/completions", json=completion())
    text = client.get("/metrics").text
    for name in (
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_sum",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "vllm:request_time_per_output_token_seconds_count",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "mooncake_bench_conductor_decisions_total",
        "mooncake_bench_engine_lag_seconds_max",
    ):
        assert any(line.startswith(name + "{") for line in text.splitlines()), name
    success = next(line for line in text.splitlines() if "request_success_total{" in line)
    assert float(success.split()[-1]) >= 1


# ---- saying no -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/completions", b"{"),
        ("/v1/completions", b"\xff\xfe"),
        ("/v1/completions", b"{}"),
        ("/v1/completions", b'{"prompt": [1], "n": 2}'),
        ("/v1/completions", b'{"prompt": [1], "max_tokens": 0}'),
        ("/v1/completions", b'{"prompt": [-1]}'),
        ("/v1/chat/completions", b'{"messages": []}'),
    ],
)
def test_bad_requests_are_400(client: httpx.Client, path: str, content: bytes) -> None:
    """With OpenAI's error object."""
    response = client.post(path, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["message"]


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    """404 and 405."""
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/completions").status_code == 405


def test_an_oversized_body_is_413(client: httpx.Client) -> None:
    """Read no further than the limit."""
    response = client.post("/v1/completions", content=b" " * (BODY_BYTES_MAX + 1))
    assert response.status_code == 413


def test_a_prompt_that_fits_nowhere_is_400(client: httpx.Client) -> None:
    """Trying again would not help: no Retry-After."""
    response = client.post("/v1/completions", json=completion(prompt=[1] * 10_001))
    assert response.status_code == 400
    assert response.json()["error"]["reason"] == response.headers["x-rejection-reason"]
    assert response.headers["x-rejection-reason"] == "too-large"
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("admission", "slo", "reason"),
    [
        ("early-rejection", {"ttft_s": 1e-6, "tbt_s": 1.0}, "ttft"),
        ("early-rejection", {"ttft_s": 1.0, "tbt_s": 1e-6}, "tbt"),
        ("load-based", {"ttft_s": 1.0, "tbt_s": 1e-6}, "tbt-at-decode"),
    ],
)
def test_an_early_rejection_is_429(
    stream: bool, admission: str, slo: dict[str, float], reason: str
) -> None:
    """With the reason in header and body, and when to try again; even after the prefill."""
    config = a_config(conductor={"admission": admission}, slo=slo)
    with live(config) as (client, front):
        response = client.post("/v1/completions", json=completion(stream=stream))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-rejection-reason"] == reason
        problem = response.json()["error"]
        assert (problem["type"], problem["code"]) == ("early_rejection", 429)
        assert problem["reason"] == reason
        assert front.cluster.counts == {"rejected": 1}
        line = f'mooncake_bench_conductor_rejections_total{{model_name="small",reason="{reason}"}}'
        assert f"{line} 1.0" in client.get("/metrics").text


def test_a_token_is_asked_for_where_one_is_set() -> None:
    """Not for the health check, which tells nothing."""
    with live(a_config(), token="secret") as (client, _):
        paths = ("/v1/models", "/metrics", "/cluster/info", "/cluster/samples")
        assert [client.get(path).status_code for path in paths] == [401] * 4
        assert client.post("/v1/completions", json=completion()).status_code == 401
        wrong = {"authorization": "Bearer wrong"}
        assert client.get("/v1/models", headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        response = client.post("/v1/completions", json=completion(), headers=right)
        assert response.status_code == 200
        assert client.get("/health").status_code == 200


# ---- clients that leave ----------------------------------------------------------------------


def hang_up_after(client: httpx.Client, body: dict[str, Any], until: Sequence[bytes]) -> None:
    """Send a request on a socket of its own, read until all of `until` has come, and close."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    address = (client.base_url.host, client.base_url.port or 80)
    with socket.create_connection(address, timeout=10.0) as connection:
        connection.sendall(head.encode() + content)
        received = b""
        while not all(part in received for part in until):
            received += connection.recv(65536)


@pytest.mark.parametrize("system", BOTH)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["in its prefill", "in its decode"])
def test_a_client_that_leaves_frees_all(
    system: str, placement: str, stream: bool, when: str
) -> None:
    """The request fails and its blocks are free (`live` checks), long before it would have ended.

    A client that wants no stream has nothing to read: it leaves when the cluster decodes.
    """
    workers = {"placement": placement}
    config = a_config(system=system, colocated={"prefix_caching": True}, workers=workers)
    with live(config, SLOW) as (client, front):
        body = completion(stream=stream, max_tokens=1000)
        if when == "in its decode" and stream:
            hang_up_after(client, body, until=[b"data: ", b" the"])
        elif when == "in its decode":
            leaving = threading.Thread(target=leave_after, args=(client, body, 0.6))
            leaving.start()
            wait_until(lambda: any(one.batch.size for one in batches(front)))
            leaving.join()
        else:
            hang_up_after(client, body, until=[])
        wait_until(lambda: front.cluster.counts)
        assert front.cluster.counts == {"failed": 1}
        assert 'reason="client disconnected"} 1.0' in client.get("/metrics").text


def batches(front: Front) -> list[Any]:
    return [*front.cluster.decode, *front.cluster.colocated]


def leave_after(client: httpx.Client, body: dict[str, Any], wait_s: float) -> None:
    """A client that wants its answer whole and gives up."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(client.base_url.join("/v1/completions"), json=body, timeout=wait_s)


def test_others_are_served_after_somebody_left() -> None:
    """The instance stops computing for who has gone at the next boundary, and goes on."""
    with live(a_config(), SLOW) as (client, front):
        hang_up_after(client, completion(stream=True, max_tokens=1000), until=[b"data: "])
        response = client.post("/v1/completions", json=completion(max_tokens=2))
        assert response.status_code == 200
        wait_until(lambda: front.cluster.counts.total() == 2)
        assert front.cluster.counts == {"failed": 1, "finished": 1}


# ---- when it breaks, and how it starts -------------------------------------------------------


class Broken(ModelledEngine):
    """An engine with a bug."""

    async def prefill(self, start_s: float, chunk: Chunk) -> float:
        raise ZeroDivisionError


def test_a_stopped_cluster_is_not_healthy() -> None:
    """A crash inside must not look like a server that takes its time."""
    front = Front(a_config(), FAST)

    async def main() -> list[int]:
        app = front.app()
        transport = httpx.ASGITransport(app)
        async with (
            front.lifespan(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            codes = [(await client.get("/health")).status_code]
            prefill = front.cluster.prefill[0]
            prefill.engine = Broken(prefill.cost)
            first = asyncio.create_task(client.post("/v1/completions", json=completion()), name="1")
            await asyncio.wait_for(asyncio.shield(wait_for_crash(front)), 10.0)
            codes.append((await asyncio.wait_for(first, 10.0)).status_code)
            codes.append((await client.get("/health")).status_code)
            codes.append((await client.post("/v1/completions", json=completion())).status_code)
            return codes

    assert asyncio.run(main()) == [200, 500, 503, 500]


async def wait_for_crash(front: Front) -> None:
    while not front.serving.done():  # noqa: ASYNC110  # nothing tells of it but the task
        await asyncio.sleep(0.005)


def test_a_port_in_use_is_a_one_line_error() -> None:
    """With the address and the remedy."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port}: .*another --port"):
            serve(a_config(), FAST, "127.0.0.1", port, None, on_listening=fail)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.test"])
def test_an_open_address_needs_a_token(host: str) -> None:
    """Without one nothing is opened."""
    with pytest.raises(ServeError, match=r"open to others.*--token"):
        serve(a_config(), FAST, host, 0, None, on_listening=fail)


def fail(url: str) -> None:
    pytest.fail(f"it listens at {url}")


def test_serve_takes_a_free_port_and_ends_when_interrupted(tmp_path: Path) -> None:
    """The whole of `serve` in a process of its own, with a profile from a file."""
    profile = write_profile(tmp_path / "fast.toml", FAST)
    code = (
        "import sys\n"
        "from reference_cluster.config import ClusterConfig\n"
        "from reference_cluster.cost_model import load_profile\n"
        "from reference_cluster.serve import serve\n"
        "def tell(url): sys.stdout.write(url + '\\n'); sys.stdout.flush()\n"
        "config = ClusterConfig(prefill_instances=1, decode_instances=1)\n"
        f"serve(config, load_profile({str(profile)!r}), '127.0.0.1', 0, None, tell)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.post(f"{url}/v1/completions", json=completion()).status_code == 200
        process.send_signal(2)
        assert process.wait(10.0) in (0, 130, -2)
    finally:
        process.kill()
        process.communicate()
