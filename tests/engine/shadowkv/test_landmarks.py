"""Landmarks and the chunks they describe badly."""

import torch

from longshadow.engine.shadowkv.landmarks import choose_exact_chunks, summarize_chunks


def test_landmark_is_the_mean_and_cosine_the_worst_key() -> None:
    keys = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    landmarks, cosine = summarize_chunks(keys, 8)
    torch.testing.assert_close(landmarks[1, 3], keys[1, 24:32].mean(0))
    worst = torch.nn.functional.cosine_similarity(keys[1, 24:32], landmarks[1, 3].expand(8, -1), dim=-1).min()
    torch.testing.assert_close(cosine[1, 3], worst)


def test_sinks_come_first_and_outliers_are_the_lowest() -> None:
    cosine = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3], [0.9, 0.8, 0.7, 0.6, 0.5]])
    assert choose_exact_chunks(cosine, 1, 2).tolist() == [[0, 2, 4], [0, 3, 4]]
    assert choose_exact_chunks(cosine, 0, 1).tolist() == [[0], [4]]
    assert choose_exact_chunks(cosine, 9, 9).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert choose_exact_chunks(cosine, 0, 0).shape == (2, 0)
