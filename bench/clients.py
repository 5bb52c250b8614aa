"""Clients of a server, each request on a connection of its own, that may leave before they are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 600.0
TOO_MANY = 429
PAUSE = 0.1  # of a client that was told to come back later


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: its kind, its body, and how long its client stays."""

    kind: str
    body: bytes
    stays: float | None = None


@dataclass(kw_only=True)
class Exchange:
    """What became of a request; `wait` is the time until its status came, the `busy` times that it got 429 included."""

    kind: str
    status: int | None = None
    wait: float | None = None
    is_whole: bool = False
    busy: int = 0


async def send_all(address: tuple[str, int], requests: Sequence[Request], num_clients: int) -> list[Exchange]:
    """Every client takes the next request as soon as its last one has ended."""
    queue, exchanges = iter(requests), []

    async def client() -> None:
        for request in queue:
            exchanges.append(await exchange(address, request))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return exchanges


async def exchange(address: tuple[str, int], request: Request) -> Exchange:
    """One request, tried again as long as the server is busy."""
    result = Exchange(kind=request.kind)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE if request.stays is None else request.stays):
            await _exchange(address, request, result, started)
            while result.status == TOO_MANY:
                result.busy += 1
                await asyncio.sleep(PAUSE)
                await _exchange(address, request, result, started)
    except (TimeoutError, OSError):
        pass
    return result


async def _exchange(address: tuple[str, int], request: Request, result: Exchange, started: float) -> None:
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json"
        writer.write(f"{head}\r\nContent-Length: {len(request.body)}\r\n\r\n".encode() + request.body)
        await writer.drain()
        line = await reader.readline()
        if not line:
            return
        result.status, result.wait = int(line.split()[1]), time.perf_counter() - started
        answer = await reader.read()
        is_stream = b"text/event-stream" in answer.partition(b"\r\n\r\n")[0]
        result.is_whole = answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0" if is_stream else b"}")
    finally:
        writer.close()
