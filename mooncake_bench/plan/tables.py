"""What would a node do that nobody has measured here? A profile fitted to aiconfigurator's tables.

aiconfigurator-core predicts prefills and decode steps from measured kernel tables. The closed forms
of the cost model are fitted to its predictions by least squares of the relative error, and the
largest error of the fit is stated in the profile. These are predictions, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.spec import Tables
from reference_cluster.cost_model import DecodeCost, PrefillCost, Profile

try:
    from aiconfigurator_core.sdk.engine import EngineHandle
except ImportError:  # Told by `profile_from`, in one line.
    EngineHandle = None

PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES, CONTEXTS = (1, 8, 32, 64, 128), (1024, 8192, 32768)
HOST_BYTES_PER_S = 256e9  # Loading a reused prefix from host memory: assumed.
MIXED = (2048, 32, 8192, 512)  # Chunk tokens, decodes, their context, their output.


def profile_from(tables: Tables) -> Profile:
    """Ask aiconfigurator and fit. Raises PlanError where it is not installed or has no tables."""
    if EngineHandle is None:
        raise PlanError(
            "profiles.tables needs aiconfigurator; install the extra: "
            'pip install "mooncake-bench[aiconfigurator]"'
        )
    modes = dict.fromkeys(("gemm_quant_mode", "kvcache_quant_mode", "fmha_quant_mode"), "bfloat16")
    try:
        engine = EngineHandle.compile(
            tables.model, tables.system, tables.backend, tp_size=tables.tp, **modes
        )
    except Exception as error:  # noqa: BLE001  # Whatever its own layers raise, it is one line here.
        first = str(error).strip().split("\n", 1)[0]
        raise PlanError(f"profiles.tables: {tables.system}, {tables.model}: {first}") from None
    return fitted(tables, engine)


def fitted(tables: Tables, engine: Any) -> Profile:
    """The closed forms through the engine's predictions, in seconds."""
    prompts = np.array(PROMPTS, dtype=np.float64)
    measured = [engine.predict_prefill_latency(1, n, 0) / 1e3 for n in PROMPTS]
    prefill, prefill_error = relative_fit(
        np.stack([np.ones_like(prompts), prompts, prompts**2], axis=1), np.array(measured)
    )
    grid = [(batch, context) for batch in BATCHES for context in CONTEXTS]
    steps = [engine.decode_step_latency(batch, context, 2) / 1e3 for batch, context in grid]
    terms = np.array([[1.0, batch, batch * context] for batch, context in grid])
    decode, decode_error = relative_fit(terms, np.array(steps))
    chunk, beside, context, output = MIXED
    mixed_s = engine.mixed_step_breakdown(chunk, beside, context, output)[0] / 1e3
    own_s = decode[0] + decode[1] * beside + decode[2] * beside * context
    factor = max(1.0, (mixed_s - own_s) / (prefill[1] * chunk + prefill[2] * chunk**2))
    return Profile(
        name=f"{tables.system}-{tables.model.rpartition('/')[2].lower()}-tp{tables.tp}",
        model=tables.model,
        node=f"{tables.tp} x {tables.system}, tensor parallel {tables.tp}",
        source=f"closed form through aiconfigurator-core's kernel tables ({tables.backend}), "
        "1k-128k prompts, batch 1-128, contexts 1k-32k",
        error=f"prefill within {prefill_error:.1%}, a decode step within {decode_error:.1%} of "
        "its predictions, which are no end-to-end measurements; loading a reused prefix is assumed",
        prefill=PrefillCost(
            base_s=float(prefill[0]),
            token_s=float(prefill[1]),
            token2_s=float(prefill[2]),
            reused_token_s=tables.kv_bytes_per_token / HOST_BYTES_PER_S,
        ),
        decode=DecodeCost(*map(float, decode)),
        layers=tables.layers,
        kv_bytes_per_token=tables.kv_bytes_per_token,
        device_kv_tokens=tables.device_kv_tokens,
        dram_kv_tokens=tables.dram_kv_tokens,
        link_bytes_per_s=tables.link_bytes_per_s,
        prefill_error=round(prefill_error, 4),
        decode_error=round(decode_error, 4),
        chunk_factor=round(float(factor), 3),
    )


def relative_fit(terms: Any, measured_s: Any) -> tuple[Any, float]:
    """Coefficients of least squared relative error, none below 0, and the largest such error."""
    kept = list(range(terms.shape[1]))
    while True:
        scaled = terms[:, kept] / measured_s[:, None]
        found = np.linalg.lstsq(scaled, np.ones(len(measured_s)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(np.argmin(found)))
    coefficients = np.zeros(terms.shape[1])
    coefficients[kept] = found
    error = np.abs(terms @ coefficients / measured_s - 1.0).max()
    return coefficients, float(error)


def write_profile(tables: Tables, directory: Path, make: Callable[[Tables], Profile]) -> Path:
    """The fitted profile as a file that `--profile` takes. Raises PlanError."""
    profile = make(tables)
    path = directory / f"{profile.name}.toml"
    lines, sections = [], []
    for name, value in msgspec.to_builtins(profile).items():
        if isinstance(value, dict):
            sections += ["", f"[{name}]", *(f"{key} = {one!r}" for key, one in value.items())]
        else:
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, *sections]) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; choose another --out") from None
    return path
