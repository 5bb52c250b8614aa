"""The server under many clients that leave, send nonsense, or send too much: what each got, and what was left over."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bench.clients import PATIENCE, Exchange, Request, send_all
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import ModelShape
from bench.table import Column, Outcome, Table
from longshadow.engine.runtime import LLM, EngineStatistics
from longshadow.engine.serving.application import make_service
from longshadow.engine.serving.server import bound_socket, make_server
from longshadow.engine.serving.settings import ServingSettings

# Nothing of a model but its attention matters here, so it is as small as it can be.
VOCABULARY = sorted(pre_tokenizers.ByteLevel.alphabet())
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=len(VOCABULARY),
    rope_theta=10_000.0,
)
WHOLE, STREAMED, LEFT, MALFORMED, OVERSIZED = "whole", "streamed", "client leaves", "malformed", "oversized"
KINDS = (WHOLE, STREAMED, LEFT, MALFORMED, OVERSIZED)
EXPECTED = {WHOLE: {200}, STREAMED: {200}, MALFORMED: {400, 404}, OVERSIZED: {413, 400}}
NONSENSE = (
    b"",
    b"{",
    b"[1, 2]",
    b'{"model": "soak"}',
    b'{"model": "soak", "prompt": 5}',
    b'{"model": "soak", "prompt": "x", "max_tokens": -1}',
    b'{"model": "soak", "prompt": "x", "tools": [1]}',
    b'{"model": "another", "prompt": "x"}',
    b'{"model": "soak", "prompt": "x", "document": "doc-nothing"}',
    b"\xff\xfe\x00",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is sent, and what the server takes."""

    requests: int = 500
    clients: int = 16
    leaving: float = 0.2
    malformed: float = 0.05
    oversized: float = 0.05
    prompt_tokens: int = 1500
    answer_tokens: int = 48
    document_tokens: int = 2500
    max_model_len: int = 4608
    max_num_seqs: int = 4
    max_num_waiting: int = 8
    max_body_bytes: int = 200_000


