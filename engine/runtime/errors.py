"""What can go wrong with a request, in one line for the user."""


class RequestTooLong(ValueError):
    """Prompt and answer together exceed the engine's length or memory: it would never be admitted."""


def context_exceeded(
    limit: int, *, prompt: int, answer: int, document: int = 0, at_least: bool = False
) -> RequestTooLong:
    """In the words of OpenAI's interface, by which clients know this error; `at_least`: the prompt may have more."""
    least = "at least " if at_least else ""
    before = f"{document} in the document, " if document else ""
    return RequestTooLong(
        f"This model's maximum context length is {limit} tokens. However, you requested {least}"
        f"{document + prompt + answer} tokens ({before}{prompt} in the prompt, {answer} in the completion). "
        "Please reduce the length of the prompt or completion (max_tokens)."
    )


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
