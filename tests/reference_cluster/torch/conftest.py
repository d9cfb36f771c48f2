"""Small models of every kind, as transformers writes them; skipped where torch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
transformers = pytest.importorskip("transformers", reason="transformers: make test-torch")

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def save(kind: str, directory: Path, dtype: str = "float32", **more: Any) -> Path:
    """Seeded random weights of one of transformers' architectures."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            # Not all ones and zeros, so that each of them matters.
            parameter.data.normal_(float(name.endswith("weight")), 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the engine computes; references stay on the CPU."""
    name: str = request.param
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip(f"no {name} here: a host with a CUDA device is needed")
    return name


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Llama", tmp_path_factory.mktemp("llama-bf16"), "bfloat16")


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def made(kind: str, name: str, **more: Any) -> Path:
        return save(kind, tmp_path_factory.mktemp(name), **more)

    return {
        "llama3-rope": made("Llama", "llama3", rope_parameters=LLAMA3_ROPE),
        "tied": made("Llama", "tied", tie_word_embeddings=True),
        "qwen2": made("Qwen2", "qwen2"),
        "qwen3": made("Qwen3", "qwen3"),
    }
