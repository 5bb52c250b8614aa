"""The sizes of a model, and how many weights and bytes follow from them."""

from dataclasses import dataclass

from longshadow.engine.planning.hardware import Format


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention.

    Attributes:
        intermediate_size: of the feed-forward network, or of one expert.
        max_positions: longest sequence it was made for, in tokens; None: no limit.
        rotary_dim: rotated elements of a head.
        num_ffn_matrices: 3 with a gate, 2 without.
        num_experts, num_active_experts: 1 without a mixture of experts.
        num_sliding_layers: of `num_layers`, those that keep `sliding_window` tokens.
        element_bytes: of activations, keys, values and unquantised weights.
        weight_bits: per weight of quantised layers, scales included; embeddings and head are never quantised.
        weight_format: what the layers' matrix products are computed in.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rotary_dim: int
    max_positions: int | None = None
    tied_embeddings: bool = False
    num_ffn_matrices: int = 3
    num_experts: int = 1
    num_active_experts: int = 1
    num_sliding_layers: int = 0
    sliding_window: int = 0
    element_bytes: int = 2
    weight_bits: float | None = None
    weight_format: Format = "bf16"

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "vocab_size", "num_experts", "num_active_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {name} must be a whole number from 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads")
        if not 0 <= self.num_sliding_layers < self.num_layers:
            raise ValueError(f"{self.name}: it has no full-attention layer, so there is nothing to compress")

    @property
    def key_width(self) -> int:
        """Elements of a token's keys in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """Elements of a token's queries in one layer."""
        return self.num_heads * self.head_dim

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.num_layers - self.num_sliding_layers

    @property
    def ffn_weights(self) -> int:
        """Weights of one feed-forward network, or of one expert."""
        return self.num_ffn_matrices * self.hidden_size * self.intermediate_size

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's query, key, value and output projections."""
        return 2 * self.hidden_size * (self.query_width + self.key_width)

    @property
    def router_weights(self) -> int:
        """Weights that choose a token's experts, in one layer."""
        return self.hidden_size * self.num_experts if self.num_experts > 1 else 0

    @property
    def embedding_weights(self) -> int:
        """Weights of the embeddings and the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer, but norms and biases."""
        return self.attention_weights + self.router_weights + self.num_experts * self.ffn_weights

    @property
    def num_parameters(self) -> int:
        """All weights, but norms and biases."""
        return self.embedding_weights + self.num_layers * self.layer_weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        layers = round(self.num_layers * self.layer_weights * self.bytes_per_weight)
        return self.embedding_weights * self.element_bytes + layers

    @property
    def bytes_per_weight(self) -> float:
        """Of a layer's weights."""
        return self.element_bytes if self.weight_bits is None else self.weight_bits / 8
