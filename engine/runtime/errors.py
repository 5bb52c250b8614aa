"""What can go wrong with a request, in one line for the user."""


class RequestTooLong(ValueError):
    """Prompt and answer together exceed the engine's length or memory: it would never be admitted."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait; try again later."""


class RequestFailed(RuntimeError):
    """The engine failed on this request alone, and goes on; its log has the traceback."""


class EngineClosed(RuntimeError):
    """The engine was closed before the request was finished."""


class EngineDead(EngineClosed):
    """The engine failed and cannot go on: every open request fails, and its log has the traceback."""


class DocumentError(ValueError):
    """A document cannot be read, written or used with this engine."""
