"""What does a careful client on aiohttp and uvloop reach? One of the peers of the bench.

    python aiohttp_client.py PLAN.json OUT.json

PLAN: {"url", "due_s": [...] or "concurrency" and "seconds", "tokens"}; OUT: one object a request.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp
import uvloop

now_ns = time.perf_counter_ns


async def send(session: aiohttp.ClientSession, plan: dict, rid: int, due_ns: int) -> dict:
    body = {
        "model": "mock",
        "messages": [{"role": "user", "content": "the " * 100}],
        "max_tokens": plan["tokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record = {"rid": str(rid), "due_ns": due_ns, "sent_ns": now_ns(), "times_ns": []}
    headers = {"X-Request-Id": str(rid)}
    async with session.post(
        plan["url"] + "/v1/chat/completions", json=body, headers=headers
    ) as answer:
        async for line in answer.content:
            at = now_ns()
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    record["times_ns"].append(at)
    return record


async def open_loop(session: aiohttp.ClientSession, plan: dict) -> list[dict]:
    start_ns = now_ns() + 500_000_000
    tasks = []
    for rid, due_s in enumerate(plan["due_s"]):
        due_ns = start_ns + int(due_s * 1e9)
        if (left_ns := due_ns - now_ns()) > 0:
            await asyncio.sleep(left_ns / 1e9)
        tasks.append(asyncio.create_task(send(session, plan, rid, due_ns)))
    return await asyncio.gather(*tasks)


async def closed_loop(session: aiohttp.ClientSession, plan: dict) -> list[dict]:
    end_ns = now_ns() + int(plan["seconds"] * 1e9)
    records: list[dict] = []

    async def one() -> None:
        while now_ns() < end_ns:
            records.append(await send(session, plan, len(records), now_ns()))

    await asyncio.gather(*(one() for _ in range(plan["concurrency"])))
    return records


async def main(plan: dict) -> list[dict]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as one:
        await send(one, plan, -1, 0)  # Warm.
        return await (open_loop if "due_s" in plan else closed_loop)(one, plan)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(
        json.dumps(uvloop.run(main(json.loads(Path(sys.argv[1]).read_text()))))
    )
