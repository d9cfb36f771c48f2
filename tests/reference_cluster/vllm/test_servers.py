"""vLLM servers behind the Conductor, tried with servers that only look like vLLM."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import msgspec
import pytest

from reference_cluster.blocks import prefix_hashes
from reference_cluster.config import ClusterConfig, load_config
from reference_cluster.errors import ConfigError
from tests.reference_cluster.live import live, wait_until
from tests.reference_cluster.small import a_profile
from tests.reference_cluster.vllm.fake import Fake, answer_to, fakes

pytestmark = pytest.mark.live
BLOCK = 10
PROMPT = list(range(100, 135))
QUICK = a_profile(
    prefill={"base_s": 0.002, "token_s": 1e-6}, decode={"base_s": 0.001}, link_bytes_per_s=1e9
)


def a_config(servers: list[Fake], prefill: int = 1, **fields: Any) -> ClusterConfig:
    """The first `prefill` servers compute prompts, the others decode; 0: all do both."""
    vllm = {
        "urls": [one.url for one in servers],
        "kv_bytes": 10_000_000,
        "dead_after_s": 1.0,
        "answer_s_max": 5.0,
    }
    given: dict[str, Any] = {
        "system": "disaggregated" if prefill else "colocated",
        "prefill_instances": prefill or 1,
        "decode_instances": len(servers) - prefill,
        "colocated_instances": len(servers),
        "block_tokens": BLOCK,
        "engine": {"kind": "vllm"},
        "workers": {"heartbeat_s": 0.05},
        "slo": {"ttft_s": 10.0, "tbt_s": 5.0},
    }
    given |= {key: value for key, value in fields.items() if key != "vllm"}
    return msgspec.convert({**given, "vllm": vllm | fields.get("vllm", {})}, ClusterConfig)


def ask(client: httpx.Client, prompt: list[int] = PROMPT, tokens: int = 8) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens})


def said(answer: httpx.Response) -> list[int]:
    """The tokens of a whole answer, whose text says their numbers."""
    assert answer.status_code == 200, answer.text
    return [int(word) for word in answer.json()["choices"][0]["text"].split()]


def streamed(
    client: httpx.Client, tokens: int, prompt: list[int] = PROMPT
) -> tuple[list[int], str]:
    """The tokens of a stream, and its last line."""
    found, last = [], ""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in filter(None, answer.iter_lines()):
            last = line
            event = msgspec.json.decode(line[6:]) if line.startswith("data: {") else {}
            for choice in event.get("choices", []):
                assert choice["text"]
                found += map(int, choice["text"].split())
    return found, last


def test_a_prompt_is_prefilled_by_one_server_and_decoded_by_another():
    """The first is asked for one token; what it says of the KV goes to the second unchanged."""
    with fakes(2) as (prefill, decode), live(a_config([prefill, decode]), QUICK) as (client, _):
        assert streamed(client, 8) == (answer_to(PROMPT, 8), "data: [DONE]")
        assert [(one["max_tokens"], one["prompt"]) for one in prefill.asked] == [(1, PROMPT)]
        (asked,) = decode.asked
        given = {"from": prefill.port, "first": answer_to(PROMPT, 1)[0]}
        assert (asked["max_tokens"], asked["kv_transfer_params"]) == (8, given)
        assert said(ask(client)) == answer_to(PROMPT, 8)


def test_one_token_needs_no_decode_server():
    """The prefill server's own is the answer."""
    with fakes(2) as (prefill, decode), live(a_config([prefill, decode]), QUICK) as (client, _):
        assert said(ask(client, tokens=1)) == answer_to(PROMPT, 1)
        assert streamed(client, 1) == (answer_to(PROMPT, 1), "data: [DONE]")
        assert not decode.asked


def test_what_would_miss_its_slo_is_refused_before_any_server_hears_of_it():
    """429 with the reason; the profile says 2 ms for the prompt, the SLO 1 ms."""
    conductor = {"admission": "early-rejection"}
    with fakes(2) as servers:
        config = a_config(servers, conductor=conductor, slo={"ttft_s": 0.001, "tbt_s": 5.0})
        with live(config, QUICK) as (client, _):
            answer = ask(client)
            assert (answer.status_code, answer.headers["x-rejection-reason"]) == (429, "ttft")
            assert ask(client, tokens=200_000).status_code == 400
        assert not any(one.asked for one in servers)


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_client_that_hangs_up_is_heard_by_the_servers(where):
    """Both connections close; the books are empty again (which `live` looks at)."""
    with fakes(2, step_s=0.05) as (prefill, decode):
        prefill.prefill_s = 20.0 if where == "prefill" else 0.0
        busy = prefill if where == "prefill" else decode
        with live(a_config([prefill, decode]), QUICK) as (client, _):
            body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
            timeout = httpx.Timeout(0.3 if where == "prefill" else 10)
            try:
                with client.stream("POST", "/v1/completions", json=body, timeout=timeout) as one:
                    next(one.iter_lines())
            except httpx.ReadTimeout:
                assert where == "prefill"
            wait_until(lambda: len(busy.asked) == 1 and not busy.under_way)


