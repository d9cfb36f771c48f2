"""How is vLLM one process of a cluster? Its engine steps in a thread, tokens go in and out by HTTP.

    python -m reference_cluster.engines.vllm.worker --model DIR [--kv-transfer-config JSON]

prints its port and serves POST /v1/completions for prompts of token ids (SSE or JSON), GET /health,
/metrics (vLLM's) and /pool (what the connector moved, and what it holds). A client that hangs up
aborts its request. vLLM's own API server is four processes; this is one, of half the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

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

LOOK_S = 0.1  # Whether the client of an answer that does not stream is still there.


class Asked(msgspec.Struct, frozen=True):
    """A completion request; fields that are not here are ignored."""

    prompt: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    ignore_eos: bool = False
    stream: bool = False
    kv_transfer_params: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A request's tokens so far, after a step that added some."""

    tokens: list[int]
    is_finished: bool
    reason: str | None
    cached_tokens: int
    kv_transfer_params: dict[str, Any] | None


class EngineThread:
    """Owns the engine. The event loop sends it commands and gets Progress, or what went wrong."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.loop = loop
        self.commands: queue.SimpleQueue[tuple[str, list[int], Any]] = queue.SimpleQueue()
        self.answers: dict[str, asyncio.Queue[Progress | Exception]] = {}
        self.numbers = itertools.count()
        self.is_over = False
        self.thread = threading.Thread(target=self.run, name="vllm engine", daemon=True)
        self.thread.start()

    async def generate(self, prompt: list[int], sampling: Any) -> AsyncIterator[Progress]:
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
                self.commands.put((request_id, [], None))

    def run(self) -> None:
        try:
            while not self.is_over:
                self.obey(is_idle=not self.engine.has_unfinished_requests())
                for output in self.engine.step():
                    self.answer(output.request_id, progress_of(output))
        except Exception as error:  # noqa: BLE001  # told to every client: none waits for ever
            for request_id in list(self.answers):
                self.answer(request_id, error)

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

    def start(self, request_id: str, prompt: list[int], sampling: Any) -> None:
        try:
            self.engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
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
    completion = output.outputs[0]
    return Progress(
        list(completion.token_ids),
        output.finished,
        completion.finish_reason,
        output.num_cached_tokens or 0,
        output.kv_transfer_params,
    )


def make_app(thread: EngineThread, model_len: int) -> Any:
    """The application that uvicorn serves."""
    from prometheus_client import generate_latest
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from vllm import SamplingParams

    async def completions(request: Any) -> Any:
        try:
            asked = msgspec.json.decode(await request.body(), type=Asked)
        except msgspec.ValidationError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        if not 0 < len(asked.prompt) <= model_len - asked.max_tokens:
            why = f"prompt of {len(asked.prompt)} tokens: give 1 to {model_len - asked.max_tokens}"
            return JSONResponse({"error": {"message": why}}, 400)
        given = {"kv_transfer_params": asked.kv_transfer_params}
        sampling = SamplingParams(
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            ignore_eos=asked.ignore_eos,
            extra_args=given if asked.kv_transfer_params else None,
        )
        answers = thread.generate(asked.prompt, sampling)
        if asked.stream:
            return StreamingResponse(events(asked, answers), media_type="text/event-stream")
        return await whole(request, asked, answers)

    async def whole(request: Any, asked: Asked, answers: AsyncIterator[Progress]) -> Any:
        async def last() -> Progress | None:
            found = None
            async for progress in answers:
                found = progress
            return found

        answer = asyncio.create_task(last(), name="completion")
        while not await is_done_in(answer, LOOK_S):
            if await request.is_disconnected():
                answer.cancel()
                return Response(status_code=499)
        try:
            found = answer.result()
        except Exception as error:  # noqa: BLE001  # the client learns what went wrong
            return JSONResponse({"error": {"message": str(error)}}, 500)
        assert found is not None
        choice = {"index": 0, "token_ids": found.tokens, "finish_reason": found.reason}
        told = {"choices": [choice], "usage": usage(asked, found)}
        return JSONResponse(told | {"kv_transfer_params": found.kv_transfer_params})

    async def metrics(request: Any) -> Any:
        return Response(generate_latest(), media_type="text/plain")

    async def health(request: Any) -> Any:
        return Response(status_code=200 if thread.thread.is_alive() else 503)

    async def pool(request: Any) -> Any:
        return JSONResponse(pool_of(thread.engine))

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/pool", pool),
        ]
    )


async def is_done_in(task: asyncio.Task[Any], seconds: float) -> bool:
    try:
        await asyncio.wait_for(asyncio.shield(task), seconds)
    except TimeoutError:
        return False
    except Exception:  # noqa: BLE001  # its result is looked at by the caller
        return True
    return True


async def events(asked: Asked, answers: AsyncIterator[Progress]) -> AsyncIterator[bytes]:
    sent, last = 0, None
    async for last in answers:
        if new := last.tokens[sent:]:
            yield event({"choices": [{"index": 0, "text": "", "token_ids": new}]})
        sent = len(last.tokens)
    if last is not None:
        yield event({"choices": [], "usage": usage(asked, last)})
    yield b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def usage(asked: Asked, last: Progress) -> dict[str, Any]:
    return {
        "prompt_tokens": len(asked.prompt),
        "completion_tokens": len(last.tokens),
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


def pool_of(engine: Any) -> dict[str, Any]:
    """What the connector moved and holds, and how many of vLLM's own blocks are in use."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    scheduler = engine.engine_core.engine_core.scheduler
    blocks = scheduler.kv_cache_manager.block_pool
    # One block is vLLM's null block.
    told: dict[str, Any] = {
        "engine_blocks": blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks()
    }
    if has_kv_transfer_group():
        planner = scheduler.connector.planner
        planner.index.check_integrity()
        told |= get_kv_transfer_group().counts
        told |= {
            "held_blocks": len(planner.index.slots),
            "pinned_blocks": len(planner.index.pool.pins),
            "requests": len(planner.requests) + len(planner.loading),
        }
    return told


def parse(words: list[str]) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="reference_cluster.engines.vllm.worker")
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--port", type=int, default=0, help="0: a free one")
    arguments.add_argument("--kv-transfer-config", type=json.loads, metavar="JSON")
    arguments.add_argument("--max-num-batched-tokens", type=int, default=2048)
    arguments.add_argument("--max-model-len", type=int, default=8448)
    arguments.add_argument("--kv-bytes", type=int, default=256 << 20, help="of the engine's own KV")
    arguments.add_argument("--dtype", default="float32")
    return arguments.parse_args(words)


def main(words: list[str]) -> None:
    chosen = parse(words)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import uvicorn
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = chosen.kv_transfer_config
    llm = LLM(
        chosen.model,
        dtype=chosen.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=chosen.max_model_len,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        max_num_seqs=64,
        kv_cache_memory_bytes=chosen.kv_bytes,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )
    listener = socket.create_server(("127.0.0.1", chosen.port))

    async def serve() -> None:
        thread = EngineThread(llm.llm_engine, asyncio.get_running_loop())
        config = uvicorn.Config(make_app(thread, chosen.max_model_len), log_level="warning")
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await asyncio.to_thread(thread.stop)

    asyncio.run(serve())
    shut_down(llm.llm_engine)


def shut_down(engine: Any) -> None:
    """The connector lets its memory go."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        get_kv_transfer_group().shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
