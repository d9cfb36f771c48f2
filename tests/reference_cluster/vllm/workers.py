"""Workers of vLLM as processes of a test, and a tiny model for them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

BLOCK = 128
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
PAYLOAD_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4 * BLOCK
START_S = 300  # Two at a time on a busy machine.


def save_tiny_model(directory: Path, vocabulary: int = 4096, layers: int = LAYERS) -> Path:
    """A Llama of seeded random weights, large enough for KV to matter to its tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=16384,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path, vocabulary: int = 4096) -> None:
    """A word a token, so that every token of an answer is some text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A special word is found inside others: its name is no beginning of theirs.
    words = {"[2]" if number == 2 else f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[2]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[2]").save_pretrained(directory)


def a_prompt(seed: int, tokens: int, shared: int = 0) -> list[int]:
    """Random token ids, of which the first `shared` are every such prompt's."""
    common, own = random.Random(0), random.Random(seed + 1)
    first = [common.randrange(2, 4096) for _ in range(shared)]
    return first + [own.randrange(2, 4096) for _ in range(tokens - shared)]


LENGTHS = (
    *(40, 64, 127, 128, 129, 200, 255, 256, 257, 300, 400, 511, 512, 513, 640, 777, 1000),
    *(1024, 1025, 1300, 1536, 1792, 2048, 2049, 2500, 3000, 4000, 5000, 6500, 8192),
)
# Half of them begin alike, so that prefixes are found in the decode worker's own cache too.
PROMPTS = [a_prompt(i, n, shared=min(n, 600) * (i % 2)) for i, n in enumerate(LENGTHS)]
# 14 blocks each and soon 15; the decode worker has 71, so five begin and one must give way.
CROWD = [a_prompt(100 + i, 14 * BLOCK - 8) for i in range(6)]
CONTROL = [a_prompt(200 + i, 700) for i in range(6)]


class Worker:
    """One process of reference_cluster.engines.vllm.worker."""

    def __init__(self, model: Path, **flags: Any) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # open while the process is
        words = [sys.executable, "-m", "reference_cluster.engines.vllm.worker", "--model", model]
        for name, value in flags.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )
        self.http = httpx.Client(timeout=START_S, trust_env=False)

    def wait(self) -> Worker:
        """Until it serves; RuntimeError with the end of its log where it does not."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.http.base_url = httpx.URL(f"http://127.0.0.1:{line.strip()}")
                return self
        self.log.seek(0)
        raise RuntimeError(self.log.read().decode(errors="replace")[-3000:])

    def complete(
        self, prompt: list[int], tokens: int = 24, transfer: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer, whole."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body | {"kv_transfer_params": transfer})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, prompt: list[int], transfer: dict[str, Any] | None = None) -> list[int]:
        return self.complete(prompt, transfer=transfer)["choices"][0]["token_ids"]

    def prefill(self, prompt: list[int]) -> dict[str, Any] | None:
        """What the next worker must be told."""
        return self.complete(prompt, tokens=1)["kv_transfer_params"]

    def pool(self) -> dict[str, int]:
        return self.http.get("/pool").json()

    def count(self, name: str, labels: str = "") -> float:
        """The sum of a counter of vLLM's over series whose labels have this text."""
        return count_in(self.http.get("/metrics").text, name, labels)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        with contextlib.suppress(ProcessLookupError):  # Whatever it has left behind.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


def count_in(metrics: str, name: str, labels: str = "") -> float:
    """The sum of a counter over series whose labels have this text."""
    found = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", metrics, re.MULTILINE)
    return sum(float(value) for given, value in found if labels in given)


@contextlib.contextmanager
def running(*workers: Worker) -> Iterator[None]:
    """Workers that start side by side."""
    try:
        for worker in workers:
            worker.wait()
        yield
    finally:
        for worker in workers:
            worker.close()
