"""Small engines for tests, and what is asked of them.

A random model over bytes in fp64, whose caches are compressed after a few tokens.
"""

import random
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from longshadow import LLM, SamplingParams, ShadowKVConfig
from longshadow.engine.runtime import EngineStatistics, RequestOutput
from tests.tiny_models import tiny_model, tiny_tokenizer

GREEDY = SamplingParams(max_tokens=12, temperature=0)
WORDS = "the cache keeps what the next step needs and forgets all else, ".split(" ")
SMALL = dict(budget_tokens=32, rank=8, dense_threshold=64, local_tokens=16, segment_tokens=64, num_outlier_chunks=2)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def peaked_model() -> LlamaForCausalLM:
    """The tiny model in fp64, its keys and queries widened so that attention, and mistakes in it, matter."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj")):
                parameter.mul_(20)
            elif "embed" in name:
                parameter.mul_(10)
    return model.double()


def small_config(**changes: Any) -> ShadowKVConfig:
    """Compresses contexts of more than 64 tokens."""
    return ShadowKVConfig(**{**SMALL, **changes})


def engine(**changes: Any) -> LLM:
    """An engine over `peaked_model` with a tokenizer of bytes."""
    arguments: dict[str, Any] = {
        "model": changes.pop("model", None) or peaked_model(),
        "tokenizer": tiny_tokenizer(CHAT_TEMPLATE),
        "shadowkv": small_config(),
        "max_num_seqs": 4,
        "max_prefill_tokens": 128,
        "device_memory": "1G",
        **changes,
    }
    return LLM(arguments.pop("model"), **arguments)


def text(length: int, seed: int = 0) -> str:
    """Words, so many characters of them."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))[:length]


def tokens_of(output: RequestOutput) -> list[list[int]]:
    """Of each completion."""
    return [completion.token_ids for completion in output.outputs]


async def last_of(
    stream: AsyncGenerator[RequestOutput, None], on_output: Callable[[], object] = lambda: None
) -> RequestOutput:
    """The finished output of a stream."""
    outputs = []
    async for output in stream:
        outputs.append(output)
        on_output()
    return outputs[-1]


def free_of_requests(statistics: EngineStatistics) -> bool:
    """Whether nothing runs or waits."""
    return statistics.num_running == statistics.num_waiting == 0


def assert_nothing_is_left(llm: LLM) -> None:
    """No slot, byte or task of any request: only the engine's own part, documents and cached heads are reserved."""
    deadline = time.monotonic() + 60
    while not free_of_requests(llm.statistics()) and time.monotonic() < deadline:
        time.sleep(0.01)
    inner = llm._engine
    assert free_of_requests(llm.statistics())
    assert inner.scheduler.num_free_slots == llm.max_num_seqs
    assert inner._requests == {}
    cached = inner.holdings.prefixes.bytes if inner.holdings.prefixes is not None else type(inner.holdings.held)()
    assert inner.budget.reserved == inner.holdings.held + cached
    assert all(document.num_users == 0 for document in inner.holdings.documents.values())
