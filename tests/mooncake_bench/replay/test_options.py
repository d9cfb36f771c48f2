"""One set of flags for the command line, for Locust, and for messages."""

import argparse

import pytest
import typer
from typer.testing import CliRunner

from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import (
    ReplayOptions,
    add_arguments,
    as_command,
    flags,
    options_from,
)

WORDS = ["--trace", "t.jsonl", "--speed", "2.5", "--jitter", "--limit", "7", "--endpoint", "chat"]
WANTED = ReplayOptions(trace="t.jsonl", speed=2.5, jitter=True, limit=7, endpoint="chat")


def test_typer_and_argparse_read_the_same_flags():
    """The same words give the same options."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_from(vars(parser.parse_args(WORDS))) == WANTED

    seen: list[ReplayOptions] = []
    app = typer.Typer()
    app.command()(as_command(seen.append))
    result = CliRunner().invoke(app, WORDS)
    assert (result.exit_code, seen) == (0, [WANTED])


def test_a_search_is_not_offered_to_locust():
    """It is many runs; flags that are on by default can be turned off in both."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = vars(parser.parse_args(["--no-scrape", "--no-sessions"]))
    assert not any(name.startswith("search") for name in known)
    assert (known["scrape"], known["sessions"]) == (False, False)


def test_every_flag_explains_itself():
    """Help for all, and defaults that are those of the structure."""
    assert all(flag.help for flag in flags())
    assert options_from({flag.field: flag.default for flag in flags()}) == ReplayOptions()


def test_texts_of_a_web_form_become_numbers():
    """Locust's page sends everything as text; what is not ours is ignored."""
    assert options_from({"speed": "3", "limit": "5", "num_users": 9}) == ReplayOptions(
        speed=3.0, limit=5
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"speed": 0.0}, "--speed 0.0: "),
        ({"speed": float("nan")}, "--speed nan: "),
        ({"sample": 1.5}, "--sample 1.5: "),
        ({"limit": -1}, "--limit -1: "),
        ({"endpoint": "embed"}, "--endpoint embed: use one of chat, completions"),
        ({"window": "9"}, "--window 9: write START-END"),
        ({"window": "9-3"}, "--window 9-3: the end must come after"),
        ({"endpoint": "chat", "prompt": "tokens"}, "--prompt tokens: chat takes no token ids"),
        ({"stall_timeout": 0}, "--stall-timeout 0: "),
        ({"cache_salt": True}, "--cache-salt: there is no salt to send; add --salt run"),
        ({"tokenizer": "t"}, "--tokenizer: prompts go as token ids here; add --prompt text"),
        ({"salt": ""}, "--salt '': give none, run, or a printable text"),
        ({"concurrency": 2, "arrivals": "poisson"}, "--arrivals: a closed loop has no arrivals"),
        ({"concurrency": 2, "search": "rate"}, "--search: a closed loop has no arrivals"),
        ({"search": "rate"}, "--search rate: give --search-from above 0 and --search-to above"),
        ({"search": "rate", "speed": 2.0}, "--speed: a search chooses it"),
        ({"search": "load"}, "--search load: use one of rate, speed"),
        ({"target": 1.5}, "--target 1.5: "),
        ({"server": "llm"}, "--server llm: use one of dynamo, sglang, tgi, vllm"),
        ({"server": "tgi", "prompt": "tokens"}, "--prompt tokens: TGI takes none; leave out"),
        ({"retry": "always"}, "--retry always: use one of backoff, none"),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_name(values, line):
    """Place first, then the remedy."""
    with pytest.raises(ReplayError) as caught:
        options_from(values)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
