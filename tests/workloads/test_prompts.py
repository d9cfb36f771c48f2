"""Do prompts share exactly what their block ids share, in every process?"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.errors import TraceError
from workloads.prompts import prompt_text, prompt_token_ids

KEY = "b8cb"
ids_64_bit = st.integers(-(2**63), 2**64 - 1)


def common(a: list, b: list) -> int:
    """How many tokens two prompts have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(st.lists(ids_64_bit, min_size=1, max_size=5), st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_length_range_and_words(ids, missing) -> None:
    """Exactly the tokens asked for, in [1000, 31000), and one word each."""
    tokens = 16 * len(ids) - missing
    prompt = prompt_token_ids(KEY, ids, tokens, 16)
    assert len(prompt) == tokens
    assert min(prompt) >= 1000
    assert max(prompt) < 31_000
    words = prompt_text(KEY, ids, tokens, 16).split()
    assert len(words) == tokens
    # The same token is the same word, and different tokens are different words.
    assert len(set(zip(prompt, words, strict=True))) == len(set(prompt)) == len(set(words))


def test_shared_ids_are_shared_tokens_and_no_more() -> None:
    """Two prompts with two ids in common agree on 1,024 tokens, then differ at once."""
    a = prompt_token_ids(KEY, [0, 7, 8], 1500, 512)
    b = prompt_token_ids(KEY, [0, 7, 9], 1536, 512)
    assert common(a, b) == 1024
    assert common(a, prompt_token_ids("other trace", [0, 7, 8], 1500, 512)) == 0


def test_siblings_differ_from_the_first_token_on() -> None:
    """20,000 consecutive ids: all first tokens are different."""
    first = [prompt_token_ids(KEY, [i], 1, 512)[0] for i in range(20_000)]
    assert len(set(first)) == 20_000


@given(ids_64_bit, ids_64_bit)
@settings(max_examples=300, deadline=None)
def test_no_two_ids_agree_on_five_tokens(a, b) -> None:
    """Five tokens spell 64 bits out (an id and its two's complement twin are one id)."""
    same = a % 2**64 == b % 2**64
    agree = common(prompt_token_ids(KEY, [a], 5, 512), prompt_token_ids(KEY, [b], 5, 512))
    assert (agree == 5) == same


def test_a_partial_block_is_a_prefix_of_its_text() -> None:
    """The length of the last block cuts its text; it does not change it."""
    assert prompt_token_ids(KEY, [3], 100, 512) == prompt_token_ids(KEY, [3], 512, 512)[:100]


def test_string_ids_work_like_numbers() -> None:
    """Equal strings, equal blocks."""
    a = prompt_token_ids(KEY, ["x", "y"], 32, 16)
    assert common(a, prompt_token_ids(KEY, ["x", "z"], 32, 16)) == 16


def test_a_wrong_number_of_ids_is_refused() -> None:
    """600 tokens in blocks of 512 need two ids."""
    with pytest.raises(TraceError, match="1 block ids for a prompt of 600"):
        prompt_token_ids(KEY, [1], 600, 512)


PROGRAM = """
import hashlib, json, sys
from workloads.prompts import prompt_text, prompt_token_ids
text = prompt_text("k", [0, 5, 2**63, -4], 2000, 512) + prompt_text("k", ["a", "b"], 700, 512)
tokens = prompt_token_ids("k", [0, 5, 2**63, -4], 2000, 512)
print(hashlib.sha256((text + json.dumps(tokens)).encode()).hexdigest())
"""


def test_every_process_makes_the_same_prompts() -> None:
    """No PYTHONHASHSEED changes a word."""
    digests = set()
    for seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    text = prompt_text("k", [0, 5, 2**63, -4], 2000, 512) + prompt_text("k", ["a", "b"], 700, 512)
    tokens = prompt_token_ids("k", [0, 5, 2**63, -4], 2000, 512)
    assert digests == {hashlib.sha256((text + json.dumps(tokens)).encode()).hexdigest()}


def test_the_real_traces_prompts_share_exactly_its_prefixes(conversation) -> None:
    """Sampled neighbours in the trace: common tokens = common ids, to the token."""
    rows = conversation.frame.select("hash_ids", "input_tokens").rows()[::60]
    for (ids_a, tokens_a), (ids_b, tokens_b) in pairwise(rows):
        a = prompt_token_ids(conversation.sha256, ids_a, tokens_a, 512)
        b = prompt_token_ids(conversation.sha256, ids_b, tokens_b, 512)
        shared = min(512 * common(ids_a, ids_b), tokens_a, tokens_b)
        # Unrelated blocks may agree on a digit or two of their ids by chance, never on five.
        assert shared <= common(a, b) < shared + 5
