"""What a step of the engine needs on the device beside weights and sequences."""

from transformers import PreTrainedModel

from longshadow.engine.runtime.batch_room import batch_size
from longshadow.engine.shadowkv.exact import LOGITS_BLOCK
from longshadow.engine.shadowkv.sequence import HISTORY_BLOCK_TOKENS

# Tensors of the size of a token's hidden states, and of its feed-forward layer's, that are alive at once.
HIDDEN_TENSORS = 12
INNER_TENSORS = 4
LOGITS_TENSORS = 6
FP32_BYTES = 4
# Of steps with and without candidates; each has logits of its own.
GRAPHS = 2
# cuBLAS takes up to this for each of the two streams: the one of launches, and the one graphs are captured on.
CUBLAS_BYTES = 2 * 32 * 2**20


def step_workspace(
    model: PreTrainedModel,
    num_prompt_tokens: int,
    num_sequences: int,
    max_model_len: int,
    *,
    captures: bool = False,
) -> int:
    """An upper bound in bytes: activations of a step's tokens, a tile of attention, logits and their processing.

    With `captures` graphs decode, in memory of their own.
    """
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(
        inner, (getattr(config, "moe_intermediate_size", 0) or 0) * (getattr(config, "num_experts_per_tok", 1) or 1)
    )
    num_places = batch_size(num_sequences)
    num_tokens = num_prompt_tokens + num_places if captures else max(num_prompt_tokens, num_places)
    itemsize = max(FP32_BYTES, model.dtype.itemsize)
    activations = num_tokens * (HIDDEN_TENSORS * config.hidden_size + INNER_TENSORS * inner) * itemsize
    block = min(HISTORY_BLOCK_TOKENS, max_model_len)
    tile = min(LOGITS_BLOCK, config.num_attention_heads * num_prompt_tokens * block)
    history = block * config.hidden_size
    logits = (LOGITS_TENSORS + (GRAPHS if captures else 0)) * num_places * config.vocab_size
    libraries = CUBLAS_BYTES if model.device.type == "cuda" else 0
    return int(activations + (3 * tile + 4 * history + logits) * itemsize) + libraries
