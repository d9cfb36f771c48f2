"""Which token comes next? The likeliest, or one drawn with a request's own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from reference_cluster.request import Sampling

COLDEST = 1e-5  # Below it logits divided by the temperature would overflow: as good as greedy.


def waits(seed: int, position: int, size: int) -> Tensor:
    """Exponential random times, one a token of the vocabulary, for this position of prompt and
    answer. They depend on nothing else: an answer goes on alike in another process."""
    digest = blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(size).exponential_(generator=generator)


def has_stopped(
    produced: Sequence[int],
    wish: Sampling,
    end_tokens: Sequence[int],
    say: Callable[[Sequence[int]], str] | None,
) -> bool:
    """Is the newest token an end token, or does it complete a stop string of what they `say`?"""
    if not wish.ignore_eos and produced[-1] in end_tokens:
        return True
    if not wish.stop or say is None:
        return False
    text = say(produced)
    return any(stop in text for stop in wish.stop)


def choose(logits: Tensor, wishes: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """A token a row of logits [row, vocabulary], for its position; no row minds the others."""
    best: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, wish in enumerate(wishes) if wish.temperature > COLDEST]
    if drawn:
        chosen = draw(
            logits[drawn], [wishes[row] for row in drawn], [positions[row] for row in drawn]
        )
        for row, token in zip(drawn, chosen, strict=True):
            best[row] = token
    return best


def draw(logits: Tensor, wishes: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """Of the likeliest tokens that make up top_p the first in a race, each as fast as it is likely.

    Its winner is drawn by the chances, and hardly ever another where rounding changes them a bit:
    inverting cumulated chances would meet a thousand times as many near ties.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    chances = torch.softmax(logits / column([wish.temperature for wish in wishes]), -1)
    ranked, order = chances.sort(-1, descending=True)
    # A token is kept if those before it do not make up top_p yet; the first always is.
    before = ranked.cumsum(-1) - ranked
    ranked.masked_fill_(before >= column([wish.top_p for wish in wishes]), 0)
    chances.scatter_(-1, order, ranked)
    pairs = zip(wishes, positions, strict=True)
    times = torch.stack([waits(wish.seed, at, logits.shape[-1]) for wish, at in pairs])
    tokens: list[int] = (chances / times.to(logits.device)).argmax(-1).tolist()
    return tokens
