"""Sequences that decode together by operators, against each by itself.

Without a GPU nothing is captured; everything else is as under a graph.
"""

import asyncio
import gc
import itertools
import random
import weakref
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.ops import SegmentTable
from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.batch_room import Room
from longshadow.engine.runtime.errors import RequestTooLong
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.env import BACKEND_VARIABLE
from tests.engine.runtime.engines import assert_nothing_is_left, engine, last_of, small_config, text, tokens_of
from tests.engine.runtime.test_runner import CONFIG, one_by_one, prompts, together
from tests.engine.shadowkv.families import tiny_model
from tests.engine.shadowkv.test_graphs import LaunchesOnly, recording_operators


@pytest.fixture
def operated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run, by their references."""
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")


def read(runner: ModelRunner, prompt: list[int]) -> SequenceState:
    state = runner.new_state(512, blocked_energy=True)
    runner.read([Chunk(state=state, tokens=prompt, is_last=True, num_prompt=len(prompt))])
    return state


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@torch.inference_mode()
def test_a_batch_gives_what_each_sequence_gives_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A padding token embeds as zeros: a query of zeros finds all tokens equally good, and any choice is right.
    model = tiny_model(family, pad_token_id=None)
    wanted = prompts()[1:]
    expected = [one_by_one(model, prompt) for prompt in wanted]
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert together(model, wanted) == expected


@torch.inference_mode()
def test_kernels_decode_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", head_dim=32)
    wanted = prompts()[1:3]
    logits = []
    for backend in ("auto", "triton"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        runner = ModelRunner(model, CONFIG, 512)
        states = [read(runner, prompt) for prompt in wanted]
        logits.append(torch.stack([runner.decode(states, [5, step]).clone() for step in range(2)]))
        runner.close()
    assert (logits[1] - logits[0]).abs().max() <= 1e-4 * logits[0].abs().max()


def ask_all(llm: LLM, requests: list[tuple[str, SamplingParams, bool]], cancelled: set[int]) -> list[Any]:
    """Answers to requests that arrive at random, some with a document, some of which are cancelled."""
    rng = random.Random(3)
    document = llm.add_document(text(230, seed=50))

    async def ask(index: int) -> Any:
        prompt, params, has_document = requests[index]
        await asyncio.sleep(rng.random() * 0.5)
        stream = llm.stream(prompt, params, document=document if has_document else None, request_id=str(index))
        return await last_of(stream, lambda: index in cancelled and llm.cancel(str(index)))

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(ask(index) for index in range(len(requests))))

    outputs = asyncio.run(all_at_once())
    llm.remove_document(document)
    return outputs


def test_requests_and_documents_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when each decodes by itself; in the end nothing is held, and meanwhile never more than is reserved."""
    rng = random.Random(2)
    requests = []
    for index in range(10):
        params = SamplingParams(
            max_tokens=rng.randint(1, 24), n=rng.choice((1, 1, 2)), temperature=rng.choice((0.0, 1.0)), seed=index
        )
        requests.append((text(rng.choice((5, 60, 90, 200)), seed=index), params, index % 3 == 0))
    cancelled = {4, 9}
    with engine(prefix_cache=False) as llm:
        assert llm._runner.batched is None
        expected = ask_all(llm, requests, set())
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    with engine(prefix_cache=True) as llm:
        runner, reservation = llm._runner, llm._engine.scheduler.batch
        assert runner.batched is not None
        decode = runner.decode
        rooms = []

        def watched(states: Any, tokens: Any) -> torch.Tensor:
            assert runner.batched is not None
            logits = decode(states, tokens)
            runner.batched.batch.add_hits_to(runner.counts)
            held = sum(tensor.nbytes for part in runner.batched.batch.tensors().values() for tensor in part)
            selects = runner.batched.batch.signature[1]
            # Exactly what is reserved, but for what steps that select nothing do not need.
            assert held == runner.room_bytes(reservation.room) == reservation.bytes(reservation.room).device
            rooms.append((reservation.room, selects))
            return logits

        runner.decode = watched  # type: ignore[method-assign]
        found = ask_all(llm, requests, cancelled)
        assert_nothing_is_left(llm)
        assert len({room for room, _ in rooms}) > 1 and any(selects for _, selects in rooms)
        assert reservation.room == Room() and not any(runner.batched.batch.tensors().values())
        assert llm.statistics().attended_fraction < 1 and llm._runner.counts.misses > 0
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        for whole, begun in zip(tokens_of(one), tokens_of(other), strict=True):
            assert whole[: len(begun)] == begun
            assert index in cancelled or whole == begun


