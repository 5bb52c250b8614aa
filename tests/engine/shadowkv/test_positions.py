"""A later turn's mask either agrees with the earlier ones, and the tokens are the stock cache's, or it is refused."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import tiny_model

EVERYTHING = ShadowKVConfig(rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=8, segment_tokens=64)
HISTORY, PADDING = 120, 13


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def history() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 128, (2, HISTORY), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


def two_turns(model: Any, cache: Any, num_new: int, change: Any) -> torch.Tensor:
    """Tokens generated after a second turn whose mask of the first is `change`d."""
    ids, mask = history()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    new = torch.randint(2, 128, (2, num_new), generator=torch.Generator().manual_seed(4))
    mask = change(torch.cat([mask, torch.ones_like(new)], 1))
    return model.generate(
        torch.cat([ids, new], 1), attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
    )


@pytest.mark.parametrize("num_new", [1, 2, 40])
def test_a_mask_that_goes_on_gives_the_stock_caches_tokens(llama: Any, num_new: int) -> None:
    expected = two_turns(llama, DynamicCache(config=llama.config), num_new, lambda mask: mask)
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        assert torch.equal(two_turns(llama, cache, num_new, lambda mask: mask), expected)


def _hide(mask: torch.Tensor) -> torch.Tensor:
    mask[1, 20:60] = 0
    return mask


def _show_padding(mask: torch.Tensor) -> torch.Tensor:
    mask[0, 3] = 1
    return mask


def _swap(mask: torch.Tensor) -> torch.Tensor:
    """As many tokens as before, but others."""
    mask[0, PADDING - 1], mask[0, 50] = 1, 0
    return mask


@pytest.mark.parametrize("num_new", [1, 2, 40])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_hide, "hides earlier token 20 of sequence 1"),
        (_show_padding, "shows earlier token 3 of sequence 0"),
        (_swap, "shows earlier token 12 of sequence 0"),
        (torch.ones_like, "shows earlier token 0 of sequence 0"),
    ],
)
def test_a_mask_that_says_something_else_of_earlier_tokens_is_refused(
    llama: Any, num_new: int, change: Any, complaint: str
) -> None:
    with (
        ShadowKVCache.for_model(llama, EVERYTHING) as cache,
        pytest.raises(ValueError, match=rf"({complaint}).*pass the mask of the earlier turns"),
    ):
        two_turns(llama, cache, num_new, change)


@pytest.mark.parametrize("num_new", [1, 2])
def test_no_mask_after_a_padded_turn_is_refused(llama: Any, num_new: int) -> None:
    ids, mask = history()
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache, torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="shows earlier token 0 of sequence 0"):
            llama(ids[:, :num_new], past_key_values=cache)


def test_a_mask_of_other_sequences_is_refused(llama: Any) -> None:
    ids, mask = history()
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache, torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
        swapped = torch.cat([mask.flip(0), torch.ones_like(mask[:, :1])], 1)
        with pytest.raises(ValueError, match="earlier token 0 of sequence 0"):
            llama(ids[:, :1], attention_mask=swapped, past_key_values=cache)


@pytest.mark.parametrize("num_columns", [1, HISTORY, HISTORY + 2])
def test_a_mask_of_another_length_is_refused(llama: Any, num_columns: int) -> None:
    ids, mask = history()
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache, torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=rf"mask is \[2, {num_columns}\].*pass the mask of the earlier turns"):
            llama(ids[:, :1], attention_mask=torch.ones(2, num_columns), past_key_values=cache)
