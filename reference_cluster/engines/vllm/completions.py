"""What does a worker of vLLM answer by HTTP?

POST /v1/completions for prompts of token ids (SSE or JSON), GET /health, /metrics (vLLM's), /pool
(what the connector moved, and what it holds) and /events (`feed.py`). A client that hangs up aborts
its request. Where the model has no tokenizer, the text of token 17 is " 17".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from reference_cluster.engines.vllm.feed import Beat, Feed, Hello
from reference_cluster.engines.vllm.worker import EngineThread, Progress

LOOK_S = 0.1  # Whether the client of an answer that does not stream is still there.


class Asked(msgspec.Struct, frozen=True):
    """A completion request; fields that are not here are ignored."""

    prompt: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    ignore_eos: bool = False
    stream: bool = False
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class Worker:
    """One engine behind HTTP."""

    def __init__(self, thread: EngineThread, name: str, model_len: int) -> None:
        self.thread = thread
        self.model_len = model_len
        self.model = thread.engine.model_config.model
        self.has_words = not thread.engine.model_config.skip_tokenizer_init
        scheduler = thread.engine.engine_core.engine_core.scheduler
        self.blocks = scheduler.kv_cache_manager.block_pool
        # The connector's, where it is ours.
        self.planner = getattr(scheduler.connector, "planner", None)
        endpoint = msgspec.to_builtins(self.planner.endpoint) if self.planner else None
        self.feed = Feed(thread.loop, Hello(name, self.model, endpoint), self.beat)
        if self.planner:
            self.planner.index.on_change = self.feed.tell

    # ---- completions -------------------------------------------------------------------------

    async def completions(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        try:
            asked = msgspec.json.decode(await request.body(), type=Asked)
        except msgspec.ValidationError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        if why := self.refused(asked):
            return JSONResponse({"error": {"message": why}}, 400)
        prompt: dict[str, Any] = {"prompt_token_ids": asked.prompt}
        if asked.cache_salt:
            prompt["cache_salt"] = asked.cache_salt
        answers = self.thread.generate(prompt, sampling_of(asked))
        if asked.stream:
            return StreamingResponse(self.events(asked, answers), media_type="text/event-stream")
        return await self.whole(request, asked, answers)

    def refused(self, asked: Asked) -> str | None:
        """Why it can never be answered."""
        if not 0 < len(asked.prompt) <= self.model_len - asked.max_tokens:
            most = self.model_len - asked.max_tokens
            return f"prompt of {len(asked.prompt)} tokens: give 1 to {most}"
        if asked.stop and not self.has_words:
            return "`stop` needs a model with tokenizer.json"
        return None

    async def whole(self, request: Any, asked: Asked, answers: AsyncIterator[Progress]) -> Any:
        from starlette.responses import JSONResponse, Response

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
        return JSONResponse(
            {
                "choices": [self.choice(found, 0, "")],
                "usage": usage(asked, found),
                "timeline": timeline(found),
                "kv_transfer_params": found.kv_transfer_params,
            }
        )

    async def events(self, asked: Asked, answers: AsyncIterator[Progress]) -> AsyncIterator[bytes]:
        sent, said, last = 0, "", None
        try:
            async for last in answers:
                if len(last.tokens) > sent or last.is_finished:
                    yield event({"choices": [self.choice(last, sent, said)]})
                sent, said = len(last.tokens), last.text
        except Exception as error:  # noqa: BLE001  # the client learns what went wrong
            yield event({"error": {"message": str(error)}})
            return
        if last is not None:
            yield event({"choices": [], "usage": usage(asked, last), "timeline": timeline(last)})
        yield b"data: [DONE]\n\n"

    def choice(self, found: Progress, sent: int, said: str) -> dict[str, Any]:
        """What is new since `sent` tokens, which were `said`."""
        tokens = found.tokens[sent:]
        text = found.text[len(said) :] if self.has_words else "".join(f" {id}" for id in tokens)
        return {
            "index": 0,
            "text": text,
            "token_ids": tokens,
            "finish_reason": found.reason if found.is_finished else None,
        }

    # ---- looking at it -----------------------------------------------------------------------

    async def metrics(self, request: Any) -> Any:
        from prometheus_client import generate_latest
        from starlette.responses import Response

        return Response(generate_latest(), media_type="text/plain")

    async def health(self, request: Any) -> Any:
        from starlette.responses import Response

        return Response(status_code=200 if self.thread.thread.is_alive() else 503)

    async def pool(self, request: Any) -> Any:
        """What the connector moved and holds, after a look at its books."""
        from starlette.responses import JSONResponse

        if self.planner is not None:
            self.planner.index.check_integrity()
        return JSONResponse(self.counts())

    async def follow(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse

        every_s = float(request.query_params.get("beat_every_s", 0.5))
        return StreamingResponse(self.feed.follow(every_s), media_type="text/event-stream")

    def beat(self) -> Beat:
        return Beat(len(self.thread.answers), dict(self.counts()))

    def counts(self) -> dict[str, int]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        # One block is vLLM's null block.
        told = {"engine_blocks": self.blocks.num_gpu_blocks - 1 - self.blocks.get_num_free_blocks()}
        if self.planner is not None:
            told |= get_kv_transfer_group().counts
            told |= {
                "held_blocks": len(self.planner.index.slots),
                "pinned_blocks": len(self.planner.index.pool.pins),
                "requests": len(self.planner.requests) + len(self.planner.loading),
            }
        return told


def make_app(thread: EngineThread, name: str, model_len: int) -> Any:
    """The application that uvicorn serves."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    worker = Worker(thread, name, model_len)
    return Starlette(
        routes=[
            Route("/v1/completions", worker.completions, methods=["POST"]),
            Route("/metrics", worker.metrics),
            Route("/health", worker.health),
            Route("/pool", worker.pool),
            Route("/events", worker.follow),
        ]
    )


def sampling_of(asked: Asked) -> Any:
    from vllm import SamplingParams

    given = {"kv_transfer_params": asked.kv_transfer_params}
    return SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        stop=asked.stop or None,
        ignore_eos=asked.ignore_eos,
        extra_args=given if asked.kv_transfer_params else None,
    )


async def is_done_in(task: asyncio.Task[Any], seconds: float) -> bool:
    try:
        await asyncio.wait_for(asyncio.shield(task), seconds)
    except TimeoutError:
        return False
    except Exception:  # noqa: BLE001  # its result is looked at by the caller
        return True
    return True


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def usage(asked: Asked, last: Progress) -> dict[str, Any]:
    return {
        "prompt_tokens": len(asked.prompt),
        "completion_tokens": len(last.tokens),
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


def timeline(last: Progress) -> dict[str, float]:
    """Seconds on the host's monotonic clock."""
    return {"scheduled_s": last.scheduled_s, "first_token_s": last.first_token_s}
