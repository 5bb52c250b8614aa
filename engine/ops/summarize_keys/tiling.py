"""Into how many parts `summarize_keys` cuts the tokens; the workspace holds a partial sum of each."""

# Elements of a block of one head's keys: what 256 threads hold in registers, before and after un-rotation.
BLOCK_ELEMENTS = 8192
# Tokens of a split of the Gram matrix at least, and splits at most: with 36 tiles at Llama-3.1-8B's 8 x 128 enough
# programs for every GPU, and a workspace of 64 MiB.
SPLIT_TOKENS = 2048
MAXIMUM_SPLITS = 16


def padded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def block_chunks(head_dim: int, chunk_size: int) -> int:
    """Chunks of a block, a power of two."""
    return max(1, BLOCK_ELEMENTS // (padded(head_dim) * padded(chunk_size)))


def num_blocks(num_tokens: int, head_dim: int, chunk_size: int) -> int:
    """Blocks of one head's chunks."""
    return -(-num_tokens // (chunk_size * block_chunks(head_dim, chunk_size)))


def num_splits(num_tokens: int) -> int:
    """Parts of the tokens whose Gram matrices are summed at the end."""
    return max(1, min(-(-num_tokens // SPLIT_TOKENS), MAXIMUM_SPLITS))
