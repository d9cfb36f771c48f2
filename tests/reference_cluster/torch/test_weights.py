"""What is said, in one line, of a model that cannot be used?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_cluster.engines.torch.architecture import (  # noqa: E402
    PRESETS,
    Rope,
    read_config,
    rope_frequencies,
)
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.runner import TooLongError  # noqa: E402
from reference_cluster.engines.torch.scheduler import Scheduler  # noqa: E402
from reference_cluster.engines.torch.weights import Share, random_weights  # noqa: E402
from reference_cluster.errors import ConfigError  # noqa: E402
from reference_cluster.request import Sampling  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    given = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in given.items() if value != "gone"}))


def refusal(**settings: Any) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as caught:
        build_runner(ReplicaConfig(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; use one of llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": "gone"}, "'num_hidden_layers' is missing; add it"),
        ({"num_key_value_heads": 3}, "3 must divide num_attention_heads 4"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type is 'yarn'; use default"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
    ],
)
def test_a_wrong_config_is_named(model: Path, fields: dict[str, Any], said: str) -> None:
    """The file, the field and what would do."""
    edit(model, **fields)
    line = refusal(model=str(model))
    assert line.startswith(str(model / "config.json"))
    assert said in line


def test_a_missing_tensor_is_named(model: Path) -> None:
    """By its name in the file."""
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    line = refusal(model=str(model))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing; complete" in line


def test_a_wrong_shape_is_named_with_both_shapes(model: Path) -> None:
    """What the file has and what config.json means."""
    edit(model, intermediate_size=160)
    line = refusal(model=str(model))
    assert "mlp.gate_proj.weight has shape [192, 128], config.json means [160, 128]" in line


def test_a_damaged_file_and_no_file_are_named(model: Path) -> None:
    """With the remedy."""
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refusal(model=str(model))
    path.unlink()
    assert "no *.safetensors there; give a model directory" in refusal(model=str(model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float16"}, "dtype float16 is slow and inexact on cpu; use float32 or"),
        ({"dtype": "int4"}, "dtype 'int4' is not known; use one of float32"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not here"),
        ({"device": "tpu"}, "device 'tpu' is not known; use cpu or cuda:N"),
        ({"model": "nowhere"}, "model 'nowhere' is neither a directory nor one of tiny"),
        ({"kv_tokens": 8, "page_tokens": 16}, "0 pages of 16 tokens; give at least one"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, Any], said: str) -> None:
    """Device, dtype, model and pages."""
    assert said in refusal(**settings)


def test_a_context_longer_than_the_models_is_refused(model: Path) -> None:
    """Before anything is computed; likewise what can never fit the cache."""
    edit(model, max_position_embeddings=128)
    runner = build_runner(ReplicaConfig(str(model), kv_tokens=4096, page_tokens=16))
    scheduler = Scheduler(runner)
    with pytest.raises(TooLongError, match="120 prompt and 9 output tokens exceed the model's"):
        scheduler.add(0, [5] * 120, Sampling(9))
    scheduler.add(0, [5] * 120, Sampling(8))
    small = Scheduler(build_runner(ReplicaConfig(str(model), kv_tokens=64, page_tokens=16)))
    with pytest.raises(TooLongError, match="exceed the KV cache of 64 tokens; give it more pages"):
        small.add(0, [5] * 60, Sampling(5))


def test_a_sharded_model_is_read_by_its_index(model: Path, llama: Path) -> None:
    """Two files and an index say the same as one file."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, model / file)
    places = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = build_runner(ReplicaConfig(str(model))).model.weights
    whole = build_runner(ReplicaConfig(str(llama))).model.weights
    assert torch.equal(sharded.layers[2].qkv, whole.layers[2].qkv)
    assert torch.equal(sharded.head, whole.head)


def test_random_weights_depend_on_the_seed_only() -> None:
    """The tiny preset: a few million parameters, the same for the same seed."""
    config, cpu = PRESETS["tiny"], torch.device("cpu")
    one, same, other = (
        random_weights(config, seed, torch.float32, cpu, Share()) for seed in (1, 1, 2)
    )
    assert torch.equal(one.layers[3].down, same.layers[3].down)
    assert not torch.equal(one.layers[3].down, other.layers[3].down)
    assert config.parameters == 4_999_424


def test_the_presets_have_the_sizes_of_their_names() -> None:
    """6.7, 8.0 and 70.6 billion parameters; 320 KiB of KV a token for 70B in bfloat16."""
    billions = {name: round(preset.parameters / 1e9, 1) for name, preset in PRESETS.items()}
    assert billions == {"tiny": 0.0, "llama2-7b": 6.7, "llama3-8b": 8.0, "llama3-70b": 70.6}
    assert PRESETS["llama3-70b"].kv_bytes(2) == 327_680


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    """The first pair turns as before, the last one eight times slower."""
    scaled = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain, stretched = rope_frequencies(Rope(500_000.0), 128), rope_frequencies(scaled, 128)
    assert stretched[0] == plain[0]
    assert stretched[-1] == pytest.approx(plain[-1] / 8)


def test_old_configs_are_read_as_well(model: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as transformers 4 wrote them."""
    scaling = {"type": "linear", "factor": 4.0}
    edit(model, rope_parameters="gone", rope_theta=5e5, rope_scaling=scaling)
    assert read_config(model).rope == Rope(5e5, "linear", 4.0)
