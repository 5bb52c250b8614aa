"""Batch inference: prompts of a file through the engine, many at once, results in the order in which they finish."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from longshadow.batch_files import Results, Task
from longshadow.engine.runtime import LLM, EngineClosed, QueueFull, RequestFailed, RequestOutput, SamplingParams

# Tasks in the engine for each sequence it runs, so that there is always one waiting.
TASKS_PER_SEQUENCE = 2
logger = logging.getLogger(__name__)

FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
LISTS = ("stop", "stop_token_ids")


@dataclass(kw_only=True)
class BatchCounts:
    """What became of the lines."""

    answered: int = 0
    refused: int = 0
    done_before: int = 0


def run_batch(
    llm: LLM,
    tasks: Iterator[Task],
    results: Results,
    defaults: SamplingParams,
    *,
    on_line: Callable[[], None] = lambda: None,
) -> BatchCounts:
    """Answers every task that has no result yet. A line that cannot be answered gets its reason as its result.

    Each line is an object with `prompt` (a text or token ids) or `messages` (of a chat), optionally `id`, and any
    sampling parameters, which win over `defaults`.

    Raises:
        ValueError: the results are of another input.
    """
    counts = BatchCounts()

    async def work() -> None:
        for task in tasks:
            if results.has(task):
                counts.done_before += 1
            else:
                result = await _answer(llm, task, defaults)
                results.append(task, result)
                counts.answered += "error" not in result
                counts.refused += "error" in result
            on_line()

    async def work_together() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS_PER_SEQUENCE * llm.max_num_seqs):
                group.create_task(work())

    try:
        asyncio.run(work_together())
    except ExceptionGroup as errors:  # one is enough to tell, and users' errors are no groups
        raise errors.exceptions[0] from errors
    return counts


async def _answer(llm: LLM, task: Task, defaults: SamplingParams) -> dict[str, Any]:
    identity = {"id": task.content["id"]} if isinstance(task.content, dict) and "id" in task.content else {}
    try:
        prompt, params = parse_task(llm, task, defaults)
        output = await _last_output(llm, prompt, params)
    except (ValueError, RequestFailed) as error:
        return identity | {"error": " ".join(str(error).split())}
    except EngineClosed:
        raise
    # A line's failure is that line's, whatever code of others it met.
    except Exception as error:
        logger.error("line %d cannot be answered", task.line, exc_info=error)
        return identity | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return identity | {
        "outputs": [
            {
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                **(
                    {}
                    if completion.logprobs is None
                    else {"logprobs": list(map(dataclasses.asdict, completion.logprobs))}
                ),
            }
            for completion in output.outputs
        ],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        },
    }


async def _last_output(llm: LLM, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    while True:
        try:
            return [output async for output in llm.stream(prompt, params)][-1]
        except QueueFull:
            await asyncio.sleep(0.1)


def parse_task(llm: LLM, task: Task, defaults: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    """Prompt and parameters of a line. Raises ValueError for one that has none, or unknown fields."""
    content = task.content
    if task.reason is not None:
        raise ValueError(task.reason)
    if not isinstance(content, dict):
        raise ValueError("the line is no JSON object")
    if unknown := sorted(set(content) - FIELDS - {"prompt", "messages", "id"}):
        raise ValueError(f"unknown field {unknown[0]!r}; there are prompt, messages, id, {', '.join(sorted(FIELDS))}")
    if ("prompt" in content) == ("messages" in content):
        raise ValueError("give either prompt or messages")
    changes = {name: value for name, value in content.items() if name in FIELDS}
    for name in LISTS:
        if isinstance(changes.get(name), list):
            changes[name] = tuple(changes[name])
    params = dataclasses.replace(defaults, **changes)
    if "messages" in content:
        return llm.chat_prompt(content["messages"]), params
    prompt = content["prompt"]
    if not isinstance(prompt, str | list):
        raise ValueError("prompt must be a text or a list of token ids")
    return prompt, params
