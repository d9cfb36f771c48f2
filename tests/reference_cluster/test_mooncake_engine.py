"""Does Mooncake's engine use what it was asked for, and is a user told what is missing?"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from reference_cluster.transports.bytes import TransportError
from reference_cluster.transports.mooncake import FORCE, open_devices, started

IS_INSTALLED = importlib.util.find_spec("mooncake") is not None
HAS_DEVICE = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
needs_the_engine = pytest.mark.skipif(not IS_INSTALLED, reason="mooncake is not installed")


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine reads the environment, which ends with the test."""
    for variable in FORCE.values():
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


@pytest.mark.skipif(IS_INSTALLED, reason="mooncake is installed")
def test_a_missing_engine_names_its_packages() -> None:
    """One line: the extra, and what apt must bring."""
    with pytest.raises(TransportError, match=r"mooncake-bench\[mooncake\].*libibverbs1"):
        started("tcp", "127.0.0.1", "")


@needs_the_engine
@pytest.mark.skipif(HAS_DEVICE, reason="there is an RDMA device")
def test_rdma_without_a_device_is_an_error() -> None:
    """Left to itself the engine would go over TCP and say success."""
    with pytest.raises(TransportError, match="does not start over rdma"):
        started("rdma", "127.0.0.1", "")


@needs_the_engine
def test_tcp_opens_no_device() -> None:
    """Over TCP the engine holds no RDMA device, whether there is one or not."""
    before = open_devices()
    engine = started("tcp", "127.0.0.1", "")
    assert open_devices() == before
    assert os.environ[FORCE["tcp"]] == "1"
    del engine
