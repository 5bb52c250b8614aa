"""The baselines: each is a rule for which tokens a query attends to, given how many it may.

A query that sees m tokens attends to `budget(m)` = fraction x m of them, its own and all generated ones
included. Scores of query heads that share a KV head are softmaxed and maximised, as ShadowKV does.

Legend: H KV heads, G query heads per KV head, T queries, n tokens, D head_dim, P pages.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from bench.baselines.exact_cache import ExactLayer, SelectionMaker

ORACLE = "oracle top-k"
STREAMING_SINK_TOKENS = 4
QUEST_PAGE_TOKENS = 16
SNAPKV_POOLING = 7


def budgets(fraction: float, visible_Tn: torch.Tensor) -> torch.Tensor:
    """Tokens each query may attend to, [T]."""
    return (fraction * visible_Tn.sum(1)).round().long().clamp(min=1)


def keep_best(scores_HTn: torch.Tensor, counts_T: torch.Tensor) -> torch.Tensor:
    """A mask [H, T, n] of the counts_T[t] highest scores of each query t."""
    most = min(int(counts_T.max()), scores_HTn.shape[2])
    best = scores_HTn.topk(most, dim=2).indices
    kept = (torch.arange(most, device=counts_T.device) < counts_T.unsqueeze(1)).expand(best.shape)
    return torch.zeros_like(scores_HTn, dtype=torch.bool).scatter_(2, best, kept)


def group_scores(logits_HGTn: torch.Tensor, candidates_Tn: torch.Tensor) -> torch.Tensor:
    """softmax over the candidates, maximum over the group: [H, T, n]; -1 where there is no candidate."""
    probabilities = logits_HGTn.masked_fill(~candidates_Tn, -torch.inf).softmax(-1).amax(1)
    return probabilities.masked_fill(~candidates_Tn, -1.0)


class OracleTopK:
    """The tokens with the largest exact attention weights: what a selection at this budget could at best find."""

    evicts = False

    def __init__(self, layer: ExactLayer, *, fraction: float) -> None:
        self._fraction = fraction

    def select(self, query_HGTD: torch.Tensor, keys_HnD: torch.Tensor, visible_Tn: torch.Tensor) -> torch.Tensor:
        """See `Selection.select`."""
        logits = torch.matmul(query_HGTD, keys_HnD.transpose(1, 2).unsqueeze(1))
        return keep_best(group_scores(logits, visible_Tn), budgets(self._fraction, visible_Tn))


class Quest:
    """Pages by an upper bound of their logits from the minimum and maximum key (arXiv 2406.10774).

    The page being filled is always attended. All layers are sparse; the paper leaves the first two dense.
    """

    evicts = False

    def __init__(self, layer: ExactLayer, *, fraction: float) -> None:
        self._fraction = fraction
        _, num_heads, _, head_dim = layer.keys.shape
        self._low_HPD = self._high_HPD = layer.keys.new_empty(num_heads, 0, head_dim)

    def select(self, query_HGTD: torch.Tensor, keys_HnD: torch.Tensor, visible_Tn: torch.Tensor) -> torch.Tensor:
        """See `Selection.select`."""
        num_tokens = keys_HnD.shape[1]
        self._bound_new_pages(keys_HnD)
        # max(q low, q high) summed over the elements: positive elements take the high end, negative the low one.
        logits = torch.matmul(query_HGTD.clamp(min=0), self._high_HPD.transpose(1, 2).unsqueeze(1))
        logits += torch.matmul(query_HGTD.clamp(max=0), self._low_HPD.transpose(1, 2).unsqueeze(1))
        num_visible_T = visible_Tn.sum(1)
        num_full_T = num_visible_T // QUEST_PAGE_TOKENS
        candidates_TP = torch.arange(logits.shape[3], device=logits.device) < num_full_T.unsqueeze(1)
        rest_T = budgets(self._fraction, visible_Tn) - num_visible_T % QUEST_PAGE_TOKENS
        counts_T = (rest_T / QUEST_PAGE_TOKENS).round().long().clamp(min=1)
        pages = keep_best(group_scores(logits, candidates_TP), torch.minimum(counts_T, num_full_T))
        tokens = pages.repeat_interleave(QUEST_PAGE_TOKENS, dim=2)
        tokens = F.pad(tokens, (0, num_tokens - tokens.shape[2]))
        filling_Tn = torch.arange(num_tokens, device=logits.device) >= (num_full_T * QUEST_PAGE_TOKENS).unsqueeze(1)
        return tokens | filling_Tn

    def _bound_new_pages(self, keys_HnD: torch.Tensor) -> None:
        num_known, num_full = self._low_HPD.shape[1], keys_HnD.shape[1] // QUEST_PAGE_TOKENS
        if num_full > num_known:
            new = keys_HnD[:, num_known * QUEST_PAGE_TOKENS : num_full * QUEST_PAGE_TOKENS]
            pages = new.unflatten(1, (-1, QUEST_PAGE_TOKENS))
            self._low_HPD = torch.cat([self._low_HPD, pages.amin(2)], 1)
            self._high_HPD = torch.cat([self._high_HPD, pages.amax(2)], 1)


class StreamingLLM:
    """The first tokens and a window of the latest (arXiv 2309.17453), positions left as they are."""

    evicts = True

    def __init__(self, layer: ExactLayer, *, fraction: float) -> None:
        self._fraction = fraction

    def select(self, query_HGTD: torch.Tensor, keys_HnD: torch.Tensor, visible_Tn: torch.Tensor) -> torch.Tensor:
        """See `Selection.select`."""
        age_Tn = visible_Tn.sum(1, keepdim=True) - 1 - torch.arange(keys_HnD.shape[1], device=visible_Tn.device)
        window_T1 = (budgets(self._fraction, visible_Tn) - STREAMING_SINK_TOKENS).clamp(min=1).unsqueeze(1)
        sink_n = torch.arange(keys_HnD.shape[1], device=visible_Tn.device) < STREAMING_SINK_TOKENS
        return ((age_Tn < window_T1) | sink_n).expand(keys_HnD.shape[0], -1, -1)


class SnapKV:
    """At the end of the prompt its last queries vote on which tokens stay (arXiv 2404.14469); the rest is gone.

    Votes are attention weights summed over the window and the group and max-pooled over neighbours; the window
    itself stays. Later tokens take their place in the budget, worst prompt tokens leaving first, down to half of it;
    from then on only the latest of them are seen.
    """

    evicts = True

    def __init__(self, layer: ExactLayer, *, fraction: float) -> None:
        self._fraction = fraction
        self._num_prompt = layer.num_tokens
        assert layer.recent_queries_HGWD is not None
        keys, queries = layer.keys[0, :, : layer.num_tokens], layer.recent_queries_HGWD
        window = queries.shape[2]
        logits = torch.matmul(queries, keys.transpose(1, 2).unsqueeze(1))
        hidden = torch.ones(window, layer.num_tokens, dtype=torch.bool, device=keys.device)
        logits.masked_fill_(hidden.triu(layer.num_tokens - window + 1), -torch.inf)
        votes = logits.softmax(-1).sum((1, 2))
        votes = F.max_pool1d(votes, SNAPKV_POOLING, stride=1, padding=SNAPKV_POOLING // 2)
        # Votes are at most window x group, so this ranks the window first, its latest tokens foremost.
        votes[:, -window:] = votes.numel() + torch.arange(window, device=keys.device)
        order = votes.argsort(dim=1, descending=True)
        self._rank_Hn = torch.empty_like(order).scatter_(
            1, order, torch.arange(layer.num_tokens, device=keys.device).expand_as(order)
        )

    def select(self, query_HGTD: torch.Tensor, keys_HnD: torch.Tensor, visible_Tn: torch.Tensor) -> torch.Tensor:
        """See `Selection.select`."""
        num_later = keys_HnD.shape[1] - self._num_prompt
        budget_T = budgets(self._fraction, visible_Tn)
        later_T = visible_Tn.sum(1) - self._num_prompt
        from_prompt_T = torch.maximum(budget_T - later_T, budget_T // 2)
        prompt = self._rank_Hn.unsqueeze(1) < from_prompt_T.unsqueeze(1)
        age_Tl = (later_T - 1).unsqueeze(1) - torch.arange(num_later, device=visible_Tn.device)
        later = (age_Tl < (budget_T - from_prompt_T).unsqueeze(1)).expand(keys_HnD.shape[0], -1, -1)
        return torch.cat([prompt, later], 2)


def selection_makers(fraction: float) -> dict[str, SelectionMaker]:
    """The baselines at one attended fraction, by the name they have in tables."""
    return {
        ORACLE: partial(OracleTopK, fraction=fraction),
        "Quest": partial(Quest, fraction=fraction),
        "SnapKV": partial(SnapKV, fraction=fraction),
        "StreamingLLM": partial(StreamingLLM, fraction=fraction),
    }
