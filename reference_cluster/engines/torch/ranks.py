"""How does a live worker compute with several ranks? It is the first, and tells the others.

Every other rank is a process that does each command of the first in its order, and ends with it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec
import torch

from reference_cluster.engines.torch.parallel import all_wait, join, leave
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.sequences import (
    Attach,
    Command,
    Drop,
    Evict,
    Keep,
    Load,
    Sequences,
    Step,
)
from reference_cluster.engines.torch.weights import Share
from reference_cluster.transports.bytes import Segment

END_S_MAX = 10.0
encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(Command)


class Followers:
    """The ranks after the first; none without tensor parallelism."""

    def __init__(self, config: ReplicaConfig, block_tokens: int) -> None:
        self.connections: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.directory = tempfile.TemporaryDirectory(prefix="mooncake-bench-ranks-")
        self.address = f"file://{self.directory.name}/meet"
        context = multiprocessing.get_context("spawn")
        for rank in range(1, config.tensor_parallel):
            mine, theirs = context.Pipe()
            given = config, block_tokens, rank, self.address, theirs
            process = context.Process(target=follow, args=given, name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)

    def tell(self, command: Command) -> None:
        """Before the first rank does it itself."""
        if self.connections:
            message = encoder.encode(command)
            for connection in self.connections:
                connection.send_bytes(message)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(END_S_MAX)
            if process.is_alive():
                process.kill()
        if self.processes:
            leave()
        self.directory.cleanup()


def first_rank(config: ReplicaConfig, block_tokens: int) -> tuple[Sequences, Followers]:
    """A replica in this process, and its other ranks in theirs; raises ConfigError."""
    followers = Followers(config, block_tokens)
    if config.tensor_parallel == 1:
        return Sequences(build_runner(config), block_tokens), followers
    return ranked(config, block_tokens, 0, followers.address), followers


def ranked(config: ReplicaConfig, block_tokens: int, rank: int, address: str) -> Sequences:
    share = Share(rank, config.tensor_parallel)
    return Sequences(join(config, rank, address), block_tokens, share, all_wait)


def follow(
    config: ReplicaConfig,
    block_tokens: int,
    rank: int,
    address: str,
    connection: Connection,
) -> None:
    """Do what the first rank does, until it ends: then the pipe does, or a sum over ranks fails."""
    torch.set_num_threads(1)
    sequences = ranked(config, block_tokens, rank, address)
    segment = None
    with suppress(EOFError):
        while True:
            match decoder.decode(connection.recv_bytes()):
                case Step() as step:
                    sequences.step(step)
                case Load() as load:
                    sequences.load(load)
                case Drop() as drop:
                    sequences.drop(drop.id)
                case Keep() as keep:
                    sequences.keep(keep)
                case Evict() as evict:
                    sequences.evict(evict)
                case Attach() as attach:
                    segment = Segment.attach(attach.segment)
                    sequences.attach(segment.buffer)
    leave()