def test_a_prompt_goes_to_another_server_when_its_own_is_killed():
    """Before its first token nobody notices."""
    with fakes(3) as (first, second, decode):
        first.prefill_s = second.prefill_s = 0.5
        with live(a_config([first, second, decode], prefill=2), QUICK) as (client, front):
            killing = threading.Timer(0.2, lambda: (first if first.asked else second).kill())
            killing.start()
            assert said(ask(client)) == answer_to(PROMPT, 8)
            killing.join()
            assert front.cluster.recovery.counts["replaced"] == 1
            assert sorted(map(len, (first.asked, second.asked))) == [1, 1]


def test_a_stream_goes_on_at_another_server_when_its_own_is_killed():
    """The rest is asked for with the prompt and what was said so far."""
    with fakes(3, step_s=0.02) as servers, live(a_config(servers), QUICK) as (client, front):
        _, first, second = servers
        killing = threading.Timer(0.3, lambda: (first if first.asked else second).kill())
        killing.start()
        assert streamed(client, 40) == (answer_to(PROMPT, 40), "data: [DONE]")
        killing.join()
        assert front.cluster.recovery.counts["resumed"] == 1


def test_a_stream_that_nobody_can_go_on_with_breaks_with_a_reason():
    """The only decode server is lost: an error event, and no [DONE]."""
    with fakes(2, step_s=0.02) as (prefill, decode):
        slo = {"ttft_s": 0.3, "tbt_s": 5.0}
        with live(a_config([prefill, decode], slo=slo), QUICK) as (client, _):
            killing = threading.Timer(0.2, decode.kill)
            killing.start()
            tokens, last = streamed(client, 500)
            killing.join()
            assert tokens == answer_to(PROMPT, 500)[: len(tokens)]
            assert "no-instance" in last
            decode.revive()
            wait_until(lambda: not front_lost(client))
            assert said(ask(client)) == answer_to(PROMPT, 8)


def front_lost(client: httpx.Client) -> list[str]:
    rows = client.get("/cluster/info").json()["workers"]
    return [row["name"] for row in rows if row["state"] != "member"]


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_answer_that_stands_still_is_given_up(where):
    """Three tries, each with its deadline; then an error that says why."""
    with fakes(2, step_s=0.01) as (prefill, decode):
        (prefill if where == "prefill" else decode).is_stuck = True
        config = a_config([prefill, decode], vllm={"answer_s_max": 0.2})
        with live(config, QUICK) as (client, _):
            answer = ask(client)
            assert (answer.status_code, f"silent-{where}" in answer.text) == (500, True)
            assert len((prefill if where == "prefill" else decode).asked) == 3
            wait_until(lambda: not prefill.under_way and not decode.under_way)


def test_what_a_server_refuses_is_not_tried_again():
    """Its own words come back."""
    with fakes(2) as (prefill, decode), live(a_config([prefill, decode]), QUICK) as (client, _):
        prefill.says_400 = True
        answer = ask(client)
        assert (answer.status_code, "not by me" in answer.text) == (500, True)
        assert len(prefill.asked) == 1


def test_a_server_that_says_nothing_any_more_is_lost():
    """Its connection stands, but no beat comes; when it speaks again it is back."""
    hello = {"type": "hello", "name": "x", "model": "fake", "endpoint": None}
    with fakes(2, events=[hello]) as (prefill, decode):
        config = a_config([prefill, decode], vllm={"dead_after_s": 0.3})
        with live(config, QUICK) as (client, _):
            prefill.is_stuck = True
            wait_until(lambda: front_lost(client) == ["prefill-0"])
            prefill.is_stuck = False
            wait_until(lambda: not front_lost(client))
            assert said(ask(client)) == answer_to(PROMPT, 8)


