"""What does every process of a cluster do first? Find its configuration; die with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile

PR_SET_PDEATHSIG = 1
CLUSTER_FILE = "cluster.json"


class Resolved(msgspec.Struct, frozen=True):
    """All that the processes of one cluster have to agree on."""

    config: ClusterConfig
    profile: Profile


def write_cluster(directory: str, config: ClusterConfig, profile: Profile) -> None:
    content = msgspec.json.encode(Resolved(config, profile))
    (Path(directory) / CLUSTER_FILE).write_bytes(content)


def read_cluster(directory: str) -> tuple[ClusterConfig, Profile]:
    content = (Path(directory) / CLUSTER_FILE).read_bytes()
    resolved = msgspec.json.decode(content, type=Resolved)
    return resolved.config, resolved.profile


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, however it ends: no orphans. Where Linux offers it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the parent, process {parent}, has ended")