@dataclass(kw_only=True)
class Served:
    """A server in a thread of its own."""

    llm: LLM
    address: tuple[str, int]
    server: Any
    loop: asyncio.AbstractEventLoop | None = None
    document: str = ""

    def num_tasks(self) -> int:
        """Tasks of the server's loop, its main one apart."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 2  # the server itself, and this count

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE)


@dataclass(kw_only=True)
class Leftovers:
    """What ought to be nothing once all clients have gone."""

    before: EngineStatistics
    after: EngineStatistics
    tasks: int
    connections: int

    def problems(self) -> list[str]:
        """One for each thing that was left over."""
        counts = {
            "sequences": self.after.num_running,
            "waiting requests": self.after.num_waiting,
            "device bytes": self.after.device_bytes - self.before.device_bytes,
            "host bytes": self.after.host_bytes - self.before.host_bytes,
            "tasks": self.tasks,
            "connections": self.connections,
        }
        return [f"{count} {name}" for name, count in counts.items() if count]


def run(config: Config, session: Session) -> Outcome:
    """Sends everything, then looks at what is left."""
    with serving(config, session) as served:
        before = served.llm.statistics()
        session.progress(f"{config.requests} requests of {config.clients} clients")
        started = time.perf_counter()
        exchanges = asyncio.run(
            send_all(served.address, make_requests(config, served.document, session.seed), config.clients)
        )
        seconds = time.perf_counter() - started
        session.progress("what is left")
        leftovers = wait_for_leftovers(served, before)
    rows = [row(kind, [one for one in exchanges if one.kind == kind]) for kind in KINDS]
    rows.append(row("all", exchanges) | {"seconds": seconds})
    problems = [*wrong(exchanges), *(f"left over: {problem}" for problem in leftovers.problems())]
    text = f"every request got a status it may get, and nothing was left over ({len(exchanges)} requests)"
    return Outcome(rows=rows, check=Check(passed=not problems, max_error=None, text="; ".join(problems) or text))


def make_requests(config: Config, document: str, seed: int) -> list[Request]:
    """Requests of every kind, in random order."""
    chance = random.Random(seed)
    kinds = [LEFT] * round(config.requests * config.leaving)
    kinds += [MALFORMED] * round(config.requests * config.malformed)
    kinds += [OVERSIZED] * round(config.requests * config.oversized)
    kinds += [(WHOLE, STREAMED)[index % 2] for index in range(config.requests - len(kinds))]
    chance.shuffle(kinds)
    return [make_request(kind, config, document, chance) for kind in kinds]


def make_request(kind: str, config: Config, document: str, chance: random.Random) -> Request:
    """A request of one kind, random in everything else."""
    if kind == MALFORMED:
        return Request(kind=kind, body=chance.choice(NONSENSE))
    length = round(config.prompt_tokens ** chance.random())
    body = {
        "model": "soak",
        "prompt": "".join(chance.choices("abcdefgh ", k=length)),
        "max_tokens": chance.randint(1, config.answer_tokens),
        "stream": kind == STREAMED or (kind == LEFT and chance.random() < 0.5),
        "temperature": chance.choice((0.0, 1.0)),
        "n": chance.choice((1, 1, 1, 2)),
    }
    if chance.random() < 0.3:
        body["document"] = document
    if kind == OVERSIZED:
        body["prompt"] = "x" * chance.choice((config.max_body_bytes, config.max_model_len))
    stays = chance.random() ** 2 * 2 if kind == LEFT else None
    return Request(kind=kind, body=json.dumps(body).encode(), stays=stays)


def wrong(exchanges: list[Exchange]) -> list[str]:
    """What a request got that it must not get."""
    problems = []
    for one in exchanges:
        if one.kind in EXPECTED and one.status not in EXPECTED[one.kind]:
            problems.append(f"a {one.kind} request got {one.status}")
        elif one.kind in EXPECTED and not one.is_whole:
            problems.append(f"a {one.kind} request got half an answer")
        elif one.kind == LEFT and one.status not in (None, 200, 429):
            problems.append(f"a client that left got {one.status}")
    return problems


def wait_for_leftovers(served: Served, before: EngineStatistics) -> Leftovers:
    """What is left once the server has noticed that everyone has gone."""
    end = time.monotonic() + PATIENCE
    while True:
        found = Leftovers(
            before=before,
            after=served.llm.statistics(),
            tasks=served.num_tasks(),
            connections=len(served.server.server_state.connections),
        )
        if not found.problems() or time.monotonic() > end:
            return found
        time.sleep(0.05)


def row(kind: str, exchanges: list[Exchange]) -> Row:
    """One kind of request: how many, what they got, how long the answered ones waited for their status."""
    waits = [one.wait for one in exchanges if one.status == 200 and one.wait is not None]
    return {
        "kind": kind,
        "requests": len(exchanges),
        "answered": sum(one.status == 200 for one in exchanges),
        "busy": sum(one.busy for one in exchanges),
        "refused": sum(one.status not in (None, 200, 429) for one in exchanges),
        "left": sum(one.status in (None, 429) for one in exchanges),
        "median_wait": statistics.median(waits) if waits else None,
        "worst_wait": max(waits) if waits else None,
    }


@contextmanager
def serving(config: Config, session: Session) -> Iterator[Served]:
    """The server, with one document that has been read."""
    settings = ServingSettings(model_name="soak", port=0, max_body_bytes=config.max_body_bytes, grace_seconds=5.0)
    llm = LLM(
        SHAPE.model(dtype=torch.float32, device=session.device, seed=session.seed, max_positions=config.max_model_len),
        tokenizer=byte_tokenizer(),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_waiting=config.max_num_waiting,
        device_memory="400MB",
        prefix_cache=False,  # what it holds is no leak, but would hide one
    )
    service = make_service(llm, settings)
    bound = bound_socket(settings)
    served = Served(llm=llm, address=bound.getsockname()[:2], server=make_server(service))
    thread = threading.Thread(target=lambda: asyncio.run(_serve(served, bound)))
    thread.start()
    try:
        record = service.documents.add("y" * config.document_tokens, name=None)
        record.done.result(PATIENCE)
        served.document = record.id
        yield served
    finally:
        served.server.should_exit = True
        thread.join(PATIENCE)
        llm.close()
        service.documents.close()


async def _serve(served: Served, bound: socket.socket) -> None:
    served.loop = asyncio.get_running_loop()
    await served.server.serve([bound])


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def quick(config: Config) -> Config:
    """A tenth of the requests."""
    return replace(config, requests=60, prompt_tokens=300, answer_tokens=16, document_tokens=1200)


TABLE = Table(
    name="soak",
    title="The server under clients that leave, send nonsense, or send too much",
    about=(
        "One server, a tiny random model with four slots and a queue of eight, so that some requests are refused with "
        "429, which their clients send again. Every client opens a connection for each try. A fifth of the requests is "
        "left at a random moment; malformed ones must get 400 or 404, oversized ones 413 or 400. The wait is the time "
        "until the status, refused tries included; a streamed answer sends it with its first token, a whole one at its "
        "end. The check: every well-formed request was answered in full in the end, and no sequence, byte, task or "
        "connection was left over."
    ),
    configs={"cpu": Config()},
    quick=quick,
    columns=(
        Column(key="kind", heading="request"),
        Column(key="requests", heading="requests", unit="count"),
        Column(key="answered", heading="answered", unit="count"),
        Column(key="busy", heading="429s on the way", unit="count"),
        Column(key="refused", heading="400, 404, 413", unit="count"),
        Column(key="left", heading="left before the status", unit="count"),
        Column(key="median_wait", heading="median wait", unit="s"),
        Column(key="worst_wait", heading="worst wait", unit="s"),
        Column(key="seconds", heading="in all", unit="s"),
    ),
    targets=(),
    run=run,
)
