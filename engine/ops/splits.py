"""Into how many parts kernels cut the work of one sequence and head, so that few of these still fill a GPU.

The number depends on static shapes alone: a launch can be captured in a CUDA graph, and results do not depend on the
device. Programs then share what there really is, by lengths they read on the device.
"""

# Several programs for each of the 108 to 148 multiprocessors of the supported devices.
TARGET_PROGRAMS = 1024
# Chunks of a part at least, and parts at most, of the work over landmarks: at batch 1 and 122K tokens two programs for
# each multiprocessor, which find their segment once and then read 128 KB of bf16 landmarks.
MINIMUM_CHUNKS = 512
MAXIMUM_CHUNK_SPLITS = 128
# The same for tokens. Regions, whose length is known on the device only, add up to some 2,048 of them.
MINIMUM_TOKENS = 64
REGION_TOKENS = 2048
MAXIMUM_TOKEN_SPLITS = 64


def num_chunk_splits(num_pairs: int, max_chunks: int) -> int:
    """Parts of each of `num_pairs` (sequence, head) pairs with at most `max_chunks` chunks."""
    return _num_splits(num_pairs, max_chunks, MINIMUM_CHUNKS, MAXIMUM_CHUNK_SPLITS)


def num_token_splits(num_pairs: int, max_tokens: int) -> int:
    """Parts of each of `num_pairs` (sequence, head) pairs with at most `max_tokens` tokens beside the regions'."""
    return _num_splits(num_pairs, max(max_tokens, REGION_TOKENS), MINIMUM_TOKENS, MAXIMUM_TOKEN_SPLITS)


def _num_splits(num_pairs: int, num_items: int, minimum: int, maximum: int) -> int:
    return max(1, min(-(-TARGET_PROGRAMS // num_pairs), -(-num_items // minimum), maximum))
