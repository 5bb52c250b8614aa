"""The example learns, and its shared log-probabilities are those of the padded batch."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from longshadow import PrefixTree
from tests.tiny_models import tiny_model, tiny_tokenizer

PATH = Path(__file__).resolve().parents[2] / "examples" / "dpo_plain_pytorch.py"


def example() -> Any:
    specification = importlib.util.spec_from_file_location("dpo_plain_pytorch", PATH)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_losses_fall_from_log_two() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    losses = example().train(model, tiny_tokenizer(), 4, learning_rate=1e-3)
    assert abs(losses[0] - torch.log(torch.tensor(2.0)).item()) < 1e-6
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.004


def test_log_probabilities_are_those_of_the_padded_batch() -> None:
    module, model, tokenizer = example(), tiny_model(), tiny_tokenizer()
    model.set_attn_implementation("sdpa")
    rows, prompt_lengths = module.preference_rows(tokenizer)
    ids, mask = module.padded(rows)
    is_answer = (torch.arange(1, ids.shape[1]) >= torch.tensor(prompt_lengths)[:, None]) & mask[:, 1:].bool()
    with torch.no_grad():
        actual = module.answer_logps(model, PrefixTree.from_batch(ids, mask), ids, is_answer)
        logps = model(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(actual, (logps * is_answer).sum(1), rtol=1e-5, atol=1e-4)
