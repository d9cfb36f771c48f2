"""Do KV bytes carry a prompt from one engine to another, in whole blocks, layer by layer?"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

from reference_cluster.engines.torch.blocks import KvBlocks, Moves, load_all  # noqa: E402
from reference_cluster.engines.torch.parallel import join, leave  # noqa: E402
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.runner import Runner, Tokens, Work  # noqa: E402
from reference_cluster.engines.torch.weights import Share  # noqa: E402
from reference_cluster.errors import ConfigError  # noqa: E402
from reference_cluster.request import Sampling  # noqa: E402

pytestmark = pytest.mark.torch
BLOCK_TOKENS = 64
STEPS = 12
PROMPTS = 50


def make_prompts() -> list[list[int]]:
    """1 to 4,000 tokens; every other one begins with the blocks of the one before."""
    numbers = random.Random(5)
    lengths = [1, 2, 63, 64, 65, 128, 129, 1000, 4000]
    lengths += [numbers.randint(1, 600) for _ in range(PROMPTS - len(lengths))]
    prompts: list[list[int]] = []
    for number, length in enumerate(lengths):
        fresh = [numbers.randrange(2, 512) for _ in range(length)]
        if number % 2:
            shared = min(length - 1, len(prompts[-1])) // BLOCK_TOKENS * BLOCK_TOKENS
            fresh[:shared] = prompts[-1][:shared]
        prompts.append(fresh)
    return prompts


def slots_of(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """For each prompt its blocks' slots, and how many leading tokens another has stored there."""
    taken = 0
    known: dict[tuple[int, ...], int] = {}
    placed = []
    for prompt in prompts:
        slots, reused = [], 0
        for end in range(BLOCK_TOKENS, len(prompt) + BLOCK_TOKENS, BLOCK_TOKENS):
            key = tuple(prompt[:end])
            if key in known and reused == end - BLOCK_TOKENS:
                reused = min(end, len(prompt) - 1)
            elif key not in known:
                known[key] = taken
                taken += 1
            slots.append(known[key])
        placed.append((slots, reused))
    return placed


ALONE = (0, 1, "")  # Rank, ranks, and where they meet.
Rank = tuple[int, int, str]


def replica(
    model: str, page_tokens: int, dtype: str, place: Rank = ALONE, device: str = "cpu"
) -> Runner:
    torch.set_num_threads(1)
    rank, ranks, address = place
    settings = ReplicaConfig(
        model,
        dtype=dtype,
        device=device,
        page_tokens=page_tokens,
        kv_tokens=8192,
        tensor_parallel=ranks,
    )
    return build_runner(settings) if ranks == 1 else join(settings, rank, address)


def blocks_over(memory: SharedMemory, runner: Runner, place: Rank) -> KvBlocks:
    model = runner.model
    assert memory.buf is not None
    return KvBlocks(
        memory.buf,
        model.config,
        model.weights.embedding.dtype,
        BLOCK_TOKENS,
        runner.cache,
        Share(*place[:2]),
    )


def compute_prompt(runner: Runner, tokens: Tokens, chunk_tokens: int) -> None:
    runner.cache.grow(tokens.pages, len(tokens.ids))
    tokens.computed = tokens.moves.reused_tokens if tokens.moves else 0
    while len(tokens.ids) == tokens.prompt_tokens:
        runner.run([Work(tokens, min(chunk_tokens, len(tokens.ids) - tokens.computed))], [])


def prefill_all(
    model: str,
    name: str,
    page_tokens: int,
    dtype: str,
    chunk_tokens: int,
    place: Rank = ALONE,
    device: str = "cpu",
) -> list[int]:
    """A process that only prefills: KV goes into shared memory; returns the first tokens."""
    memory = SharedMemory(name)
    runner = replica(model, page_tokens, dtype, place, device)
    blocks = blocks_over(memory, runner, place)
    prompts = make_prompts()
    first = []
    for prompt, (slots, reused) in zip(prompts, slots_of(prompts), strict=True):
        moves = Moves(blocks, slots, len(prompt), reused)
        tokens = Tokens(list(prompt), len(prompt), Sampling(), moves)
        compute_prompt(runner, tokens, chunk_tokens)
        first.append(tokens.ids[-1])
        runner.forget(tokens)
    if place != ALONE:
        leave()
    return first


def decode_all(
    model: str,
    name: str,
    page_tokens: int,
    dtype: str,
    first: list[int],
    place: Rank = ALONE,
    device: str = "cpu",
) -> list[list[int]]:
    """Another process that only decodes, from nothing but the bytes and the first tokens."""
    memory = SharedMemory(name)
    runner = replica(model, page_tokens, dtype, place, device)
    blocks = blocks_over(memory, runner, place)
    prompts = make_prompts()
    answers = []
    for prompt, (slots, _), token in zip(prompts, slots_of(prompts), first, strict=True):
        tokens = Tokens([*prompt, token], len(prompt))
        runner.cache.grow(tokens.pages, len(prompt) + STEPS)
        moves = Moves(blocks, slots, len(prompt))
        load_all(moves, tokens.pages, len(prompt), runner.model.config.layers)
        tokens.computed = len(prompt)
        for _ in range(STEPS - 1):
            runner.run([], [tokens])
        answers.append(tokens.produced)
        runner.forget(tokens)
    if place != ALONE:
        leave()
    return answers


def colocated_all(model: str, page_tokens: int, dtype: str) -> list[list[int]]:
    """One engine, nothing moved, nothing reused."""
    runner = replica(model, page_tokens, dtype)
    answers = []
    for prompt in make_prompts():
        tokens = Tokens(list(prompt), len(prompt))
        runner.cache.grow(tokens.pages, len(prompt) + STEPS)
        compute_prompt(runner, tokens, 1 << 20)
        for _ in range(STEPS - 1):
            runner.run([], [tokens])
        answers.append(tokens.produced)
        runner.forget(tokens)
    return answers


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return colocated_all(str(llama), 16, "float32")


