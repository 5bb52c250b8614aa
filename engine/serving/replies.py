"""What answers hold, for the server's description of itself (`/openapi.json`)."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from longshadow.engine.serving.errors import ErrorBody

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were there already: a document's, or a cached prefix's."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens; those of a document count as the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the completions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Reply(BaseModel):
    """What both kinds of answers share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Reply):
    """An answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(Reply):
    """An answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "longshadow"
    max_model_len: int = Field(description="Tokens of prompt and answer together, at most.")


class ModelList(BaseModel):
    """The models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok"]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of a route's description: the statuses it may refuse with, all in one shape."""
    return {status: {"model": ErrorBody} for status in statuses}
