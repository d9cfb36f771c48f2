"""Does a wrong configuration say what is wrong and what was meant?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reference_cluster.config import ClusterConfig, load_config
from reference_cluster.errors import ConfigError


def written(directory: Path, text: str | bytes) -> Path:
    path = directory / "cluster.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    """The one line that the user sees."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or {})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path) if path else "command line")
    return message


def test_nothing_given_is_the_default_cluster() -> None:
    """8P+8D of the default profile, or 16 colocated."""
    config = load_config(None, {})
    assert config == ClusterConfig()
    assert config.title == "8P+8D"
    assert load_config(None, {"system": "colocated"}).title == "16 colocated"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """What is not given (None) leaves the file's value alone."""
    path = written(tmp_path, "prefill_instances = 3\n[conductor]\nscheduling = 'random'")
    config = load_config(
        path, {"prefill_instances": 5, "conductor.scheduling": None, "slo.ttft_s": 10}
    )
    assert config.prefill_instances == 5
    assert config.conductor.scheduling == "random"
    assert config.slo.ttft_s == 10.0


@pytest.mark.parametrize(
    ("text", "key", "neighbour"),
    [
        ("prefil_instances = 3", "'prefil_instances'", "prefill_instances"),
        ("[conductor]\nschedule = 'random'", "[conductor] 'schedule'", "scheduling"),
        ("[prefill]\nchunk = 3", "[prefill] 'chunk'", "chunk_tokens"),
        ("[colocated]\nzzz = 3", "[colocated] 'zzz'", "batching, prefix_caching"),
    ],
)
def test_an_unknown_key_names_its_neighbours(
    tmp_path: Path, text: str, key: str, neighbour: str
) -> None:
    """The key, its section, and what may have been meant; all of a section if nothing is near."""
    message = complaint(written(tmp_path, text))
    assert f"unknown key {key}" in message
    assert neighbour in message.split("did you mean")[1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("prefill_instances = 0", "prefill_instances is 0; it must be positive"),
        ("block_tokens = -1", "block_tokens is -1"),
        ("sample_every_s = nan", "sample_every_s is nan"),
        ("[slo]\ntbt_s = 0", "slo.tbt_s is 0"),
        ("[decode]\nbatch_max = 0", "decode.batch_max is 0"),
        ("[decode]\ndevice_tokens = 0", "decode.device_tokens is 0"),
        ("[colocated]\ndevice_tokens = -5", "colocated.device_tokens is -5"),
        ("[prefill]\ndram_tokens = -5", "prefill.dram_tokens is -5"),
        ("[network]\nlink_bytes_per_s = 0.0", "network.link_bytes_per_s is 0"),
        ("[conductor]\nbalancing_threshold = 0.9", "conductor.balancing_threshold must be at"),
        ("[conductor]\nbalancing_threshold = nan", "conductor.balancing_threshold must be at"),
        ("[conductor]\ndecode_s = -1", "conductor.decode_s is -1"),
        ("[conductor]\nreport_every_s = -1", "conductor.report_every_s is -1"),
        ("[prefill]\nssd_tokens = -1", "prefill.ssd_tokens is -1"),
        ("[prefill]\nnodes_per_group = 3", "must divide prefill_instances"),
        ("[prefill]\nnodes_per_group = 0", "prefill.nodes_per_group is 0"),
        ("[prefill]\neviction = 'fifo'", "'fifo'"),
        ("[colocated]\nstep_tokens_max = 256", "step_tokens_max must exceed"),
        ("system = 'mixed'", "'mixed'"),
        ("[conductor]\nadmission = 3", "conductor.admission"),
        ("prefill_instances = 2.5", "prefill_instances"),
        ("conductor = 3", "conductor"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, text: str, part: str) -> None:
    """Which key, what it is, and that it is to be mended."""
    message = complaint(written(tmp_path, text))
    assert part in message
    assert "mend" in message


def test_a_bad_flag_is_named() -> None:
    """Overrides are checked as the file is."""
    assert "decode_instances is 0" in complaint(None, {"decode_instances": 0})
    assert "unknown key [slo] 'ttft'" in complaint(None, {"slo.ttft": 3})


def test_a_flag_for_a_section_that_is_none(tmp_path: Path) -> None:
    """`conductor = 3` cannot take a --scheduling on top; the file is at fault, not the program."""
    message = complaint(written(tmp_path, "conductor = 3"), {"conductor.scheduling": "random"})
    assert "[conductor]" in message


@pytest.mark.parametrize("text", ["system = ", "[conductor", b"\xff\xfe\x00"])
def test_broken_toml_is_named(tmp_path: Path, text: str | bytes) -> None:
    """Not TOML, not even text: one line."""
    assert "not valid TOML" in complaint(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """So is a directory in its place."""
    assert "No such file" in complaint(tmp_path / "none.toml")
    assert "directory" in complaint(tmp_path)