@pytest.fixture
def memory(llama: Path) -> object:
    runner = replica(str(llama), 16, "float32")
    block_bytes = BLOCK_TOKENS * runner.model.config.kv_bytes(4)
    slots = 1 + max(max(slots) for slots, _ in slots_of(make_prompts()))
    memory = SharedMemory(create=True, size=slots * block_bytes)
    yield memory
    memory.unlink()


@pytest.mark.parametrize(
    ("prefill_pages", "decode_pages", "chunk_tokens"), [(16, 32, 100), (32, 16, 1 << 20)]
)
def test_prefill_and_decode_in_two_processes_say_what_one_engine_says(
    llama: Path,
    memory: SharedMemory,
    expected: list[list[int]],
    prefill_pages: int,
    decode_pages: int,
    chunk_tokens: int,
    device: str,
) -> None:
    """50 prompts, partial prefix hits, chunks or none, different pages on both sides.

    Negative control: with the bytes zeroed in between, the answers differ.
    """
    model = str(llama)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        arguments = (model, memory.name, prefill_pages, "float32", chunk_tokens, ALONE, device)
        first = pool.apply(prefill_all, arguments)
        decoding = (model, memory.name, decode_pages, "float32", first, ALONE, device)
        answers = pool.apply(decode_all, decoding)
        assert answers == expected
        assert memory.buf is not None
        memory.buf[:] = bytes(len(memory.buf))
        zeroed = pool.apply(decode_all, decoding)
    differing = sum(a != b for a, b in zip(zeroed, expected, strict=True))
    assert differing >= PROMPTS - 2  # Of a prompt of one or two tokens little is lost.


def test_two_ranks_on_each_side_say_what_one_engine_says(
    llama: Path, memory: SharedMemory, expected: list[list[int]], tmp_path: Path
) -> None:
    """Tensor parallel over gloo: each rank computes, stores and loads the bytes of its heads.

    A decode instance of one rank reads what two have written.
    """
    model, count = str(llama), range(2)
    with multiprocessing.get_context("spawn").Pool(2) as pool:

        def both(work: object, *arguments: object) -> list[object]:
            address = f"file://{tmp_path}/{work.__name__}"
            ranks = [
                (model, memory.name, 16, "float32", *arguments, (r, 2, address)) for r in count
            ]
            return [one.get(200) for one in [pool.apply_async(work, rank) for rank in ranks]]

        first, same = both(prefill_all, 100)
        assert first == same
        assert both(decode_all, first) == [expected, expected]
        alone = pool.apply(decode_all, (model, memory.name, 32, "float32", first))
    assert alone == expected


def test_bfloat16_bytes_carry_the_same_answers(llama_bf16: Path) -> None:
    """Bytes are exact: after the hand-over a bfloat16 engine says what the sending one would."""
    runner = replica(str(llama_bf16), 16, "bfloat16")
    other = replica(str(llama_bf16), 16, "bfloat16")
    block_bytes = BLOCK_TOKENS * runner.model.config.kv_bytes(2)
    buffer = bytearray(8 * block_bytes)
    config, dtype = runner.model.config, torch.bfloat16
    prompt = make_prompts()[8][:400]
    here = KvBlocks(buffer, config, dtype, BLOCK_TOKENS, runner.cache)
    tokens = Tokens(prompt[:], 400, moves=Moves(here, range(7), 400))
    compute_prompt(runner, tokens, 150)
    there = Moves(KvBlocks(buffer, config, dtype, BLOCK_TOKENS, other.cache), range(7), 400)
    moved = Tokens(tokens.ids[:], 400, computed=400)
    other.cache.grow(moved.pages, 500)
    load_all(there, moved.pages, 400, config.layers)
    for _ in range(STEPS):
        runner.cache.grow(tokens.pages, len(tokens.ids))
        runner.run([], [tokens])
        other.run([], [moved])
    assert moved.ids == tokens.ids


def test_layers_are_waited_for_and_stored_in_order(llama: Path) -> None:
    """Layer i is awaited before it is computed and told when its bytes are in the slots."""
    runner = replica(str(llama), 16, "float32")
    layers = runner.model.config.layers
    block_bytes = BLOCK_TOKENS * runner.model.config.kv_bytes(4)
    buffer = bytearray(3 * block_bytes)
    blocks = KvBlocks(buffer, runner.model.config, torch.float32, BLOCK_TOKENS, runner.cache)
    heard: list[tuple[str, int, bool]] = []

    def is_filled(layer: int) -> bool:
        """Has the second block its bytes of the layer?"""
        size = block_bytes // layers
        start = block_bytes + layer * size
        return any(buffer[start : start + size])

    moves = Moves(
        blocks,
        [0, 1, 2],
        130,
        reused_tokens=64,
        wait_layer=lambda layer: heard.append(("wait", layer, is_filled(layer))),
        store_layer=lambda layer: heard.append(("stored", layer, is_filled(layer))),
    )
    tokens = Tokens(make_prompts()[8][:130], 130, moves=moves)
    compute_prompt(runner, tokens, 1 << 20)
    per_layer = [[("wait", layer, False), ("stored", layer, True)] for layer in range(layers)]
    assert heard == [one for pair in per_layer for one in pair]


def test_a_block_must_be_whole_pages(llama: Path) -> None:
    """Otherwise one line says what to change."""
    runner = replica(str(llama), 48, "float32")
    with pytest.raises(ConfigError, match="not a multiple of page_tokens 48; choose another"):
        KvBlocks(bytearray(1), runner.model.config, torch.float32, 64, runner.cache)
