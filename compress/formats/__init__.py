"""What a quantised layer's weight is, whatever its format."""

from longshadow.compress.formats.dense import weight_of
from longshadow.compress.formats.probe import probed_weight

__all__ = ["probed_weight", "weight_of"]
