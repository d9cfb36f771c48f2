"""Are tokens drawn as asked, whoever else is in the batch?"""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.sampling import choose  # noqa: E402
from reference_cluster.engines.torch.scheduler import Scheduler  # noqa: E402
from reference_cluster.engines.torch.tokenizer import ByteTokenizer  # noqa: E402
from reference_cluster.request import Sampling  # noqa: E402

pytestmark = pytest.mark.torch
LOGITS = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))


def drawn(sampling: Sampling, count: int) -> Counter[int]:
    rows = LOGITS.repeat(count, 1)
    return Counter(choose(rows, [sampling] * count, range(count)))


def test_temperature_one_draws_by_probability() -> None:
    """Of 4,000 draws each share is within four standard deviations, sqrt(p (1-p) / 4000)."""
    counts = drawn(Sampling(temperature=1.0), 4000)
    for token, chance in enumerate([0.05, 0.5, 0.15, 0.3]):
        deviation = (chance * (1 - chance) / 4000) ** 0.5
        assert counts[token] / 4000 == pytest.approx(chance, abs=4 * deviation)


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    """0.5 and 0.3 make up 0.7; the others are never drawn."""
    counts = drawn(Sampling(temperature=1.0, top_p=0.7), 500)
    assert sorted(counts) == [1, 3]
    assert sorted(drawn(Sampling(temperature=1.0, top_p=1e-9), 50)) == [1]


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    """Each row has its own wish."""
    wishes = [Sampling(), Sampling(temperature=2.0), Sampling()]
    chosen = choose(LOGITS.repeat(3, 1), wishes, [0, 0, 0])
    assert (chosen[0], chosen[2]) == (1, 1)


def test_a_seed_fixes_the_answer_in_any_company() -> None:
    """Alone or in a batch, the same seed says the same, another seed something else."""
    runner = build_runner(ReplicaConfig(page_tokens=16, kv_tokens=4096))
    wish = Sampling(12, temperature=1.0, seed=3, ignore_eos=True)
    scheduler = Scheduler(runner)
    alone = scheduler.add(0, [9, 8, 7], wish)
    scheduler.run_all()
    others = [
        scheduler.add(1 + seed, [9, 8, 7], Sampling(12, 1.0, seed=seed, ignore_eos=True))
        for seed in range(5)
    ]
    scheduler.run_all()
    assert others[3].tokens.produced == alone.tokens.produced
    assert others[4].tokens.produced != alone.tokens.produced


def test_a_stop_string_ends_the_answer() -> None:
    """The answer stops with the token that completes the string."""
    tokenizer = ByteTokenizer()
    runner = build_runner(ReplicaConfig(page_tokens=16, kv_tokens=4096))
    scheduler = Scheduler(runner, tokenizer=tokenizer)
    prompt = tokenizer.encode("once upon")
    free = scheduler.add(0, prompt, Sampling(20, ignore_eos=True))
    scheduler.run_all()
    stop = tokenizer.decode(free.tokens.produced[4:6])
    stopped = scheduler.add(1, prompt, Sampling(20, ignore_eos=True, stop=(stop,)))
    scheduler.run_all()
    assert stopped.finish == "stop"
    assert stop in tokenizer.decode(stopped.tokens.produced)
    assert len(stopped.tokens.produced) <= 6


def test_bytes_come_back_as_text() -> None:
    """Any text survives the tiny model's tokenizer."""
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve 🦙")) == "naïve 🦙"
