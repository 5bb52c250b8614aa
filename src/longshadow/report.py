"""What a run is told about: a table to read, an object for programs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from longshadow.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Report:
    """One answer, and the same with full attention when it was compared.

    Args:
        dtype: of the model, and of the full cache that sizes are compared with.
    """

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    shadowkv: "Generation"
    full_attention: "Generation | None" = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended a generation early."""
        return self.shadowkv.interrupted or bool(self.full_attention and self.full_attention.interrupted)

    @property
    def equal_tokens(self) -> float | None:
        """Share of positions with the same token in both answers, of the longer one's positions."""
        if self.full_attention is None:
            return None
        ours, theirs = self.shadowkv.tokens, self.full_attention.tokens
        longest = max(len(ours), len(theirs))
        return sum(a == b for a, b in zip(ours, theirs, strict=False)) / longest if longest else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"equal_tokens": self.equal_tokens, "interrupted": self.interrupted}

    def to_table(self) -> "Table":
        """One column per generation, 80 characters wide at most."""
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.device}, {self.dtype}", title_justify="left")
        table.add_column("")
        table.add_column("ShadowKV", justify="right")
        generations = [self.shadowkv]
        if self.full_attention is not None:
            table.add_column("full attention", justify="right")
            generations.append(self.full_attention)
        for label, cell in self._rows():
            table.add_row(label, *[cell(generation) for generation in generations])
        if self.equal_tokens is not None:
            table.add_row("equal tokens", f"{self.equal_tokens:.0%}", "")
        return table

    def _rows(self) -> list[tuple[str, "Callable[[Generation], str]"]]:
        return [
            ("prompt tokens", lambda g: f"{self.prompt_tokens:,}"),
            ("new tokens", lambda g: f"{len(g.tokens):,}" + (" (interrupted)" if g.interrupted else "")),
            ("time to first token", lambda g: _format(g.first_token_seconds, "{:.1f} s")),
            ("decode speed", lambda g: _format(g.tokens_per_second, "{:.1f} tokens/s")),
            ("attended per step", lambda g: f"{g.attended_fraction:.1%}"),
            ("a full cache takes", lambda g: format_bytes(g.full_cache_bytes)),
            ("cache on the device", lambda g: _beside_full_cache(g.device_bytes, g)),
            ("cache on the host", lambda g: _beside_full_cache(g.host_bytes, g)),
            ("both at their peak", lambda g: _beside_full_cache(g.peak_bytes, g)),
        ]


def format_bytes(num_bytes: int) -> str:
    """Bytes in the largest decimal unit that leaves at least one before the point."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if num_bytes >= 10**exponent:
            return f"{num_bytes / 10**exponent:.1f} {unit}"
    return f"{num_bytes} bytes"


def _beside_full_cache(num_bytes: int, generation: "Generation") -> str:
    if num_bytes == 0:
        return "0"
    return f"{format_bytes(num_bytes)} ({num_bytes / generation.full_cache_bytes:.0%} of full)"


def _format(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)
