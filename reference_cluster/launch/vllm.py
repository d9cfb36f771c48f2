"""What does the process of one vLLM instance do first? It finds out what it is, and says where.

python -m reference_cluster.launch.vllm --directory PLACE --name decode-0 --parent PID
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, cast

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.vllm import worker
from reference_cluster.engines.vllm.connectors import Role, Setting, make_connector
from reference_cluster.engines.vllm.server import Address, address_file
from reference_cluster.launch.process import die_with_parent, read_cluster


def arguments_of(config: ClusterConfig, role: Role) -> dict[str, Any]:
    """Of vLLM's engine, by the names of its Python API."""
    by_role: dict[Role, tuple[int, int, dict[str, Any]]] = {
        "prefill": (config.prefill.chunk_tokens, 64, config.vllm.prefill_arguments),
        "decode": (
            config.colocated.step_tokens_max,
            config.decode.batch_max,
            config.vllm.decode_arguments,
        ),
        "colocated": (config.colocated.step_tokens_max, config.colocated.batch_max, {}),
    }
    step_tokens, batch, more = by_role[role]
    given: dict[str, Any] = {
        "block_size": config.block_tokens,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(step_tokens, batch),
    }
    if role == "colocated":
        given["enable_prefix_caching"] = config.colocated.prefix_caching
        if config.colocated.batching == "prefill-first":
            given["enable_chunked_prefill"] = False
            given["max_num_batched_tokens"] = max(config.vllm.max_model_len, batch)
    return given | config.vllm.arguments | more


def words(config: ClusterConfig, name: str, setting: Setting) -> list[str]:
    """The worker's command line."""
    given: dict[str, Any] = {
        "model": config.engine.model,
        "name": name,
        "max-model-len": config.vllm.max_model_len,
        "kv-bytes": config.vllm.kv_bytes,
        "dtype": config.engine.dtype or "auto",
        "engine-arguments": json.dumps(arguments_of(config, role_of(name))),
    }
    if setting.transfer is not None:
        given["kv-transfer-config"] = json.dumps(setting.transfer)
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def role_of(name: str) -> Role:
    return cast("Role", name.rsplit("-", 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="reference_cluster.launch.vllm", description=__doc__)
    parser.add_argument("--directory", required=True, help="where the cluster's processes meet")
    parser.add_argument("--name", required=True, help="of the instance")
    parser.add_argument("--parent", type=int, required=True, help="the process to die with")
    asked = parser.parse_args()
    die_with_parent(asked.parent)
    config, _ = read_cluster(asked.directory)
    if config.workers.cpus:
        place = config.instance_names.index(asked.name)
        os.sched_setaffinity(0, config.workers.cpus[place])
    # Its shared memory has the cluster's name, so that the supervisor finds what a kill left.
    prefix = "-".join(Path(asked.directory).name.split("-")[:3]) + "-"
    setting = make_connector(config).setting(config, role_of(asked.name), prefix)
    # Warnings of things that are as they should be fill a screen for each worker.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update(setting.environment | config.vllm.environment)

    def announce(port: int) -> None:
        file = address_file(asked.directory, asked.name)
        content = Address(f"http://127.0.0.1:{port}", os.getpid(), setting.facts)
        aside = file.with_suffix(".new")
        aside.write_bytes(msgspec.json.encode(content))
        aside.rename(file)

    worker.main(words(config, asked.name, setting), announce)


if __name__ == "__main__":
    main()
