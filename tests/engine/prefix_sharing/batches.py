"""Batches whose rows share prefixes, padded as trainers pad them."""

import torch


def pad(rows: list[list[int]], *, side: str = "right", extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [N, L]; token 0 fills up."""
    length = max(map(len, rows)) + extra
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        cells = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, cells] = torch.tensor(row)
        mask[index, cells] = 1
    return ids, mask


def pairs(*, seed: int = 0, vocabulary: int = 128) -> list[list[int]]:
    """Chosen answers, then rejected ones, of three prompts, as TRL's DPO collator orders them."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    prompts = [text(length) for length in (30, 41, 17)]
    return [prompt + text(length) for lengths in ((9, 3, 14), (5, 12, 1)) for prompt, length in zip(prompts, lengths)]  # noqa: B905


def groups(*, seed: int = 0, vocabulary: int = 128) -> list[list[int]]:
    """Four completions of each of two prompts."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    return [prompt + text(3 + 2 * index) for prompt in (text(25), text(33)) for index in range(4)]
