"""What makes an adapter more than B A x added to the outputs of linear layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Initialisations that leave the base model's weights as they are; the others change them when the adapter is loaded.
HARMLESS_INITIALISATIONS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}

MEANINGS = {
    "use_dora": "it rescales whole weights (DoRA)",
    "lora_bias": "its factors have biases",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "it pools its inputs (QA-LoRA)",
    "alora_invocation_tokens": "it begins at certain tokens (aLoRA)",
    "trainable_token_indices": "it replaces embeddings of tokens",
    "target_parameters": "it adapts parameters outside linear layers",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters (Arrow)",
    "kasa_config": "it changes the base's weights (KaSA)",
    "monteclora_config": "it samples its weights (MonteCLoRA)",
    "fan_in_fan_out": "its base keeps weights transposed (fan_in_fan_out)",
    "bias": "it replaces biases",
    "init_lora_weights": "it changes the base's weights when it is loaded (init_lora_weights)",
    "embeddings": "it adapts an embedding",
    "base_layer": "it brings a whole weight of its base along (base_layer)",
}


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """One of them.

    Attributes:
        field: of PEFT's configuration, or `embeddings`.
        meaning: the rest of a sentence about the adapter.
    """

    field: str
    meaning: str


def oddities_of(config: Mapping[str, Any], other_keys: Iterable[str]) -> tuple[Oddity, ...]:
    """All that a configuration and the keys of tensors other than plain factors tell, each once."""
    fields = [field for field in MEANINGS if field not in ("bias", "init_lora_weights") and config.get(field)]
    if config.get("bias", "none") != "none":
        fields.append("bias")
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation not in HARMLESS_INITIALISATIONS:
        fields.append("init_lora_weights")
    fields += [_field_of(key) for key in other_keys]
    return tuple(Oddity(field=field, meaning=MEANINGS[field]) for field in dict.fromkeys(fields))


def _field_of(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "use_dora"
    if "lora_embedding_" in key:
        return "embeddings"
    if key.endswith(".base_layer.weight"):  # PEFT's copy of a head or an embedding that it adapts
        return "base_layer"
    if key.endswith(".bias"):
        return "lora_bias" if ".lora_" in key else "bias"
    return "modules_to_save"
