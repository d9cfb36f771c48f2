"""Sessions, BurstGPT, Qwen-Bailian, ServeGen, ShareGPT and plain prompts as traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from workloads.trace import TraceError, open_trace, read_trace, write_mooncake
from workloads.transform import sessions

Write = Callable[..., Path]


def turn(**fields) -> str:
    return json.dumps({"input_length": 600, "output_length": 5, "hash_ids": [1, 2]} | fields)


def test_sessions_of_mooncake_rows(write: Write, tmp_path: Path):
    """Written session by session, read in order of time; a turn without a timestamp has a delay
    (ms) and goes no earlier than the turn before it."""
    trace = read_trace(
        write(
            turn(session_id="a", timestamp=1000, **{"class": "chat"}),
            turn(session_id="a", delay=2500, hash_ids=[1, 3]),
            turn(session_id="b", timestamp=0),
            turn(timestamp=500),
        )
    )
    assert trace.frame["arrival_s"].to_list() == [0.0, 0.5, 1.0, 1.0]
    assert trace.frame["session"].to_list() == ["b", None, "a", "a"]
    assert trace.frame["delay_s"].to_list() == [None, None, None, 2.5]
    assert trace.frame["class"].to_list() == [None, None, "chat", None]
    assert sessions(trace).tolist() == [0, 1, 2, 2]
    write_mooncake(trace, tmp_path / "again.jsonl")
    assert read_trace(tmp_path / "again.jsonl").frame.equals(trace.frame)


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ([turn(session_id=1, delay=5)], 1, "its session has no turn before it"),
        ([turn(session_id=1, timestamp=0), turn(session_id=1)], 2, "timestamp is missing, and no"),
        ([turn(session_id=1, timestamp=0, delay=-1)], 1, "delay is -1"),
        (
            [turn(session_id=1, timestamp=9), turn(session_id=2, timestamp=1, input_length=0)],
            2,
            "input_length is 0",
        ),
    ],
)
def test_a_broken_turn_is_named(write: Write, rows: list[str], line: int, words: str):
    """By its line in the file, also where rows were sorted."""
    with pytest.raises(TraceError, match=f":{line}: .*{words}"):
        read_trace(write(*rows))


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"


def test_burstgpt(write: Write):
    """Seconds from the first row; failures (0 tokens) left out; every prompt on its own."""
    trace = read_trace(
        write(
            BURST,
            "5,ChatGPT,472,18,490,Conversation log",
            "45,ChatGPT,1087,230,1317,API log",
            "47,GPT-4,417,0,417,API log",
            name="BurstGPT_1.csv",
        )
    )
    assert trace.frame["arrival_s"].to_list() == [0.0, 40.0]
    assert trace.frame["input_tokens"].to_list() == [472, 1087]
    assert trace.frame["output_tokens"].to_list() == [18, 230]
    assert trace.frame["hash_ids"].to_list() == [[0], [1, 2, 3]]
    assert trace.frame["class"].to_list() == ["Conversation log", "API log"]
    assert trace.transforms == ("1 failed requests left out",)


def test_burstgpt_with_sessions(write: Write):
    """Release 2 has Session ID and Elapsed time; API calls have no session."""
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens"
    trace = read_trace(write(header, "1,7,2.5,GPT-4,10,20,30", "2.5,,1,GPT-4,10,20,30"))
    assert trace.frame["session"].to_list() == ["7", None]
    assert trace.frame["arrival_s"].to_list() == [0.0, 1.5]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["Timestamp,Model", "1,x"], ":1: column Request tokens is missing"),
        ([BURST, "1,x,5,5,10,a", "0,x,5,5,10,a"], ":3: Timestamp is '0'; it is before"),
        ([BURST, "1,x,5.5,5,10,a"], ":2: Request tokens is '5.5'"),
        ([BURST, "x,x,5,5,10,a"], ":2: Timestamp is 'x'; give seconds"),
        ([BURST, "1,x,0,0,0,a"], "no request that succeeded"),
    ],
)
def test_a_broken_burstgpt_row_is_named(write: Write, lines: list[str], words: str):
    """Line, column, value, remedy."""
    with pytest.raises(TraceError, match=words):
        read_trace(write(*lines, name="burst.csv"))


def bailian(chat: int, parent: int, at_s: float, tokens: int, ids: list[int]) -> str:
    row = {"chat_id": chat, "parent_chat_id": parent, "timestamp": at_s, "input_length": tokens}
    return json.dumps(row | {"output_length": 9, "type": "text", "turn": 1, "hash_ids": ids})


def test_bailian(write: Write):
    """Seconds, blocks of 16; turns are linked to their first; a partial block without an id gets
    its own, unlike all others."""
    trace = read_trace(
        write(
            bailian(159, -1, 61.114, 33, [5, 6, 7]),
            bailian(55, -1, 62.0, 20, [5]),
            bailian(160, 159, 62.5, 48, [5, 6, 8]),
        )
    )
    assert trace.block_tokens == 16
    assert trace.frame["arrival_s"].to_list() == [61.114, 62.0, 62.5]
    assert trace.frame["session"].to_list() == ["159", "55", "159"]
    assert trace.frame["hash_ids"].to_list() == [[5, 6, 7], [5, 9], [5, 6, 8]]
    assert trace.frame["class"].to_list() == ["text"] * 3
    assert "delay_s" not in trace.frame.columns  # All go out at their own times.
    assert trace.transforms == ("1 partial last blocks made unique",)


def sharegpt(*turns: tuple[str, str], name: str = "x") -> dict:
    return {"id": name, "conversations": [{"from": who, "value": said} for who, said in turns]}


def test_sharegpt(write: Write):
    """A request a human turn, with all before it; the next waits for the answer; what two prompts
    share in their texts they share in their ids."""
    long = "tell me " * 400
    data = [
        sharegpt(("human", long), ("gpt", "yes " * 10), ("human", "more"), ("gpt", "no")),
        sharegpt(("human", "hello"), name="y"),
    ]
    trace = read_trace(write(json.dumps(data), name="share.json"))
    assert trace.frame["session"].to_list() == ["x", "x", "y"]
    assert trace.frame["delay_s"].to_list() == [None, 0.0, None]
    assert trace.frame["output_tokens"].to_list() == [10, 1, 128]
    prompts = [msgspec.json.decode(one) for one in trace.frame["prompt"]]
    assert [message["role"] for message in prompts[1]] == ["user", "assistant", "user"]
    # "user: " and 3,200 bytes and a line end are 3,207 bytes: 802 tokens, 2 blocks of 512.
    assert trace.frame["input_tokens"][0] == 802
    first, second, other = trace.frame["hash_ids"].to_list()
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert other[0] not in first
    assert "input tokens estimated at 4 bytes each" in trace.transforms


def test_plain_prompts(write: Write):
    """Text or messages; lengths, times, sessions and classes where they are given."""
    trace = read_trace(
        write(
            json.dumps({"prompt": "say it", "output_length": 7, "timestamp": 1500}),
            json.dumps({"messages": [{"role": "user", "content": "hi"}], "timestamp": 100}),
            json.dumps({"prompt": "x", "session_id": 4, "timestamp": 200, "class": "batch"}),
            json.dumps({"prompt": "y", "session_id": 4, "delay": 1000}),
        )
    )
    assert trace.frame["arrival_s"].to_list() == [0.1, 0.2, 0.2, 1.5]
    assert trace.frame["prompt"][3] == '"say it"'
    assert trace.frame["output_tokens"].to_list() == [128, 128, 128, 7]
    assert trace.frame["delay_s"].to_list() == [None, None, 1.0, None]
    assert trace.frame["class"].to_list() == [None, "batch", None, None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": 3}', ":1: no prompt"),
        ('{"prompt": "x", "output_length": 0}', ":1: output_length is '0'"),
        ('{"prompt": "x", "timestamp": -1}', ":1: timestamp is '-1'"),
        ('{"prompt": "x"}\n{"prompt"', ":2: not valid JSON"),
        ('[{"id": 1}]', 'conversation 0: no "conversations"'),
        ('[{"conversations": [{"from": "cat", "value": "x"}]}]', "a turn is no"),
        ("[]", "nobody says anything"),
        ("[{", "not valid JSON"),
    ],
)
def test_a_broken_prompt_is_named(write: Write, line: str, words: str):
    """File, line or conversation, remedy."""
    with pytest.raises(TraceError, match=words) as caught:
        read_trace(write(line))
    assert "\n" not in str(caught.value)


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """Two ServeGen clients: one sends for ten minutes, then little; the other only then."""
    (tmp_path / "chunk-0-trace.csv").write_text("0,2.0,1.5,Gamma,0.4,1.2\n600,1,2,Weibull,0.5,1\n")
    (tmp_path / "chunk-1-trace.csv").write_text("0,0,0,,0,0\n600,3,1,Gamma,1.0,0.3\n")
    for number, tokens in ((0, "{100: 0.25, 2000: 0.75}"), (1, "{10: 1.0}")):
        lengths = {"0": {"input_tokens": tokens, "output_tokens": "{5: 1.0}"}}
        (tmp_path / f"chunk-{number}-dataset.json").write_text(json.dumps(lengths))
    return tmp_path


def test_servegen_clients(clients: Path):
    """The first ten minutes are client 0's: about 2 req/s, 3 of 4 prompts long; then both."""
    first = open_trace(str(clients), seed=1)
    assert set(first.frame["class"]) == {"client-0"}
    assert first.rate_rps == pytest.approx(2.0, rel=0.25)
    assert (first.frame["input_tokens"] == 2000).mean() == pytest.approx(0.75, abs=0.05)
    both = open_trace(f"{clients}:start_s=600,duration_s=600,rate_rps=8", seed=1)
    assert both.rate_rps == pytest.approx(8.0, rel=0.15)
    assert both.frame["arrival_s"].is_sorted()
    share = (both.frame["class"] == "client-1").mean()
    assert share == pytest.approx(0.75, abs=0.1)  # 3 of 4 requests a second
    again = open_trace(f"{clients}:start_s=600,duration_s=600,rate_rps=8", seed=1)
    assert again.frame.equals(both.frame)
    assert again.sha256 == both.sha256 != first.sha256


def test_broken_servegen_clients_are_named(clients: Path):
    """The file or the parameter, and the remedy."""
    with pytest.raises(TraceError, match="no parameter 'rate'; use start_s, duration_s, rate_rps"):
        open_trace(f"{clients}:rate=3")
    with pytest.raises(TraceError, match="no client sends anything in that part"):
        open_trace(f"{clients}:start_s=9000")
    (clients / "chunk-0-trace.csv").write_text("0,2.0,1.5,Pareto,0.4,1.2\n")
    with pytest.raises(TraceError, match=r"chunk-0-trace.csv:1: arrivals 'Pareto' unknown"):
        open_trace(str(clients))
    (clients / "chunk-0-trace.csv").write_text("nonsense\n")
    with pytest.raises(TraceError, match=r"chunk-0-trace.csv:1: 'nonsense' is no window"):
        open_trace(str(clients))
    (clients / "chunk-0-trace.csv").write_text("0,2.0,1.5,Gamma,0.4,1.2\n")
    (clients / "chunk-0-dataset.json").unlink()
    with pytest.raises(TraceError, match=r"chunk-0-dataset.json: missing or no JSON"):
        open_trace(str(clients))
