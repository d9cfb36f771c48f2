"""Which model is it? The sizes and variants of the Llama family, from Hugging Face's config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_cluster.errors import ConfigError

# What each model_type adds to Llama: biases on q, k, v; norms on every head of q and k.
VARIANTS = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of a kind: default, linear, or llama3 with its band limits."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The sizes of one model. `kv_bytes` is what a token's KV takes in `dtype`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context_tokens_max: int
    norm_epsilon: float = 1e-5
    rope: Rope = Rope()
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    is_tied: bool = False  # The output head is the embedding.
    end_tokens: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        per_layer = attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.layers * per_layer + embeddings + self.hidden

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype_bytes


# Sizes to fill with seeded random weights: `tiny` for a laptop, the others as the papers' dummies.
PRESETS = {
    "tiny": LlamaConfig(4, 256, 4, 2, 64, 688, 4096, 32768, end_tokens=(1,)),
    "llama2-7b": LlamaConfig(32, 4096, 32, 32, 128, 11008, 32000, 4096, dtype="bfloat16"),
    "llama3-8b": LlamaConfig(
        32, 4096, 32, 8, 128, 14336, 128256, 131072, rope=Rope(500_000.0), dtype="bfloat16"
    ),
    "llama3-70b": LlamaConfig(
        80, 8192, 64, 8, 128, 28672, 128256, 131072, rope=Rope(500_000.0), dtype="bfloat16"
    ),
}


def read_config(directory: Path) -> LlamaConfig:
    """The config.json of a model directory; raises ConfigError in one line."""
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a model directory") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); mend the file") from None
    try:
        return from_fields(fields)
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]!r} is missing; add it") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def from_fields(fields: Mapping[str, Any]) -> LlamaConfig:
    """Hugging Face's names to ours; raises KeyError and ValueError."""
    kind = fields["model_type"]
    if kind not in VARIANTS:
        raise ValueError(f"model_type is {kind!r}; use one of {', '.join(VARIANTS)}")
    if fields.get("sliding_window") and fields.get("use_sliding_window", kind == "mistral"):
        raise ValueError("sliding_window is set; use a model with full attention")
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {fields['hidden_act']!r}; only silu is known")
    has_bias, has_qk_norm = VARIANTS[kind]
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    end = fields.get("eos_token_id")
    return LlamaConfig(
        layers=fields["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=fields["intermediate_size"],
        vocabulary=fields["vocab_size"],
        context_tokens_max=fields["max_position_embeddings"],
        norm_epsilon=fields["rms_norm_eps"],
        rope=read_rope(fields),
        has_qkv_bias=has_bias or bool(fields.get("attention_bias")),
        has_qk_norm=has_qk_norm,
        is_tied=bool(fields.get("tie_word_embeddings")),
        end_tokens=() if end is None else tuple(end) if isinstance(end, list) else (end,),
        dtype=fields.get("dtype") or fields.get("torch_dtype") or "float32",
    )


def read_rope(fields: Mapping[str, Any]) -> Rope:
    """transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = given.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, given["factor"])
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            given["factor"],
            given["low_freq_factor"],
            given["high_freq_factor"],
            given["original_max_position_embeddings"],
        )
    raise ValueError(f"rope type is {kind!r}; use default, linear or llama3")


def rope_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """Radians a position of each of the head_dim/2 pairs.

    llama3: wavelengths beyond the original context are stretched by `factor`, short ones stay, and
    between the two bands the frequency is interpolated (Llama 3.1, `apply_scaling`).
    """
    plain = [rope.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    if rope.kind == "linear":
        return [frequency / rope.factor for frequency in plain]
    if rope.kind == "llama3":
        return [stretched(frequency, rope) for frequency in plain]
    return plain


def stretched(frequency: float, rope: Rope) -> float:
    turns = rope.original_context * frequency / (2 * math.pi)  # Within the original context.
    share = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    kept = min(1.0, max(0.0, share))
    return kept * frequency + (1 - kept) * frequency / rope.factor
