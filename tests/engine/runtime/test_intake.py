"""Whatever is no prompt, parameter or limit is refused in one line, where it is given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaModel, T5Config, T5ForConditionalGeneration

from longshadow import LLM, SamplingParams
from tests.engine.runtime.engines import GREEDY, assert_nothing_is_left, engine, tokens_of
from tests.tiny_models import tiny_model, write_folder

ONE_LINE = r"\A[^\n]{5,300}\Z"
NO_PROMPTS: list[Any] = [
    "",
    [[]],
    "\ud800",
    "a\udfffb",
    ["a", "\ud83d"],
    [258],
    [2**70],
    [-1],
    [1.0],
    [float("nan")],
    [True, False],
    [1, True],
    [np.bool_(True)],
    [None],
    [[1, "a"]],
    [[1, None]],
    [[[1]]],
    ["a", 5],
    ["a", b"b"],
    [{"role": "user", "content": "a"}],
    torch.tensor([1, 2]),
    np.array([1, 2]),
    [torch.tensor([1, 2])],
    [np.array([1.5])],
    None,
    5,
    b"abc",
    {"prompt_token_ids": [1]},
    "a" * 5000,
]
NO_PARAMS: list[dict[str, Any]] = [
    {"stop_token_ids": [2**63]},
    {"stop_token_ids": [258]},
    {"stop_token_ids": 5},
    {"stop_token_ids": [True]},
    {"stop": 5},
    {"stop": [b"a"]},
    {"stop": "\ud800"},
    {"temperature": "hot"},
    {"temperature": True},
    {"repetition_penalty": 1e-320},
    {"repetition_penalty": float("nan")},
    {"top_k": 1.5},
    {"top_k": 2**40},
    {"top_p": float("nan")},
    {"max_tokens": 1.0},
    {"max_tokens": 10**9},
    {"ignore_eos": "no"},
    {"logprobs": True},
    {"n": 5},
]


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_no_prompts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ValueError, match=ONE_LINE):
        llm.generate(prompt, GREEDY)
    # One that waits beside it is not run, and the engine goes on.
    before = llm.statistics().num_generated_tokens
    with pytest.raises(ValueError, match=ONE_LINE):
        llm.generate(["abc", *prompt] if isinstance(prompt, list) else ["abc", prompt], GREEDY)
    assert llm.statistics().num_generated_tokens == before and not llm.is_closed


@pytest.mark.parametrize("changes", NO_PARAMS, ids=repr)
def test_no_parameters(llm: LLM, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))) as refusal:
        llm.generate([1, 2, 3], SamplingParams(**changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("params", [{}, {"max_tokens": 5}, [GREEDY, GREEDY], [5], "greedy"])
def test_parameters_of_another_type(llm: LLM, params: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate(["a"], params)


def test_foreign_documents_and_texts(llm: LLM) -> None:
    for text in (5, None, b"a", [True], ["a"], "\ud800", [], " "):
        with pytest.raises(ValueError, match=ONE_LINE):
            llm.add_document(text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document must be one that add_document"):
        llm.generate("a", document="report")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document must be one that add_document"):
        llm.remove_document("report")  # type: ignore[arg-type]
    assert_nothing_is_left(llm)


def test_whole_numbers_of_other_libraries_are_token_ids(llm: LLM) -> None:
    [expected] = llm.generate([5, 6, 7], GREEDY)
    for prompt in ([np.int64(5), np.uint8(6), 7], [torch.tensor(5), 6, 7], [[np.int32(5), 6, 7]], (5, 6, 7)):
        [output] = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
        assert tokens_of(output) == tokens_of(expected) and output.prompt_token_ids == [5, 6, 7]
        assert all(type(token) is int for token in output.prompt_token_ids)
    assert len(llm.generate([[5, 6], "abc"], GREEDY)) == 2 and llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 5}, "model must be a hub id"),
        ({"model": tiny_model().config}, "model must be a hub id"),
        ({"model": LlamaModel(tiny_model().config)}, "LlamaModel has no head"),
        (
            {
                "model": T5ForConditionalGeneration(
                    T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
                )
            },
            "has an encoder",
        ),
        ({"model": "none/such"}, "none/such"),
        ({"tokenizer": "gpt2"}, "tokenizer must be one of transformers"),
        ({"shadowkv": {"rank": 8}}, "shadowkv must be a ShadowKVConfig"),
        ({"adapter": "/none/such"}, "/none/such"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs must be a whole number"),
        ({"max_num_waiting": 1.5}, "max_num_waiting must be a whole number"),
        ({"max_model_len": 100.0}, "max_model_len must be a whole number"),
        ({"max_prefill_tokens": None}, "max_prefill_tokens must be a whole number"),
        ({"device_memory": None}, "device_memory must be"),
        ({"host_memory": "8X"}, "host_memory must be"),
    ],
)
def test_no_engines(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        engine(**changes)
    assert "\n" not in str(refusal.value)


def test_limits_are_checked_before_a_model_is_loaded() -> None:
    for changes in ({"max_num_seqs": 0}, {"device_memory": "lots"}, {"host_memory": "nan"}, {"shadowkv": 5}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            LLM("none/such", **changes)  # type: ignore[arg-type]


def test_a_path_is_a_model(tmp_path: Path) -> None:
    with LLM(write_folder(tmp_path / "model"), device_memory="200MB") as llm:
        assert llm.generate("abc", GREEDY)[0].finished
