"""How is vLLM one process of a cluster? Its engine steps in a thread, tokens go in and out by HTTP.

    python -m reference_cluster.engines.vllm.worker --model DIR [--kv-transfer-config JSON]

prints its port and serves what `completions.py` says. vLLM's own API server is four processes; this
is one, of half the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when vLLM is imported, which therefore happens in main().
DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # Standard output has the port, and nobody reads on.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
IDLE_S = 0.02  # Between steps of an engine that has nothing to do: loads end, blocks are freed.
KEEP_ALIVE_S = 3600  # Never our side closes a connection that the Conductor is about to use.
END_S_MAX = 2  # For answers under way when it is told to end.


@dataclass(frozen=True, slots=True)
class Progress:
    """A request's tokens so far, after a step that added some, and what they say, if known."""

    tokens: list[int]
    text: str
    is_finished: bool
    reason: str | None
    cached_tokens: int
    kv_transfer_params: dict[str, Any] | None
    scheduled_s: float  # On the host's monotonic clock: all KV that is loaded is here.
    first_token_s: float


class EngineThread:
    """Owns the engine. The event loop sends it commands and gets Progress, or what went wrong."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.loop = loop
        self.commands: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self.answers: dict[str, asyncio.Queue[Progress | Exception]] = {}
        self.numbers = itertools.count()
        self.is_over = False
        self.thread = threading.Thread(target=self.run, name="vllm engine", daemon=True)
        self.thread.start()

    async def generate(self, prompt: dict[str, Any], sampling: Any) -> AsyncIterator[Progress]:
        request_id = f"request-{next(self.numbers)}"
        answers = self.answers[request_id] = asyncio.Queue()
        self.commands.put((request_id, prompt, sampling))
        is_finished = False
        try:
            while not is_finished:
                answer = await answers.get()
                if isinstance(answer, Exception):
                    raise answer
                is_finished = answer.is_finished
                yield answer
        finally:
            del self.answers[request_id]
            if not is_finished:
                self.commands.put((request_id, {}, None))

    def run(self) -> None:
        try:
            while not self.is_over:
                self.obey(is_idle=not self.engine.has_unfinished_requests())
                for output in self.engine.step():
                    self.answer(output.request_id, progress_of(output))
        except Exception as error:  # noqa: BLE001  # told to every client: none waits for ever
            for request_id in list(self.answers):
                self.answer(request_id, error)
            os.kill(os.getpid(), signal.SIGTERM)  # Of no use any more: somebody starts another.

    def obey(self, is_idle: bool) -> None:
        """Start or abort (no sampling parameters) what has come in; wait a little if idle."""
        try:
            request_id, prompt, sampling = self.commands.get(block=is_idle, timeout=IDLE_S)
            while True:
                if sampling is None:
                    self.engine.abort_request([request_id])
                else:
                    self.start(request_id, prompt, sampling)
                request_id, prompt, sampling = self.commands.get_nowait()
        except queue.Empty:
            return

    def start(self, request_id: str, prompt: dict[str, Any], sampling: Any) -> None:
        try:
            self.engine.add_request(request_id, prompt, sampling)
        except Exception as error:  # noqa: BLE001  # what vLLM refuses is that client's error
            self.answer(request_id, error)

    def answer(self, request_id: str, answer: Progress | Exception) -> None:
        if (answers := self.answers.get(request_id)) is not None:
            self.loop.call_soon_threadsafe(answers.put_nowait, answer)

    def stop(self) -> None:
        """After the step under way."""
        self.is_over = True
        self.thread.join()


def progress_of(output: Any) -> Progress:
    completion, stamps = output.outputs[0], output.metrics
    return Progress(
        list(completion.token_ids),
        completion.text,
        output.finished,
        completion.finish_reason,
        output.num_cached_tokens or 0,
        output.kv_transfer_params,
        stamps.scheduled_ts if stamps else 0.0,
        stamps.first_token_ts if stamps else 0.0,
    )


def parse(words: list[str]) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="reference_cluster.engines.vllm.worker")
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--name", default="vllm", help="in a cluster")
    arguments.add_argument("--port", type=int, default=0, help="0: a free one")
    arguments.add_argument("--kv-transfer-config", type=json.loads, metavar="JSON")
    arguments.add_argument("--max-num-batched-tokens", type=int, default=2048)
    arguments.add_argument("--max-model-len", type=int, default=8448)
    arguments.add_argument("--kv-bytes", type=int, default=256 << 20, help="of the engine's own KV")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument(
        "--engine-arguments",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more of vLLM's, by the names of its Python API",
    )
    return arguments.parse_args(words)


def main(words: list[str], on_listening: Callable[[int], None] | None = None) -> None:
    """Serve until a signal comes; `on_listening` is told the port (None: it is printed)."""
    chosen = parse(words)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import uvicorn

    from reference_cluster.engines.vllm.completions import make_app

    engine = make_engine(chosen)
    listener = socket.create_server(("127.0.0.1", chosen.port))

    async def serve() -> None:
        thread = EngineThread(engine, asyncio.get_running_loop())
        app = make_app(thread, chosen.name, chosen.max_model_len)
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=END_S_MAX,
        )
        (on_listening or say_port)(listener.getsockname()[1])
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await asyncio.to_thread(thread.stop)

    asyncio.run(serve())
    shut_down(engine)


def make_engine(chosen: argparse.Namespace) -> Any:
    """vLLM's LLMEngine. It finds words where the model has a tokenizer, else only tokens."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = chosen.kv_transfer_config
    arguments = {
        "dtype": chosen.dtype,
        "enforce_eager": True,
        "skip_tokenizer_init": not Path(chosen.model, "tokenizer.json").exists(),
        "max_model_len": chosen.max_model_len,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": chosen.kv_bytes,
        "disable_log_stats": False,
        "kv_transfer_config": KVTransferConfig(**transfer) if transfer else None,
    }
    return LLM(chosen.model, **arguments | chosen.engine_arguments).llm_engine


def say_port(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def shut_down(engine: Any) -> None:
    """The connector lets its memory go."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        get_kv_transfer_group().shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
