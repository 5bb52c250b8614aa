"""What an export tells about itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        format: `gguf`, `padded` or `merged`.
        dtype: of the numbers in the file.
        num_bytes: of the factors, or of the model.
        detail: what else is worth knowing, the rest of a sentence.
    """

    format: str
    output: str
    layers: int
    dtype: str
    num_bytes: int
    detail: str