def test_memory_admits_only_those_whose_batch_fits(operated: None) -> None:
    """One after the other where there is room for one, to the byte; a byte less, and the request is refused."""
    with engine(prefix_cache=False) as llm:
        inner, params = llm._engine, SamplingParams(max_tokens=20, temperature=0)
        need = llm._accounting.need(200, 19)
        batch = inner.scheduler.batch.bytes(Room.of([(1, need.room)]))
        assert batch.device > 0
        inner.budget.device_limit = (inner.holdings.held + need.prefill + batch).device + need.prefill.host
        outputs = llm.generate([list(range(1, 201))] * 3, params)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        spans = sorted((o.metrics.arrival + (o.metrics.queue_seconds or 0), o.metrics.finished or 0) for o in outputs)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert_nothing_is_left(llm)
        inner.budget.device_limit -= 1
        with pytest.raises(RequestTooLong, match="bytes of device"):
            llm.generate(list(range(1, 201)), params)


@torch.inference_mode()
def test_a_sequence_that_ends_is_let_go_at_once(operated: None) -> None:
    """And its neighbours go on, also those that share its segments."""
    runner = ModelRunner(tiny_model("llama").double(), CONFIG, 512)
    document = read(runner, prompts()[0])
    forks = [document.fork(512) for _ in range(3)]
    expected = [runner.decode([fork.fork(512) for fork in forks], [step, 8, 9])[1:].clone() for step in (7, 7)]
    assert torch.equal(*expected)
    runner.decode(forks, [7, 8, 9])
    gone = weakref.ref(forks[0].layers[0])
    segment = weakref.ref(document.layers[0].segments[0])  # type: ignore[union-attr]
    forks[0].release()
    del forks[0]
    gc.collect()
    assert gone() is None
    others = [fork.fork(512) for fork in forks]
    found = runner.decode(forks, [3, 4])
    torch.testing.assert_close(found, runner.decode(others, [3, 4]))
    for state in (*forks, *others):
        state.release()
    del forks, others, document, state
    gc.collect()
    assert segment() is None, "nobody holds the document's segment any more"
    runner.close()


@torch.inference_mode()
def test_storage_that_operators_cannot_read_is_decoded_one_by_one(
    operated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first segment on that they cannot read, without losing a token."""
    model = tiny_model("llama").double()
    expected = [one_by_one(model, prompt) for prompt in prompts()[:2]]
    assign = SegmentTable.assign

    def refusing(self: Any, index: int, segments: Any, tail: Any = None) -> None:
        if len(segments) > 1:
            raise ValueError("values must be pinned")
        assign(self, index, segments, tail)

    monkeypatch.setattr(SegmentTable, "assign", refusing)
    assert together(model, prompts()[:2]) == expected


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, operated: None) -> list[tuple[Any, ...]]:
    """What steps launch, by name and addresses, instead of computing it."""
    launches: list[tuple[Any, ...]] = []

    recorders = recording_operators(launches)
    monkeypatch.setattr(
        "longshadow.engine.runtime.runner.decode_batch",
        lambda model, config, chosen: DecodeBatch(recorders, config, model.device),
    )
    return launches


@torch.inference_mode()
def test_a_step_launches_the_same_on_the_same_memory(recorded: list[tuple[Any, ...]]) -> None:
    """As capturing it requires: whoever comes, leaves or is compressed, as long as the batch keeps its size."""
    model = tiny_model("llama")
    runner = ModelRunner(model, CONFIG, 512)
    assert runner.batched is not None and runner.batched._graphed is not None
    graphed = runner.batched._graphed
    forward = graphed._forward

    def launched(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with LaunchesOnly():
            return forward(ids, positions)

    graphed._forward = launched
    states = [read(runner, prompt) for prompt in (*prompts()[:3], *prompts()[:3])]
    steps: dict[Any, list[tuple[Any, ...]]] = {}
    accounting = Accounting(runner.shapes, CONFIG, runner.device, is_batched=True)
    runner.hold(Room(num_places=4, each=accounting.need(200, 200).room))
    signatures = set()
    for step in range(90):
        decoding = states[step // 30 : step // 30 + 3]
        recorded.clear()
        runner.decode(decoding, [1] * len(decoding))
        signature = runner.batched.batch.signature
        signatures.add(signature)
        assert steps.setdefault(signature, list(recorded)) == recorded
    assert len(states[2].layers[0].segments) == 2, "long enough that a tail was compressed"  # type: ignore[union-attr]
    assert len(signatures) == 1
    runner.hold(Room(num_places=2, each=accounting.need(200, 200).room))
    runner.decode(states[:2], [1, 1])
    assert runner.batched.batch.signature not in signatures
    runner.close()


def test_configurations_that_operators_do_not_serve(operated: None) -> None:
    with engine(shadowkv=small_config(key_store="exact")) as llm:
        assert llm._runner.batched is None
        [output] = llm.generate(text(120), SamplingParams(max_tokens=4, temperature=0))
        assert len(output.outputs[0].token_ids) == 4
        assert_nothing_is_left(llm)
