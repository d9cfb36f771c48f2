"""What deploy/vllm-pd would start, by dry run."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "vllm-pd"
EIGHT = "0 1 2 3 4 5 6 7"


def dry_run(**settings: str) -> list[list[str]]:
    """The words of each command; `env` and its variables first."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "MODEL": "a model"} | settings
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def variables(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(name + "="))


def role(words: list[str]) -> str:
    return json.loads(after(words, "--kv-transfer-config"))["kv_role"]


def test_one_host_is_four_and_four_behind_a_proxy():
    """Every GPU once, no port twice, and the proxy knows all eight."""
    *workers, proxy = dry_run(PROXY="proxy.py")
    assert [variables(words, "CUDA_VISIBLE_DEVICES") for words in workers] == EIGHT.split()
    assert [role(words) for words in workers] == ["kv_producer"] * 4 + ["kv_consumer"] * 4
    ports = [after(words, "--port") for words in [*workers, proxy]]
    side = [variables(words, "VLLM_NIXL_SIDE_CHANNEL_PORT") for words in workers]
    assert len({*ports, *side}) == 17
    assert proxy[proxy.index("--prefiller-ports") + 1 :][:4] == ports[:4]
    assert proxy[proxy.index("--decoder-ports") + 1 :][:4] == ports[4:8]


def test_two_hosts_are_eight_and_eight():
    """The proxy on the second names the first one's workers at the ports that they have."""
    first = dry_run(HOST="10.0.0.1", PREFILL_GPUS=EIGHT, DECODE_GPUS="")
    places = " ".join(f"{after(words, '--host')}:{after(words, '--port')}" for words in first)
    second = dry_run(
        HOST="10.0.0.2", PREFILL_GPUS="", DECODE_GPUS=EIGHT, PREFILL=places, PROXY="proxy.py"
    )
    proxy = second[-1]
    assert [role(words) for words in first + second[:-1]] == ["kv_producer"] * 8 + [
        "kv_consumer"
    ] * 8
    hosts = proxy[proxy.index("--prefiller-hosts") + 1 :][:8]
    assert (hosts, after(proxy, "--decoder-hosts")) == (["10.0.0.1"] * 8, "10.0.0.2")
    assert places in (SCRIPT.parent / "README.md").read_text()


def test_a_missing_setting_is_one_line():
    """No model; a proxy with nobody behind it."""
    for settings in ({}, {"MODEL": "m", "PROXY": "p", "DECODE_GPUS": "", "DRY_RUN": "1"}):
        environment = {"PATH": os.environ["PATH"]} | settings
        done = subprocess.run(
            [SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.vllm
def test_vllm_knows_every_flag():
    """Its own parser takes the commands of both roles."""
    serve = pytest.importorskip("vllm.entrypoints.cli.serve")
    parsing = pytest.importorskip("vllm.utils.argparse_utils")
    for words in dry_run(VLLM_ARGS="--max-model-len 32768"):
        parser = parsing.FlexibleArgumentParser()
        serve.ServeSubcommand().subparser_init(parser.add_subparsers())
        chosen = parser.parse_args(words[words.index("vllm") + 1 :])
        assert chosen.kv_transfer_config.kv_connector == "NixlConnector"
        assert chosen.max_model_len == 32768
