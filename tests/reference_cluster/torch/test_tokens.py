"""Does the engine say what transformers says, however its work is cut into steps and pages?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
transformers = pytest.importorskip("transformers", reason="transformers: make test-torch")

from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.scheduler import Scheduler  # noqa: E402
from reference_cluster.request import Sampling  # noqa: E402

pytestmark = pytest.mark.torch
NEW_TOKENS = 16
Reference = Any


def prompts(count: int, longest: int) -> list[list[int]]:
    """Lengths from 1 up, many of them at the edges of pages, blocks and chunks."""
    numbers = random.Random(11)
    edges = [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1025, longest]
    lengths = [length for length in edges if length <= longest][:count]
    lengths += [numbers.randint(1, longest // 4) for _ in range(count - len(lengths))]
    return [[numbers.randrange(2, 512) for _ in range(length)] for length in lengths]


def expected(reference: Reference, prompt: Sequence[int]) -> list[int]:
    generated = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = generated[0, len(prompt) :].tolist()
    return tokens


def load_reference(directory: Path, dtype: str = "float32") -> Reference:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    )
    model.generation_config.eos_token_id = None  # An end token is a token like the others here.
    return model


def answers(scheduler: Scheduler, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    sampling = Sampling(NEW_TOKENS, ignore_eos=True)
    jobs = [scheduler.add(number, prompt, sampling) for number, prompt in enumerate(asked)]
    scheduler.run_all()
    scheduler.check_integrity()
    return [job.tokens.produced for job in jobs]


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    return prompts(50, 4000)


@pytest.fixture(scope="module")
def wanted(llama: Path, asked: list[list[int]]) -> list[list[int]]:
    reference = load_reference(llama)
    return [expected(reference, prompt) for prompt in asked]


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("step_tokens_max", [None, 300])
def test_greedy_tokens_are_those_of_transformers(
    llama: Path,
    asked: list[list[int]],
    wanted: list[list[int]],
    page_tokens: int,
    step_tokens_max: int | None,
    device: str,
) -> None:
    """50 prompts of 1 to 4,000 tokens, batched as they come, whole or in chunks."""
    config = ReplicaConfig(str(llama), device=device, page_tokens=page_tokens, kv_tokens=40960)
    runner = build_runner(config)
    assert answers(Scheduler(runner, step_tokens_max), asked) == wanted


@pytest.mark.parametrize("name", ["llama3-rope", "tied", "qwen2", "qwen3"])
def test_every_variant_says_what_transformers_says(
    variants: dict[str, Path], name: str, device: str
) -> None:
    """Scaled RoPE beyond its original context, a tied head, biases on q k v, norms of q and k."""
    asked = prompts(14, 1200)
    reference = load_reference(variants[name])
    runner = build_runner(ReplicaConfig(str(variants[name]), device=device, page_tokens=16))
    wanted = [expected(reference, prompt) for prompt in asked]
    assert answers(Scheduler(runner, 300), asked) == wanted


def test_bfloat16_differs_from_transformers_at_near_ties_only(
    llama_bf16: Path, device: str
) -> None:
    """Where an answer first differs, both tokens are as good: rounding decides between them.

    Both libraries round every product to bfloat16, in another order. The same weights computed
    with in float32 tell how far apart the two tokens are, and how much of that is rounding: their
    logits differ by less than transformers' own bfloat16 logits are off (seen: 9 of 20 answers
    differ, each between the two best tokens, 0.005 to 0.038 apart where logits spread by 0.9). In
    float32 the engine says what transformers says.
    """
    asked = prompts(20, 2000)
    rounded, exact = load_reference(llama_bf16, "bfloat16"), load_reference(llama_bf16)
    runner = build_runner(ReplicaConfig(str(llama_bf16), device=device, page_tokens=16))
    ties = []
    for prompt, produced in zip(asked, answers(Scheduler(runner, 300), asked), strict=True):
        wanted = expected(rounded, prompt)
        if produced != wanted:
            ties.append(near_tie(rounded, exact, prompt, produced, wanted))
    for gap, off in ties:
        assert gap < 2 * off, f"logits {gap:.4f} apart, rounding explains {2 * off:.4f}"
    assert len(ties) <= 0.75 * len(asked)
    config = ReplicaConfig(str(llama_bf16), dtype="float32", device=device, page_tokens=16)
    in_float32 = answers(Scheduler(build_runner(config), 300), asked)
    assert in_float32 == [expected(exact, prompt) for prompt in asked]


def near_tie(
    rounded: Reference,
    exact: Reference,
    prompt: Sequence[int],
    produced: Sequence[int],
    wanted: Sequence[int],
) -> tuple[float, float]:
    """At the first difference: how far the worse token's logit is from the best one's in float32,
    and by how much bfloat16 logits are off there at most."""
    same = next(
        at for at, pair in enumerate(zip(produced, wanted, strict=True)) if len({*pair}) > 1
    )
    context = torch.tensor([[*prompt, *wanted[:same]]])
    with torch.inference_mode():
        logits = exact(context).logits[0, -1]
        off = float((rounded(context).logits[0, -1].float() - logits).abs().max())
    both = logits[[produced[same], wanted[same]]]
    return float(logits.max() - both.min()), off


def test_preempted_sequences_are_computed_anew(llama: Path) -> None:
    """With pages for a third of what runs the answers stay, and preemptions are counted."""
    asked = [prompt[:100] for prompt in prompts(12, 400)]
    roomy = build_runner(ReplicaConfig(str(llama), page_tokens=16, kv_tokens=4096))
    tight = build_runner(ReplicaConfig(str(llama), page_tokens=16, kv_tokens=256))
    scheduler = Scheduler(tight, 64)
    assert answers(scheduler, asked) == answers(Scheduler(roomy), asked)
    assert scheduler.preemptions > 0


def test_the_end_token_ends_an_answer_unless_it_is_ignored(llama: Path) -> None:
    """An answer up to the end token, or the asked number of tokens through it."""
    runner = build_runner(ReplicaConfig(str(llama), page_tokens=16))
    scheduler = Scheduler(runner)
    ignoring = scheduler.add(0, [5, 6, 7], Sampling(8, ignore_eos=True))
    scheduler.run_all()
    end = ignoring.tokens.produced[3]
    runner.model.config = type(runner.model.config)(
        **{
            **{name: getattr(runner.model.config, name) for name in runner.model.config.__slots__},
            "end_tokens": (end,),
        }
    )
    obeying = scheduler.add(1, [5, 6, 7], Sampling(8))
    scheduler.run_all()
    position = ignoring.tokens.produced.index(end)
    assert obeying.tokens.produced == ignoring.tokens.produced[: position + 1]
    assert (obeying.finish, ignoring.finish) == ("stop", "length")
