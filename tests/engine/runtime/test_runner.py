"""Batches of sequences against ShadowKVCache, one sequence at a time."""

from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from longshadow import ShadowKVCache, ShadowKVConfig
from longshadow.engine.runtime.batch import Chunk
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.shadowkv.segment import Segment
from tests.engine.shadowkv.families import tiny_model

CONFIG = ShadowKVConfig(
    budget_tokens=32, rank=16, dense_threshold=0, local_tokens=16, segment_tokens=64, num_outlier_chunks=2
)
LENGTHS = (150, 90, 37, 1)
STEPS = 30
CHUNK = 64


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 128, (length,), generator=generator).tolist() for length in LENGTHS]


def one_by_one(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    generate = model.generate  # type: ignore[operator]
    with ShadowKVCache.for_model(model, CONFIG) as cache:
        output = generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def together(model: PreTrainedModel, wanted: list[list[int]]) -> list[list[int]]:
    runner = ModelRunner(model, CONFIG, 512)
    states: list[SequenceState] = []
    answers: list[list[int]] = []
    for prompt in wanted:
        state = runner.new_state(512, blocked_energy=True)
        for start in range(0, len(prompt), CHUNK):
            tokens = prompt[start : start + CHUNK]
            is_last = start + CHUNK >= len(prompt)
            logits = runner.read([Chunk(state=state, tokens=tokens, is_last=is_last, num_prompt=len(prompt))])
        states.append(state)
        answers.append([int(logits[0].argmax())])
    for _ in range(STEPS - 1):
        logits = runner.decode(states, [answer[-1] for answer in answers])
        for answer, row in zip(answers, logits, strict=True):
            answer.append(int(row.argmax()))
    runner.close()
    return answers


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "cohere2", "glm4"])
@torch.inference_mode()
def test_a_batch_gives_what_each_sequence_gives_alone(family: str) -> None:
    model = tiny_model(family).double()
    # The single token would be taken for a decoded one by generate, too: its whole history is itself.
    assert together(model, prompts()) == [one_by_one(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@torch.inference_mode()
def test_experts_in_single_precision(family: str) -> None:
    """transformers' grouped experts know no fp64."""
    model = tiny_model(family)
    assert together(model, prompts()[:2]) == [one_by_one(model, prompt) for prompt in prompts()[:2]]


@torch.inference_mode()
def test_chunks_of_several_prompts_share_a_forward() -> None:
    model = tiny_model("gemma3_text").double()
    runner = ModelRunner(model, CONFIG, 512)
    wanted = prompts()[1:3]
    alone, joint = ([runner.new_state(512, blocked_energy=True) for _ in wanted] for _ in range(2))
    expected = [
        runner.read([Chunk(state=state, tokens=prompt, is_last=True, num_prompt=len(prompt))])[0]
        for state, prompt in zip(alone, wanted, strict=True)
    ]
    found = runner.read(
        [
            Chunk(state=state, tokens=prompt, is_last=True, num_prompt=len(prompt))
            for state, prompt in zip(joint, wanted, strict=True)
        ]
    )
    runner.close()
    torch.testing.assert_close(found, torch.stack(expected))


@torch.inference_mode()
def test_forks_share_segments_and_go_their_own_ways() -> None:
    model = tiny_model("gemma3_text").double()
    runner = ModelRunner(model, CONFIG, 512)
    state = runner.new_state(512, blocked_energy=True)
    prompt = prompts()[0]
    runner.read([Chunk(state=state, tokens=prompt, is_last=True, num_prompt=len(prompt))])
    expected = runner.decode([state.fork(512)], [5])
    first, second = state.fork(200), state.fork(512)
    runner.decode([first], [7])
    assert first.layers[0].segments[0] is state.layers[0].segments[0]  # type: ignore[union-attr]
    assert torch.equal(runner.decode([second], [5]), expected)
    runner.close()


@torch.inference_mode()
def test_questions_on_a_document_are_read_together() -> None:
    model = tiny_model("llama").double()
    runner = ModelRunner(model, CONFIG, 512)
    document = runner.new_state(512, blocked_energy=True)
    prompt = prompts()[0]
    runner.read([Chunk(state=document, tokens=prompt, is_last=True, num_prompt=len(prompt))])

    def chunks(questions: list[list[int]]) -> list[Chunk]:
        return [
            Chunk(state=document.fork(512), tokens=tokens, is_last=True, num_prompt=len(tokens)) for tokens in questions
        ]

    questions = [[5, 6, 7], [9], [11, 3]]
    expected = torch.cat([runner.read(chunks([question])) for question in questions])
    with mock.patch.object(Segment, "span", autospec=True, side_effect=Segment.span) as span:
        found = runner.read(chunks(questions))
    runner.close()
    assert span.call_count == len(document.layers)
    torch.testing.assert_close(found, expected)


def test_close_gives_the_model_its_own_attention_back() -> None:
    model = tiny_model("llama")
    before = [dict(vars(module)) for module in model.modules()]
    runner = ModelRunner(model, CONFIG, 64)
    assert [dict(vars(module)) for module in model.modules()] != before
    runner.close()
    runner.close()
    assert [dict(vars(module)) for module in model.modules()] == before
