"""How fast is Mooncake's own engine over TCP? A pair of processes that the bench drives by lines.

Run by the Python that has the engine: `engine.py BYTES` measures against a child `engine.py BYTES
--serve`. Each line of its input is a JSON list [operation, size, count, seconds]; each line of its
output the seconds of every transfer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

os.environ["MC_FORCE_TCP"] = "1"


def started(size: int) -> tuple[Any, int, Any]:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = np.ones(size, np.uint8)
    address = memory.ctypes.data
    assert engine.register_memory(address, size) == 0
    return engine, address, memory


def tell(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def serve(size: int) -> None:
    engine, address, _memory = started(size)
    tell([f"127.0.0.1:{engine.get_rpc_port()}", address])
    sys.stdin.read()


def drive(total: int) -> None:
    engine, own, _memory = started(total)
    command = [sys.executable, __file__, str(total), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        name, theirs = json.loads(peer.stdout.readline())
        engine.transfer_sync_write(name, own, theirs, total)
        tell("ready")
        for line in sys.stdin:
            operation, size, count, seconds = json.loads(line)
            single = operation == "read", count == 1
            call = {
                (True, True): engine.transfer_sync_read,
                (False, True): engine.transfer_sync_write,
                (True, False): engine.batch_transfer_sync_read,
                (False, False): engine.batch_transfer_sync_write,
            }[single]
            at, times = 0, []
            while sum(times) < seconds or len(times) < 3:
                at = at if at + size * count <= total else 0
                places = [at + index * size for index in range(count)]
                at += size * count
                here, there = [own + one for one in places], [theirs + one for one in places]
                lengths = [size] * count
                begin = time.perf_counter()
                if count == 1:
                    code = call(name, here[0], there[0], size)
                else:
                    code = call(name, here, there, lengths)
                times.append(time.perf_counter() - begin)
                assert code == 0, code
            tell(times)
        assert peer.stdin is not None
        peer.stdin.close()


if __name__ == "__main__":
    bytes_each = int(sys.argv[1])
    serve(bytes_each) if "--serve" in sys.argv else drive(bytes_each)
