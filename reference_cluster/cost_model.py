"""How long does it take? Closed forms for prefill, decode and transfer; coefficients are profiles.

Pure arithmetic in seconds, tokens and bytes. Prefill is quadratic in the prompt, a decode step
linear in batch and context (FACTS of the papers' latency figures; source and error stand in each
profile of `profiles/*.toml`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources

import msgspec
import numpy as np
import numpy.typing as npt

from reference_cluster.errors import ConfigError


class PrefillCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """base + token (n-p) + token2 (n^2-p^2) + reused p seconds for n prompt, p reused tokens."""

    base_s: float
    token_s: float
    token2_s: float
    reused_token_s: float = 0.0  # Loading a reused token's KV from host memory, what is not hidden.


class DecodeCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """base + sequence B + context C seconds a step for B sequences with C tokens of context."""

    base_s: float
    sequence_s: float
    context_token_s: float


class Overheads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine of its time adds to bare kernel times, in seconds; nothing unless stated."""

    step_s: float = 0.0  # Each step of any system: scheduling, sampling, launching kernels.
    prefix_caching_step_s: float = 0.0  # Each step of a colocated instance with prefix caching.
    prefix_caching_prefill_s: float = 0.0  # Each prompt there: hashing and looking up its blocks.
    chunked_step_s: float = 0.0  # Each step that carries prefill chunks beside its decodes.
    # From all KV being at the decode instance to the first token at the client, beside no other's
    # work: messages, HTTP; and a token of the prompt, taking its KV in.
    handover_s: float = 0.0
    handover_token_s: float = 0.0


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one node: its speeds and sizes, where they come from and how wrong they are."""

    name: str
    model: str
    node: str
    source: str
    error: str
    prefill: PrefillCost
    decode: DecodeCost
    layers: int
    kv_bytes_per_token: int
    device_kv_tokens: int  # KV that fits beside the weights in the node's device memory.
    dram_kv_tokens: int  # KV that a node gives to the pool.
    link_bytes_per_s: float  # Of a node's NICs, each direction.
    # What `error` says, as relative errors to reckon with: of a prefill, of a step in batches.
    prefill_error: float = 0.0
    decode_error: float = 0.0
    chunk_factor: float = (
        1.0  # Dearer computing of a prefill chunk that shares a step with decodes.
    )
    # Reading a node's SSD. Not from the papers: assumed, one NVMe drive on PCIe 4.0 x4.
    ssd_bytes_per_s: float = 6e9
    overheads: Overheads = Overheads()


class CostModel:
    """The arithmetic of one profile. All times in seconds.

    With `is_reuse_on_device` a reused prefix lies in device memory already and costs no load; with
    `is_prefix_caching` a colocated instance pays for the bookkeeping of its cache. With `stages`
    above 1 a prefill instance is a group of as many nodes, each with its share of the layers,
    through which the chunks of prompts flow (chunked pipeline parallelism, CPP).
    """

    def __init__(
        self,
        profile: Profile,
        is_reuse_on_device: bool = False,
        is_prefix_caching: bool = False,
        stages: int = 1,
        chunk_tokens: int = 1,
    ) -> None:
        self.profile = profile
        self.stages = stages
        self.chunk_tokens = chunk_tokens
        prefill, decode = profile.prefill, profile.decode
        self.base_s, self.token_s, self.token2_s = prefill.base_s, prefill.token_s, prefill.token2_s
        self.reused_token_s = 0.0 if is_reuse_on_device else prefill.reused_token_s
        self.step_base_s, self.sequence_s = decode.base_s, decode.sequence_s
        self.context_token_s = decode.context_token_s
        overheads = profile.overheads
        self.step_base_s += overheads.step_s
        self.chunked_step_s = overheads.chunked_step_s
        # Of a prompt, wherever it is computed; a mixed step has no base of its own to hold it.
        self.caching_s = 0.0
        if is_prefix_caching:
            self.caching_s = overheads.prefix_caching_prefill_s
            self.base_s += self.caching_s
            self.step_base_s += overheads.prefix_caching_step_s

    def prefill_s(self, input_tokens: int, reused_tokens: int = 0) -> float:
        """A whole prefill of which `reused_tokens` need no computing, from start to last layer.

        In a group of X stages, alone there: base + load of what is reused + computing / X
        + (X - 1) / X of the dearest chunk's computing (the last, unless that is a small rest). All
        chunks pass the first stage one by one, and the dearest is in nobody's shadow thereafter.
        """
        n, p = input_tokens, reused_tokens
        computing_s = self.token_s * (n - p) + self.token2_s * (n * n - p * p)
        if self.stages > 1:
            computing_s += (self.stages - 1) * self.dearest_chunk_s(n, p)
            computing_s /= self.stages
        return self.base_s + computing_s + self.reused_token_s * p

    def occupied_s(self, input_tokens: int, reused_tokens: int = 0) -> float:
        """How long a prefill keeps the next from starting: its time in the first stage."""
        n, p = input_tokens, reused_tokens
        computing_s = self.token_s * (n - p) + self.token2_s * (n * n - p * p)
        return self.base_s + computing_s / self.stages + self.reused_token_s * p

    def dearest_chunk_s(self, input_tokens: int, reused_tokens: int) -> float:
        """Computing of the last full chunk or of the rest behind it, whichever takes longer."""
        full = (input_tokens - reused_tokens) // self.chunk_tokens
        rest = reused_tokens + full * self.chunk_tokens
        rest_s = self.compute_s(rest, input_tokens)
        if not full:
            return rest_s
        return max(rest_s, self.compute_s(rest - self.chunk_tokens, rest))

    def compute_s(self, start: int, end: int) -> float:
        """Computing the prompt tokens [start, end), attending to all before them."""
        return self.token_s * (end - start) + self.token2_s * (end * end - start * start)

    def step_s(self, batch: int, context_tokens: int) -> float:
        """One decode step of `batch` sequences that hold `context_tokens` together."""
        return self.step_base_s + self.sequence_s * batch + self.context_token_s * context_tokens

    def steps_s(
        self, batch: npt.NDArray[np.int64], context_tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """`step_s` of many batches, to the same last bit."""
        return self.step_base_s + self.sequence_s * batch + self.context_token_s * context_tokens

    def mixed_step_s(self, batch: int, context_tokens: int, chunk_s: float) -> float:
        """A decode step that also carries prefill chunks of `chunk_s` seconds' computing."""
        decoding_s = self.step_s(batch, context_tokens) + self.chunked_step_s
        return decoding_s + self.profile.chunk_factor * chunk_s

    def growth_s(self, batch: int) -> float:
        """How much longer each step of a batch is than the one before: one token a sequence."""
        return self.context_token_s * batch

    def span_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """`steps` steps in a row with unchanged members."""
        first = steps * self.step_s(batch, context_tokens)
        return first + self.growth_s(batch) * steps * (steps - 1) / 2

    def steps_within(self, batch: int, context_tokens: int, elapsed_s: float) -> float:
        """Steps (with a fraction) done `elapsed_s` after the start: the inverse of span_s."""
        a = self.context_token_s * batch / 2
        b = self.step_base_s + self.sequence_s * batch + self.context_token_s * context_tokens - a
        if a == 0:
            return elapsed_s / b
        # The root in the form that does not cancel for small a.
        return 2 * elapsed_s / (b + math.sqrt(b * b + 4 * a * elapsed_s))

    def whole_steps_within(self, batch: int, context_tokens: int, elapsed_s: float) -> int:
        """Steps that have ended by now; one that ends at this very instant (1e-6 of it) has."""
        return math.floor(self.steps_within(batch, context_tokens, elapsed_s) + 1e-6)

    def whole_steps(
        self,
        batch: npt.NDArray[np.int64],
        context_tokens: npt.NDArray[np.int64],
        elapsed_s: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.int64]:
        """`whole_steps_within` of many batches that have run for a while, to the same last bit."""
        a = self.context_token_s * batch / 2
        b = self.step_base_s + self.sequence_s * batch + self.context_token_s * context_tokens - a
        if self.context_token_s:
            steps = 2 * elapsed_s / (b + np.sqrt(b * b + 4 * a * elapsed_s))
        else:
            steps = elapsed_s / b
        return np.floor(steps + 1e-6).astype(np.int64)

    def handover_s(self, input_tokens: int) -> float:
        """From a prompt's KV being at its decode instance to its first token."""
        overheads = self.profile.overheads
        return overheads.handover_s + overheads.handover_token_s * input_tokens

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.profile.kv_bytes_per_token


def profile_names() -> list[str]:
    """The profiles that come with the package."""
    directory = resources.files("reference_cluster") / "profiles"
    return sorted(file.name[:-5] for file in directory.iterdir() if file.name.endswith(".toml"))


def load_profile(name: str, overrides: Mapping[str, object] | None = None) -> Profile:
    """A profile by name, or by a path to a TOML file; raises ConfigError."""
    if name in profile_names():
        text = (resources.files("reference_cluster") / "profiles" / f"{name}.toml").read_text()
    elif name.endswith(".toml"):
        try:
            with open(name, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            raise ConfigError(f"profile {name}: {error.strerror}; give an existing file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"profile {name}: {error}; mend the file") from None
    else:
        known = ", ".join(profile_names())
        raise ConfigError(f"profile {name!r} does not exist; use one of {known}, or a .toml file")
    try:
        fields = {**msgspec.toml.decode(text), **(overrides or {})}
        return msgspec.convert(fields, Profile)
    except msgspec.DecodeError as error:
        raise ConfigError(f"profile {name}: {error}; mend the file") from None
