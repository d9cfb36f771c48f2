"""Which token comes next? The likeliest, or one drawn with a request's own seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request wants its tokens; temperature 0 is greedy."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()


GREEDY = Sampling()


def choose(
    logits: Tensor, wishes: Sequence[Sampling], numbers: Sequence[random.Random]
) -> list[int]:
    """A token a row of logits [row, vocabulary]; a row draws from its own numbers only."""
    best: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, wish in enumerate(wishes) if wish.temperature > 0]
    if drawn:
        uniform = torch.tensor([numbers[row].random() for row in drawn], device=logits.device)
        for row, token in zip(drawn, draw(logits[drawn], drawn, wishes, uniform), strict=True):
            best[row] = token
    return best


def draw(
    logits: Tensor, rows: Sequence[int], wishes: Sequence[Sampling], uniform: Tensor
) -> list[int]:
    """Invert the cumulated probabilities of the likeliest tokens that make up top_p."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    temperatures = column([wishes[row].temperature for row in rows])
    chances, order = torch.softmax(logits / temperatures, -1).sort(-1, descending=True)
    reached = chances.cumsum(-1)
    # A token is kept if those before it do not make up top_p yet; the first always is.
    kept = chances.masked_fill(reached - chances >= column([wishes[row].top_p for row in rows]), 0)
    cumulated = kept.cumsum(-1)
    picked = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    picked = picked.minimum((kept > 0).sum(-1, keepdim=True) - 1)  # Not beyond by rounding.
    tokens: list[int] = order.gather(-1, picked)[:, 0].tolist()
    return tokens
