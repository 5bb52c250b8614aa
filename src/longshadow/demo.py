"""`make demo`: a real model finds a planted fact in a real document, on default settings."""

import sys

from longshadow import ShadowKVConfig
from longshadow.display import answer, print_report
from longshadow.generation import Sampling
from longshadow.model_sources import DEMO_NAME
from longshadow.models import load_model
from longshadow.prompts import encode_prompt

TOPIC = "typesseq"
DOCUMENT_CHARACTERS = 18_000
CODE = "7412"
FACT = f"The special magic number for Aurora is {CODE}."
QUESTION = "What is the special magic number for Aurora?"
MAX_NEW_TOKENS = 48


def build_document() -> str:
    """The start of the chapter on sequence types that ships with Python, `FACT` planted in its middle."""
    from pydoc_data.topics import topics

    paragraphs = topics[TOPIC][:DOCUMENT_CHARACTERS].split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, FACT)
    return "\n\n".join(paragraphs)


def main() -> int:
    """Runs the demo; 0 when the answer with a ShadowKV cache holds the planted code, 1 when not."""
    try:
        loaded = load_model(DEMO_NAME)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prompt_ids = encode_prompt(loaded.tokenizer, build_document(), QUESTION)
    print(f"document: Python's chapter on sequence types, {prompt_ids.shape[1]:,} tokens with the question")
    print(f"planted in its middle: {FACT}\nquestion: {QUESTION}\n", flush=True)
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    report = answer(loaded, prompt_ids, sampling, ShadowKVConfig(), compare=True, stream=True)
    print_report(report)
    if CODE not in report.shadowkv.text:
        print(f"wrong: the answer with ShadowKV does not contain {CODE}", file=sys.stderr)
        return 1
    print(f"right: the answer with ShadowKV contains {CODE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
