"""Tiny random configurations of every family that is claimed, and an independent computation of ShadowKV.

`DenseShadowKV` computes the same algorithm from the paper's text with nothing of the package: raw keys are
spied from the family's own RoPE call, factorised with an SVD in fp64, rotated by the family's own function,
and attention is a dense softmax over all tokens with a mask.
"""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=1,
)
HYBRID = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=24)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "qwen3_moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mistral": dict(sliding_window=None),
    "gemma3_text": dict(head_dim=16, **HYBRID),
    "phi": {},
    "phi3": {},
    "glm4": dict(head_dim=16),
    "olmo2": {},
    "granite": {},
    "cohere2": HYBRID,
    "gpt_oss": dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1, **HYBRID),
}


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode; eager attention, the one every family has."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wider key and query weights than the initial ones make attention peaked, so mistakes show.
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) and parameter.dim() == 2:
                parameter.mul_(8)
    return model


class DenseShadowKV:
    """Dense-masked ShadowKV for one forward-by-forward run of a model; batch with left padding."""

    def __init__(
        self,
        *,
        rank: int,
        budget_chunks: int,
        candidate_chunks: int,
        outliers: int,
        local: int,
        segment: int,
        weighted: bool,
        chunk: int = 8,
    ):
        self.rank, self.budget_chunks, self.outliers = rank, budget_chunks, outliers
        self.candidate_chunks, self.weighted = candidate_chunks, weighted
        self.local, self.segment, self.chunk = local, segment, chunk
        self.raw: list[torch.Tensor] = []
        self.angles: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tokens: dict[tuple[int, int], list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        self.segments: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self.energy: dict[tuple[int, int], torch.Tensor] = {}
        self.real: torch.Tensor | None = None

    @contextlib.contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        module = next(m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling"))
        self.source = sys.modules[type(module).__module__]
        self.rope = self.source.apply_rotary_pos_emb

        def spy(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kw: Any) -> Any:
            self.raw.append(k)
            self.angles.append((cos, sin))
            return self.rope(q, k, cos, sin, **kw)

        AttentionInterface.register("dense_shadowkv", self.attend)
        AttentionMaskInterface.register("dense_shadowkv", flash_attention_mask)
        before = model.config._attn_implementation
        model.set_attn_implementation("dense_shadowkv")
        self.source.apply_rotary_pos_emb = spy
        try:
            yield
        finally:
            self.source.apply_rotary_pos_emb = self.rope
            model.set_attn_implementation(before)

    def rotate(self, raw: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = self.rope(raw[None, ..., : self.rotated], raw[None, ..., : self.rotated], cos[None], sin[None])[1][0]
        return torch.cat([turned, raw[..., self.rotated :]], -1)

    def attend(self, module, query, key, value, mask, scaling=None, sliding_window=None, s_aux=None, **kwargs):
        layer, num_new = module.layer_idx, query.shape[2]
        raw, angles = (self.raw.pop(), self.angles.pop()) if self.raw else (key, None)
        self.rotated = raw.shape[3]  # Phi calls RoPE with the rotated part of its keys only
        raw = torch.cat([raw, key[..., self.rotated :]], -1)
        softcap = kwargs.get("softcap")
        out = torch.zeros(*query.shape[:3], value.shape[3])
        for row in range(query.shape[0]):
            tokens = self.tokens[layer, row]
            for t in range(num_new):
                if self.real is not None and num_new > 1 and not self.real[row, t]:
                    continue
                cos, sin = (
                    (angles[0][min(row, len(angles[0]) - 1), t], angles[1][min(row, len(angles[1]) - 1), t])
                    if angles
                    else (None, None)
                )
                tokens.append((key[row, :, t], value[row, :, t], raw[row, :, t], cos, sin))
            n, real_new = (
                len(tokens),
                num_new if self.real is None or num_new == 1 else int(self.real[row].sum()),
            )
            exact = torch.stack([t[0] for t in tokens], 1)
            values = torch.stack([t[1] for t in tokens], 1)
            group = query.shape[1] // exact.shape[0]
            if num_new > 1 or sliding_window is not None:
                i = torch.arange(n - real_new, n)[:, None]
                j = torch.arange(n)[None]
                visible = (j <= i) & (j > i - (sliding_window or n + 1))
                visible = visible.expand(query.shape[1], -1, -1)
                keys = exact
            else:
                self.compress(layer, row, from_decode=True)
                keys, visible, candidates = self.sparse(layer, row, query[row, :, 0], exact, scaling, softcap, group)
                visible = visible.repeat_interleave(group, 0)[:, None]
            logits = query[row, :, num_new - real_new :] @ keys.repeat_interleave(group, 0).mT * scaling
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            p = self.softmax(logits, visible, s_aux)
            if num_new == 1 and sliding_window is None:
                best = p[:, 0].unflatten(0, (-1, group)).amax(1).masked_fill(~candidates, -1)
                best = best.topk(self.budget_chunks * self.chunk).indices
                dropped = candidates.scatter(1, best, False)
                p = self.softmax(logits, visible & ~dropped.repeat_interleave(group, 0)[:, None], s_aux)
            out[row, :, num_new - real_new :] = p @ values.repeat_interleave(group, 0)
            if num_new > 1 and sliding_window is None:
                queries = query[row, :, num_new - real_new :].double().unflatten(0, (-1, group))
                self.energy[layer, row] = queries.square().sum((1, 2))
                self.compress(layer, row, from_decode=False)
        return out.transpose(1, 2).contiguous(), None

    @staticmethod
    def softmax(logits, visible, s_aux):
        logits = logits.masked_fill(~visible, -torch.inf)
        if s_aux is None:
            return logits.softmax(-1)
        return torch.cat([logits, s_aux[:, None, None].expand(-1, logits.shape[1], 1)], -1).softmax(-1)[..., :-1]

    def weights(self, layer: int, row: int, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
        """Root mean square of the queries over each set of elements that the family's rotation mixes."""
        energy = self.energy[layer, row]
        if cos is not None:
            unit = torch.eye(energy.shape[1])[None]
            turned = self.rotate(unit, cos.expand(unit.shape[1], -1), sin.expand(unit.shape[1], -1))[0]
            mixed = ((turned.abs() > 1e-6) | unit[0].bool()).double()
            energy = energy @ mixed.T / mixed.sum(1)
        weights = energy.sqrt()
        return (weights / weights.mean()).flatten()

    def compress(self, layer: int, row: int, *, from_decode: bool) -> None:
        tokens, segments = self.tokens[layer, row], self.segments[layer, row]
        start = segments[-1]["stop"] if segments else 0
        old = (len(tokens) - start - self.local) // self.chunk * self.chunk
        if from_decode:
            old = self.segment if old >= self.segment else 0
        if old <= 0:
            return
        part = tokens[start : start + old]
        heads, dim = part[0][0].shape
        joint = torch.stack([t[2] for t in part]).flatten(1).double()
        rank, outliers = self.rank, self.outliers
        if segments:
            rank = round(rank * old / (old + heads * dim))
            outliers = round(outliers * old / segments[0]["stop"])
        mean = joint.mean(0)
        weights = self.weights(layer, row, *part[1][3:]) if self.weighted else torch.ones(heads * dim).double()
        u, s, v = torch.linalg.svd((joint - mean) * weights, full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ v[:rank] / weights + mean).float().view(old, heads, dim)
        if part[0][3] is not None:
            low = self.rotate(low.transpose(0, 1), torch.stack([t[3] for t in part]), torch.stack([t[4] for t in part]))
        else:
            low = low.transpose(0, 1)
        chunks = torch.stack([t[0] for t in part], 1).unflatten(1, (-1, self.chunk))
        landmark = chunks.mean(2)
        cosine = torch.nn.functional.cosine_similarity(chunks, landmark.unsqueeze(2), dim=-1).amin(-1)
        sinks = 0 if segments else 1
        kept = torch.zeros_like(cosine, dtype=torch.bool)
        kept[:, :sinks] = True
        cosine[:, :sinks] = 9
        kept.scatter_(1, cosine.topk(outliers, largest=False).indices, True)
        segments.append(dict(start=start, stop=start + old, low=low, landmark=landmark, kept=kept))

    def sparse(self, layer, row, query, exact, scaling, softcap, group):
        segments = self.segments[layer, row]
        tail = torch.ones(exact.shape[0], exact.shape[1] - segments[-1]["stop"], dtype=torch.bool)
        landmark = torch.cat([s["landmark"] for s in segments], 1)
        kept = torch.cat([s["kept"] for s in segments], 1)
        logits = torch.einsum("hgd,hcd->hgc", query.unflatten(0, (-1, group)), landmark) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        scores = logits.masked_fill(kept[:, None], -torch.inf).softmax(-1).amax(1)
        chosen = torch.zeros_like(kept).scatter_(1, scores.topk(self.candidate_chunks).indices, True)
        visible = torch.cat([(chosen | kept).repeat_interleave(self.chunk, 1), tail], 1)
        low = torch.cat([*(s["low"] for s in segments), exact[:, segments[-1]["stop"] :]], 1)
        use_exact = torch.cat([kept.repeat_interleave(self.chunk, 1), tail], 1)
        return torch.where(use_exact[..., None], exact, low), visible, visible & ~use_exact
