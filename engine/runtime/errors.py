"""What can go wrong with a request, in one line for the user."""


class RequestTooLong(ValueError):
    """Prompt and answer together exceed the engine's length or memory: it would never be admitted."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait; try again later."""


class EngineClosed(RuntimeError):
    """The engine was closed, or its loop failed, before the request was finished."""


class DocumentError(ValueError):
    """A document cannot be read, written or used with this engine."""