def holding(name: str, blocks: dict[int, int]) -> list[dict[str, Any]]:
    endpoint = {"transport": "shm", "address": name, "segment": f"mcb-{name}", "size": 100}
    return [
        {"type": "hello", "name": name, "model": "fake", "endpoint": endpoint},
        {"type": "stored", "slots": [*blocks.items()]},
    ]


def test_a_prefix_that_another_server_holds_is_offered():
    """prefill-0 holds three blocks and is busy: prefill-1 is told where they lie."""
    keys = prefix_hashes(PROMPT[:30], BLOCK)
    slow = a_profile(prefill={"base_s": 0.0, "token_s": 0.01}, link_bytes_per_s=1e9)
    with fakes(3) as (first, second, decode):
        first.events = holding("prefill-0", dict(zip(keys, (5, 6, 7), strict=True)))
        second.events = holding("prefill-1", {})
        first.prefill_s = 0.5
        with live(a_config([first, second, decode], prefill=2), slow) as (client, front):
            wait_until(lambda: front.cluster.index.match(keys) == [3, 0])
            busy = threading.Thread(target=ask, args=(client, [*PROMPT[:30], *range(500, 600)]))
            busy.start()
            wait_until(lambda: first.asked)
            assert said(ask(client)) == answer_to(PROMPT, 8)
            busy.join()
        (asked,) = second.asked
        assert asked["kv_transfer_params"]["pool"]["slots"] == [5, 6, 7]
        assert asked["kv_transfer_params"]["pool"]["endpoint"]["segment"] == "mcb-prefill-0"


def test_what_is_removed_is_not_counted_on():
    """The index follows the server's events, and forgets all with a server that is lost."""
    keys = prefix_hashes(PROMPT[:30], BLOCK)
    with fakes(2) as (prefill, decode):
        prefill.events = holding("prefill-0", dict(zip(keys, (5, 6, 7), strict=True)))
        with live(a_config([prefill, decode]), QUICK) as (_, front):
            index = front.cluster.index
            wait_until(lambda: index.match(keys) == [3])
            prefill.events.append({"type": "removed", "blocks": [keys[2]]})
            wait_until(lambda: index.match(keys) == [2])
            prefill.kill()
            wait_until(lambda: index.match(keys) == [0])


@pytest.mark.parametrize(
    ("scheduling", "expected"), [("least-loaded", [1, 1]), ("local-cache-aware", [2, 0])]
)
def test_colocated_servers_are_chosen_by_load_or_by_prefix(scheduling, expected):
    """While the first prompt's answer streams, the same prompt comes again."""
    profile = a_profile(prefill={"base_s": 0.0, "token_s": 0.01}, decode={"base_s": 0.001})
    with fakes(2, step_s=0.02) as servers:
        config = a_config(
            servers,
            prefill=0,
            conductor={"scheduling": scheduling},
            colocated={"prefix_caching": True, "device_tokens": 100_000},
        )
        with live(config, profile) as (client, front):
            index, keys = front.cluster.index, prefix_hashes(PROMPT[:30], BLOCK)
            first = threading.Thread(target=ask, args=(client, PROMPT, 40))
            first.start()
            wait_until(lambda: 3 in index.match(keys))
            assert said(ask(client)) == answer_to(PROMPT, 8)
            first.join()
        assert [len(one.asked) for one in servers] == expected


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vllm.urls": ["http://a"]}, "vllm.urls has 1 servers; give 2: prefill-0, decode-0"),
        ({"vllm.urls": ["a", "b"]}, "vllm.urls must begin with http"),
        ({"workers.placement": "inside", "vllm.urls": ["http://a"] * 2}, "workers.placement"),
        ({"network.transport": "shm", "engine.model": "none"}, "a directory with config.json"),
        ({}, 'vllm.connector "pool" has shm and tcp'),
        (
            {"vllm.connector": "mooncake", "vllm.urls": ["http://a", "http://b"]},
            "vllm.bootstraps must name Mooncake's of each prefill server",
        ),
        ({"vllm.connector": "mooncake-store"}, "needs MOONCAKE_CONFIG_PATH in vllm.environment"),
    ],
)
def test_what_cannot_be_had_with_vllm_is_said_in_a_line(changes, why):
    """The key and the remedy."""
    given = {"engine.kind": "vllm", "prefill_instances": 1, "decode_instances": 1}
    with pytest.raises(ConfigError, match=why.replace(".", r"\.")) as error:
        load_config(None, given | changes)
    assert "\n" not in str(error.value)
