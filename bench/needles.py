"""Needle prompts: a document of real prose with facts hidden in it, and a question about one of them.

The wording is one at which SmolLM2-135M-Instruct with full attention finds nearly all needles at 4,000 tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bench.prose import language_reference, passages

CITIES = (
    "Paris Cairo Lima Oslo Tokyo Madrid Nairobi Dublin Vienna Havana Athens Quito Seoul Lisbon Prague Delhi Ottawa "
    "Warsaw Berlin Rome"
).split()
FACT = "The special magic number for {city} is {number}."
QUESTION = "What is the special magic number for {city}?"
ANSWER_START = "The special magic number for {city} is"
ANSWER_TOKENS = 12
# A document's chat frame and question in tokens, roughly: what the document leaves of the context.
FRAME_TOKENS = 90

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One case, as token ids.

    Attributes:
        document: everything up to the end of the document.
        question: with `document`, a prompt that ends in the start of the answer.
        first_turn: with `document`, a first turn that only gives the text.
        second_turn: the question as a turn of its own, after `first_turn`.
        number: what the answer must contain.
    """

    document: list[int]
    question: list[int]
    first_turn: list[int]
    second_turn: list[int]
    number: str


def make_needles(
    tokenizer: PreTrainedTokenizerBase, *, count: int, context_tokens: int, num_keys: int, seed: int
) -> list[Needle]:
    """`count` needles at evenly spread depths in prompts of about `context_tokens`; `num_keys` - 1 distractors each."""
    rng = random.Random(seed)
    text = _encode(tokenizer, language_reference())
    length = context_tokens - FRAME_TOKENS - 20 * num_keys
    return [
        _make_needle(tokenizer, passage, index=index, depth=(index + 0.5) / count, num_keys=num_keys, rng=rng)
        for index, passage in enumerate(passages(text, count=count, length=length))
    ]


def _make_needle(
    tokenizer: PreTrainedTokenizerBase,
    passage: list[int],
    *,
    index: int,
    depth: float,
    num_keys: int,
    rng: random.Random,
) -> Needle:
    city = CITIES[index % len(CITIES)]
    others = rng.sample([other for other in CITIES if other != city], num_keys - 1)
    numbers = [str(number) for number in rng.sample(range(10_000, 100_000), num_keys)]
    depths = [depth, *(rng.random() for _ in others)]
    facts = sorted(zip(depths, [city, *others], numbers, strict=True), reverse=True)
    document = passage
    for place, name, number in facts:
        sentence = _encode(tokenizer, " " + FACT.format(city=name, number=number) + " ")
        start = _sentence_end(tokenizer, passage, int(place * len(passage)))
        document = document[:start] + sentence + document[start:]
    question = QUESTION.format(city=city)
    answer = ASSISTANT + ANSWER_START.format(city=city)
    first_turn = (
        "\n\nI will ask a question about this text." + ASSISTANT + "I have read the text. What is your question?"
    )
    return Needle(
        document=_encode(tokenizer, SYSTEM + USER) + document,
        question=_encode(tokenizer, "\n\n" + question + answer),
        first_turn=_encode(tokenizer, first_turn + END),
        second_turn=_encode(tokenizer, "\n" + USER + "Question about the text: " + question + answer),
        number=numbers[0],
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _sentence_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int], start: int) -> int:
    """The nearest end of a sentence at or before `start`; 0 where there is none."""
    while start > 0 and not str(tokenizer.decode(tokens[start - 1 : start])).rstrip("\n").endswith("."):
        start -= 1
    return start
