"""What a request may say: OpenAI's parameters, vLLM's further ones, and `document`.

Three kinds of parameters: supported; labels, which change nothing; and `OnlyDefault`, for what this server does not
do. Any other name is refused, so that a misspelt parameter is not silently ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from longshadow.engine.runtime.messages import joined, template_role
from longshadow.engine.runtime.sampling_params import LARGEST_SEED, SamplingParams
from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.neutral import OnlyDefault

MOST_COMPLETIONS = 128
MOST_PROMPTS = 128
MOST_STOPS = 16
MOST_STOP_TOKENS = 1024
MOST_MESSAGES = 20_000
MOST_NAMES = 1000
MOST_TOKENS = 2**31 - 1
# Of SamplingParams, those that requests have under the same name and with the same meaning.
SAMPLING_NAMES = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def _encodable(text: str) -> str:
    # JSON can escape what UTF-8 cannot hold, and no tokenizer takes it.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no Unicode text") from error
    return text


def _few_names(value: Any) -> Any:
    # Each that is wrong would be a problem of its own.
    if isinstance(value, dict) and len(value) > MOST_NAMES:
        raise ValueError(f"an object must have at most {MOST_NAMES:,} names, got {len(value):,}")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Neutral = Annotated[Any, OnlyDefault()]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
StopText = Annotated[Text, Field(min_length=1)]
# Lists fail fast: a million elements may be wrong.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Label = Annotated[str | None, Field(description="A label; it changes nothing.")]


class Body(BaseModel):
    """Strict: nothing is converted, unknown names are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    few_names = model_validator(mode="before")(_few_names)


class StreamOptions(Body):
    """What a stream brings beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, OnlyDefault((False, True))] = None


class TextPart(Body):
    """One part of a message that comes in parts; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    name: Label = None
    refusal: Neutral = None
    audio: Neutral = None
    annotations: Annotated[Any, OnlyDefault(([],))] = None
    tool_calls: Annotated[Any, OnlyDefault(([],))] = None
    function_call: Neutral = None

    def as_turn(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else joined(part.text for part in self.content)
        return {"role": template_role(self.role), "content": content}


class Generation(Body):
    """What both kinds of requests share."""

    model: str
    document: Annotated[
        str | None, Field(description="Id of a document of /v1/documents, which the prompt continues.")
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    user: Label = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOP_TOKENS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None

    logit_bias: Annotated[Any, OnlyDefault(({},))] = None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream's last chunk tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell; None for no log probabilities."""
        raise NotImplementedError

    def sampling_params(self, max_tokens: int | None) -> SamplingParams:
        """The engine's parameters, with `max_tokens` where the request has none.

        Raises:
            ApiError: two parameters contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options", code="invalid_value")
        given = {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingParams(
            **given,
            stop=None if stop is None else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_logprobs(),
            max_tokens=max_tokens,
        )


class ChatCompletionBody(Generation):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    metadata: Annotated[
        dict[str, str] | None, Field(description="Labels; they change nothing."), BeforeValidator(_few_names)
    ] = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None

    response_format: Annotated[Any, OnlyDefault(({"type": "text"},))] = None
    modalities: Annotated[Any, OnlyDefault((["text"],))] = None
    tools: Annotated[Any, OnlyDefault(([],))] = None
    tool_choice: Annotated[Any, OnlyDefault(("none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, OnlyDefault((True, False))] = None
    functions: Annotated[Any, OnlyDefault(([],))] = None
    function_call: Annotated[Any, OnlyDefault(("none", "auto"))] = None
    store: Annotated[Any, OnlyDefault((False,))] = None
    service_tier: Annotated[Any, OnlyDefault(("auto", "default"))] = None
    audio: Neutral = None
    prediction: Neutral = None
    reasoning_effort: Neutral = None
    verbosity: Neutral = None
    web_search_options: Neutral = None

    def num_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` is set.

        Raises:
            ApiError: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
        return (self.top_logprobs or 0) if self.logprobs else None

    def chosen_max_tokens(self) -> int | None:
        """The newer name, or the older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Generation):
    """A request to /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    best_of: Annotated[Any, OnlyDefault((1,))] = None
    echo: Annotated[Any, OnlyDefault((False,))] = None
    suffix: Annotated[Any, OnlyDefault(("",))] = None

    def num_logprobs(self) -> int | None:
        """As given."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, as texts or token ids."""
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_]:
                return [list(map(int, self.prompt))]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


class DocumentBody(Body):
    """A request to POST /v1/documents."""

    text: Annotated[Text, Field(min_length=1, description="The whole text, read once and shared by its requests.")]
    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
