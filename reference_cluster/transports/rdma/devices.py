"""Which RDMA devices can be used, and which are near the memory? Read from /sys alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reference_cluster.errors import ConfigError

SYSFS = Path("/sys")
PORT = 1
# A GID made of an IPv4 address. GID 0 is the link-local one, which has no route on many networks.
IPV4_GID = "0000:0000:0000:0000:0000:ffff:"


@dataclass(frozen=True, slots=True)
class Device:
    """One device whose port is up and has an address that peers reach it by."""

    name: str
    numa_node: int | None = None


def usable_devices(sysfs: Path = SYSFS) -> list[Device]:
    """All devices with an active port that has an IPv4 address, by name."""
    found = []
    for home in sorted((sysfs / "class/infiniband").glob("*")):
        is_active = text(home / f"ports/{PORT}/state").endswith("ACTIVE")
        if is_active and ipv4_gid(home.name, sysfs) is not None:
            found.append(Device(home.name, numa_node_of(home, sysfs)))
    return found


def ipv4_gid(device: str, sysfs: Path = SYSFS) -> tuple[int, str] | None:
    """Index and text of the device's first IPv4 address for RoCE v2, as they are now.

    When a network device goes down and up again its addresses may change places.
    """
    port = sysfs / f"class/infiniband/{device}/ports/{PORT}"
    for entry in sorted((port / "gids").glob("*"), key=lambda path: int(path.name)):
        gid = text(entry)
        if gid.startswith(IPV4_GID) and text(port / "gid_attrs/types" / entry.name) == "RoCE v2":
            return int(entry.name), gid
    return None


def numa_node_of(device: Path, sysfs: Path) -> int | None:
    """The NUMA node a device hangs at; a soft device hangs where its network device does."""
    network = sysfs / "class/net" / (text(device / "parent") or "-")
    for home in (device, network):
        node = text(home / "device/numa_node")
        if node and int(node) >= 0:
            return int(node)
    return None


def own_numa_node(sysfs: Path = SYSFS) -> int | None:
    """The one NUMA node this process may run on; None where there are several or it is unknown."""
    nodes = {
        link.name
        for cpu in sorted(os.sched_getaffinity(0))
        for link in (sysfs / f"devices/system/cpu/cpu{cpu}").glob("node[0-9]*")
    }
    return int(nodes.pop().removeprefix("node")) if len(nodes) == 1 else None


def chosen(
    usable: Sequence[Device],
    preferred: Sequence[str],
    secondary: Sequence[str],
    near: int | None,
) -> tuple[list[Device], list[Device]]:
    """Devices to use and devices to fall back on, as named or else by topology.

    Unnamed, those at NUMA node `near` are preferred to the others; all are, if none is known to
    be there.
    """
    if preferred or secondary:
        by_name = {device.name: device for device in usable}
        for name in (*preferred, *secondary):
            if name not in by_name:
                there = ", ".join(by_name) or "none"
                raise ConfigError(
                    f"RDMA device {name!r} has no active port with an IPv4 address (usable:"
                    f" {there}); name another, or set its network device up"
                )
        return [by_name[name] for name in preferred], [by_name[name] for name in secondary]
    if not usable:
        raise ConfigError(
            "no RDMA device with an active port and an IPv4 address; `rdma link` lists them,"
            " `rdma link add rxe0 type rxe netdev lo` makes a soft one"
        )
    nearby = [device for device in usable if near is not None and device.numa_node == near]
    if not nearby:
        return list(usable), []
    return nearby, [device for device in usable if device not in nearby]


def text(path: Path) -> str:
    """A /sys file's text; none where it is missing or, as an empty GID entry, cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
