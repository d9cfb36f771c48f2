"""Requests built ahead say exactly what the trace says, in bounded memory."""

import json
import threading
import time

import numpy as np
import polars as pl
import pytest

from mooncake_bench.replay.bodies import BuildAhead, RequestBuilder, RequestShape
from mooncake_bench.replay.schedule import Plan
from workloads.prompts import prompt_text, prompt_token_ids

BLOCK = 512
SHAPE = RequestShape(
    host="host:8000",
    path="/v1/completions",
    model='a "model"',
    trace_key="key",
    block_tokens=BLOCK,
    is_chat=False,
    sends_tokens=True,
    wants_timeline=True,
)
# The first two share their first 20 blocks; the third has a single token.
IDS = [list(range(24)), [*range(20), 90, 91], [7]]
PLAN = Plan(
    request=np.array([5, 6, 9]),
    due_s=np.zeros(3),
    input_tokens=np.array([24 * BLOCK - 100, 22 * BLOCK, 1]),
    output_tokens=np.array([10, 20, 1]),
    hash_ids=pl.Series(IDS),
)


def body_of(shape: RequestShape, row: int) -> tuple[bytes, dict]:
    head, _, body = RequestBuilder(shape, PLAN).build(row).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return head, json.loads(body)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_token_ids_are_those_of_the_whole_prompt(row):
    """Building in slices changes nothing."""
    _, body = body_of(SHAPE, row)
    tokens = int(PLAN.input_tokens[row])
    assert body["prompt"] == prompt_token_ids("key", IDS[row], tokens, BLOCK)


@pytest.mark.parametrize("ids", [[[3], [9], [3], [1, 2], [4], [5]], [["a"], ["b"], ["c"]]])
def test_short_prompts_made_together_are_those_made_alone(ids):
    """Whatever the order in which they are asked for, and with a longer one between them."""
    lengths = [600 if len(blocks) > 1 else 40 + 30 * n for n, blocks in enumerate(ids)]
    count = len(ids)
    zeros = np.zeros(count)
    plan = Plan(np.arange(count), zeros, np.array(lengths), zeros + 1, pl.Series(ids))
    builder = RequestBuilder(SHAPE, plan)
    for row in [2, 0, 1, *range(3, count)]:
        body = json.loads(builder.build(row).partition(b"\r\n\r\n")[2])
        assert body["prompt"] == prompt_token_ids("key", ids[row], lengths[row], BLOCK)


def test_the_settings_ask_for_exactly_the_output_of_the_trace():
    """max_tokens with ignore_eos, a stream with usage, the timeline of our own cluster."""
    head, body = body_of(SHAPE, 0)
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nHost: host:8000\r\n")
    assert b"X-Request-Id: 5\r\n" in head
    del body["prompt"]
    assert body == {
        "model": 'a "model"',
        "max_tokens": 10,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "include_timeline": True},
    }


def test_text_and_chat_carry_one_word_a_token():
    """A whitespace tokenizer counts exactly the input tokens."""
    settings = {"sends_tokens": False, "wants_timeline": False}
    plain = {name: getattr(SHAPE, name) for name in SHAPE.__slots__} | settings
    _, completion = body_of(RequestShape(**plain), 1)
    _, chat = body_of(RequestShape(**plain | {"is_chat": True}), 1)
    whole = prompt_text("key", IDS[1], 22 * BLOCK, BLOCK)
    assert completion["prompt"] == whole
    assert chat["messages"] == [{"role": "user", "content": whole}]
    assert len(whole.split()) == 22 * BLOCK
    assert chat["stream_options"] == {"include_usage": True}


def test_building_waits_when_it_is_far_enough_ahead():
    """100 requests of 10 bytes with room for 35: four are built, one more for each one taken."""
    built: list[int] = []
    one_more = threading.Semaphore(0)

    def build(row: int) -> bytes:
        built.append(row)
        one_more.release()
        return b"%010d" % row

    ahead = BuildAhead(build, 100, 35)
    ahead.start()
    assert ahead.is_warm.wait(5)
    assert built == [0, 1, 2, 3]
    taken = []
    while len(taken) < 100:
        if (request := ahead.take(len(taken))) is not None:
            taken.append(int(request))
            assert len(built) <= len(taken) + 4
        else:
            time.sleep(0.001)
    ahead.stop()
    assert taken == list(range(100))


def test_a_request_larger_than_the_bound_is_built_all_the_same():
    """At least one is always ready."""
    ahead = BuildAhead(lambda _: b"x" * 1000, 3, 1)
    ahead.start()
    assert ahead.is_warm.wait(5)
    assert len(ahead.take(0) or b"") == 1000
    ahead.stop()


def test_an_error_in_building_reaches_the_sender():
    """It is not lost in the thread."""

    def build(row: int) -> bytes:
        raise ValueError("no such block")

    ahead = BuildAhead(build, 3, 100)
    ahead.start()
    assert ahead.is_warm.wait(5)
    assert str(ahead.error) == "no such block"
    ahead.stop()
