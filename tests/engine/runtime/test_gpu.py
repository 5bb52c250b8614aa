"""The engine on a CUDA device; run by `make gpu-check`."""

import random
from typing import Any

import pytest
import torch

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import batched_steps
from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.batch_room import Room
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.state import SequenceState
from tests.engine.runtime.engines import assert_nothing_is_left, small_config, tokens_of
from tests.engine.runtime.test_runner import CONFIG
from tests.engine.shadowkv.families import tiny_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def llama() -> Any:
    """A tiny model of a shape that kernels serve, on the GPU."""
    return tiny_model("llama", head_dim=32).to(DEVICE)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_steps, "why_not_ahead", lambda *arguments, **keywords: "the test launches one by one")


def read(runner: ModelRunner, tokens: list[int]) -> SequenceState:
    state = runner.new_state(1000, blocked_energy=True)
    runner.read([Chunk(state=state, tokens=tokens, is_last=True, num_prompt=len(tokens))])
    return state


def decode(runner: ModelRunner, num_steps: int) -> torch.Tensor:
    """Logits of sequences that come and go, two of them of one document, over tails that become segments."""
    accounting = Accounting(runner.shapes, CONFIG, runner.device, is_batched=True)
    runner.hold(Room(num_places=4, each=accounting.need(400, num_steps).room))
    document = read(runner, prompt(300))
    states = [document.fork(1000), read(runner, prompt(150, 1)), document.fork(1000), read(runner, prompt(40, 2))]
    logits = []
    for step in range(num_steps):
        chosen = states[step // 20 % 2 :]
        logits.append(runner.decode(chosen, [(step + place) % 128 for place in range(len(chosen))])[-2:].clone())
    return torch.stack(logits)


@torch.inference_mode()
def test_replays_equal_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits = llama(), []
    for graphed in (True, False):
        if not graphed:
            without_graphs(monkeypatch)
        runner = ModelRunner(model, CONFIG, 1024)
        assert runner.batched is not None and runner.batched.captures == graphed
        logits.append(decode(runner, 120))
        assert not graphed or runner.batched._graphed.num_graphs > 0  # type: ignore[union-attr]
        runner.close()
    assert torch.equal(*logits)


@torch.inference_mode()
def test_decoding_follows_the_cpu() -> None:
    """Which decodes sequence by sequence. A GPU finds a basis of lower rank by iteration, so it is of full rank."""
    logits = []
    for device in ("cpu", DEVICE):
        config = small_config(rank=None, rank_energy=1.0)
        runner = ModelRunner(tiny_model("llama", head_dim=32).to(device), config, 1024)
        assert (runner.batched is not None) == (device != "cpu")
        states = [read(runner, prompt(length, length)) for length in (200, 90, 7)]
        steps = [runner.decode(states, [step, 5, 6]).cpu() for step in range(70)]
        logits.append(torch.stack(steps))
        runner.close()
    assert (logits[0] - logits[1]).abs().max() <= 1e-3 * logits[0].abs().max()


def ask(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[list[list[int]]]:
    """One request after the other, so that batches are the same each time; then all of them at once."""
    document = llm.add_document(prompt(300, 99))
    answers = [
        tokens_of(*llm.generate([tokens], own, document=document if index % 3 else None))
        for index, (tokens, own) in enumerate(requests)
    ]
    prompts, params = [tokens for tokens, _ in requests], [own for _, own in requests]
    outputs = llm.generate(prompts, params, document=document)
    assert [len(tokens) for output in outputs for tokens in tokens_of(output)] == [
        own.max_tokens for own in params for _ in range(own.n)
    ]
    llm.remove_document(document)
    return answers


def test_an_engine_with_graphs_gives_what_it_gives_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    requests = [
        (
            prompt(rng.choice((5, 80, 200, 400)), seed),
            SamplingParams(
                max_tokens=count, min_tokens=count, stop_token_ids=(5,), temperature=0, n=rng.choice((1, 2))
            ),
        )
        for seed, count in enumerate(rng.choices(range(1, 61), k=8))
    ]
    model, answers = llama(), []
    for graphed in (True, False):
        if not graphed:
            without_graphs(monkeypatch)
        with LLM(model, shadowkv=small_config(), max_num_seqs=4, max_prefill_tokens=128, device_memory="4G") as llm:
            batched = llm._runner.batched
            assert batched is not None and batched.captures == graphed
            answers.append(ask(llm, requests))
            assert batched._is_usable and not any(batched.batch.tensors().values())
            assert_nothing_is_left(llm)
    assert answers[0] == answers[1]
