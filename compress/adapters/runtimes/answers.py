"""The answer of one runtime's rules."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The verdict on a runtime: it serves an adapter, it does not, or nobody knows.

    Attributes:
        serves: None where its code, as far as it was read, does not tell.
        line: what to run, or why it cannot, or what is not known.
    """

    serves: bool | None
    line: str

    def unsure(self, reason: str) -> "Answer":
        """The same without a yes."""
        return replace(self, serves=None, line=f"{reason}: {self.line}") if self.serves else self


def yes(line: str) -> Answer:
    return Answer(serves=True, line=line)


def no(reason: str) -> Answer:
    return Answer(serves=False, line=reason)


def not_known(reason: str) -> Answer:
    return Answer(serves=None, line=reason)
