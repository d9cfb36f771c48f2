"""Are RDMA devices found, and chosen by name or by nearness, without one being there?"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from reference_cluster.errors import ConfigError
from reference_cluster.transports.rdma import control
from reference_cluster.transports.rdma.devices import (
    Device,
    chosen,
    ipv4_gid,
    own_numa_node,
    usable_devices,
)

LINK_LOCAL = "fe80:0000:0000:0000:0200:00ff:fe00:0000"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"
NONE = "0000:0000:0000:0000:0000:0000:0000:0000"
NEAR, FAR, SOFT = Device("mlx5_0", 0), Device("mlx5_1", 1), Device("rxe0")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def a_device(
    sysfs: Path,
    name: str,
    gids: tuple[tuple[str, str], ...],
    state: str = "4: ACTIVE",
    numa_node: int | None = None,
) -> None:
    home = sysfs / "class/infiniband" / name
    write(home / "ports/1/state", state)
    for index, (gid, kind) in enumerate(gids):
        write(home / f"ports/1/gids/{index}", gid)
        write(home / f"ports/1/gid_attrs/types/{index}", kind)
    if numa_node is not None:
        write(home / "device/numa_node", str(numa_node))


V1, V2 = "IB/RoCE v1", "RoCE v2"


def test_a_device_needs_an_active_port_with_an_ipv4_address(tmp_path: Path) -> None:
    """The others are not there for us."""
    a_device(tmp_path, "mlx5_0", ((LINK_LOCAL, V2), (IPV4, V2)), numa_node=1)
    a_device(tmp_path, "mlx5_1", ((LINK_LOCAL, V2), (IPV4, V2)), state="1: DOWN")
    a_device(tmp_path, "mlx5_2", ((LINK_LOCAL, V2), (NONE, "")))
    assert usable_devices(tmp_path) == [Device("mlx5_0", 1)]
    assert usable_devices(tmp_path / "nothing") == []


def test_the_address_is_the_first_ipv4_one_of_the_second_version(tmp_path: Path) -> None:
    """Not the link-local GID 0, nor the same address for RoCE v1; 10 comes after 9."""
    entries = [(LINK_LOCAL, V1), (LINK_LOCAL, V2), (IPV4, V1)] + [(NONE, "")] * 7 + [(IPV4, V2)]
    a_device(tmp_path, "mlx5_0", tuple(entries))
    assert ipv4_gid("mlx5_0", tmp_path) == (10, IPV4)


def test_a_soft_device_is_where_its_network_device_is(tmp_path: Path) -> None:
    """It has no place of its own; -1 means that the machine does not say."""
    a_device(tmp_path, "rxe0", ((IPV4, V2),))
    write(tmp_path / "class/infiniband/rxe0/parent", "eth0")
    assert usable_devices(tmp_path) == [SOFT]
    write(tmp_path / "class/net/eth0/device/numa_node", "-1")
    assert usable_devices(tmp_path) == [SOFT]
    write(tmp_path / "class/net/eth0/device/numa_node", "1")
    assert usable_devices(tmp_path) == [Device("rxe0", 1)]


def test_a_process_bound_to_one_node_is_there(tmp_path: Path) -> None:
    """A process that may run on two nodes is near to none."""
    cpus = sorted(os.sched_getaffinity(0))
    assert own_numa_node(tmp_path) is None
    for cpu in cpus:
        (tmp_path / f"devices/system/cpu/cpu{cpu}/node1").mkdir(parents=True)
    assert own_numa_node(tmp_path) == 1
    (tmp_path / f"devices/system/cpu/cpu{cpus[0]}/node0").mkdir()
    assert own_numa_node(tmp_path) is None


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        (0, ([NEAR], [FAR, SOFT])),
        (1, ([FAR], [NEAR, SOFT])),
        (2, ([NEAR, FAR, SOFT], [])),
        (None, ([NEAR, FAR, SOFT], [])),
    ],
)
def test_unnamed_the_near_devices_are_preferred(
    near: int | None, expected: tuple[list[Device], list[Device]]
) -> None:
    """And all of them, where nothing is known to be near."""
    assert chosen([NEAR, FAR, SOFT], (), (), near) == expected


def test_names_go_before_nearness() -> None:
    """What is not named is not used."""
    devices = [NEAR, FAR, SOFT]
    assert chosen(devices, ["mlx5_1"], ["rxe0"], near=0) == ([FAR], [SOFT])


def test_a_wrong_name_is_one_line_with_the_right_ones() -> None:
    """And so is a machine without any device."""
    with pytest.raises(ConfigError, match=r"'mlx5_7'.*usable: mlx5_0, rxe0"):
        chosen([NEAR, SOFT], ["mlx5_7"], (), None)
    with pytest.raises(ConfigError, match="no RDMA device"):
        chosen([], (), (), None)


def test_only_whole_messages_of_ours_are_heard() -> None:
    """What is cut short, too long or something else ends the conversation."""

    async def heard(data: bytes) -> control.Message | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await control.receive(reader)

    body = b"\x83\xa4type\xa5Hello\xa7version\x01\xa3key\xc4\x01k"
    length = len(body).to_bytes(4)
    assert asyncio.run(heard(length + body)) == control.Hello(1, b"k")
    for wrong in (b"", length + body[:-1], length + b"\x00" * len(body), b"\xff\xff\xff\xff"):
        assert asyncio.run(heard(wrong)) is None
