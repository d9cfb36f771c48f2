"""Do equal keys mean equal whole prefixes, and nothing less?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.blocks import prefix_hashes, reusable_tokens

QUICK = settings(derandomize=True, deadline=None, max_examples=100)
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=20)


def test_a_prompt_has_one_key_a_block() -> None:
    """10 tokens in blocks of 4: two full ones and a partial one; none for no tokens."""
    assert len(prefix_hashes(range(10), 4)) == 3
    assert len(prefix_hashes(range(8), 4)) == 2
    assert prefix_hashes([], 4) == ()


def test_keys_are_chained() -> None:
    """The same block after another beginning has another key: it holds other KV."""
    one, other = prefix_hashes([1, 2, 9, 9], 2), prefix_hashes([3, 4, 9, 9], 2)
    assert one[1] != other[1]


def test_a_block_repeated_has_another_key() -> None:
    """The second of two equal blocks stands at another place."""
    first, second = prefix_hashes([7, 7, 7, 7], 2)
    assert first != second


def test_a_partial_last_block_has_a_key_of_its_own() -> None:
    """[1 2][3] shares its first block with [1 2][3 4] and not its second."""
    short, long = prefix_hashes([1, 2, 3], 2), prefix_hashes([1, 2, 3, 4], 2)
    assert short[0] == long[0]
    assert short[1] != long[1]


@QUICK
@given(one=TOKENS, other=TOKENS, block_tokens=st.integers(1, 5))
def test_keys_agree_exactly_as_far_as_the_prompts_do(
    one: list[int], other: list[int], block_tokens: int
) -> None:
    """Key i is equal if and only if the prompts agree up to the end of block i."""
    ours, theirs = prefix_hashes(one, block_tokens), prefix_hashes(other, block_tokens)
    for position, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        end = (position + 1) * block_tokens
        assert (mine == yours) == (one[:end] == other[:end])


def test_keys_are_the_same_in_every_process() -> None:
    """No hash() of this process is in them."""
    code = "from reference_cluster.blocks import prefix_hashes; print(*prefix_hashes(range(9), 4))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert tuple(map(int, done.stdout.split())) == prefix_hashes(range(9), 4)


@pytest.mark.parametrize(
    ("matched_blocks", "input_tokens", "reused_tokens"),
    [(0, 25, 0), (1, 25, 10), (2, 25, 20), (3, 25, 24), (2, 20, 19), (1, 1, 0)],
)
def test_the_last_prompt_token_is_always_computed(
    matched_blocks: int, input_tokens: int, reused_tokens: int
) -> None:
    """With blocks of 10, a fully cached prompt of 25 reuses 24: its answer needs one more."""
    assert reusable_tokens(matched_blocks, input_tokens, 10) == reused_tokens
