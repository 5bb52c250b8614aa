"""What a quantised layer's weight is, whatever its format."""

from longshadow.compress.formats.probe import probed_weight
from longshadow.compress.formats.registry import format_of, weight_of

__all__ = ["format_of", "probed_weight", "weight_of"]
