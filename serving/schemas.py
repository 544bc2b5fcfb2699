"""What clients may send. Every field that is accepted has an effect; any other is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

MOST_CHOICES = 8
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_INTERVENTIONS = 16
LONGEST_STOP = 256


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("the character U+0000 is no text")
    return text


_WITHOUT_NUL = Field(json_schema_extra={"pattern": r"^[^\u0000]*$"})
Text = Annotated[str, AfterValidator(_without_nul), _WITHOUT_NUL]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_without_nul), _WITHOUT_NUL]
TokenId = Annotated[int, Field(ge=0)]
SessionId = Annotated[str, Field(pattern=r"^sess-[0-9a-f]{32}$")]


class Body(BaseModel):
    """A request's body: nothing is converted, nothing unknown is accepted, no number is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None


class TraceBody(Body):
    """What to record of the model's inside.

    Attributes:
        level: "routes" (which experts), "gates" (and gates and memory), "full" (and router logits).
        layers: which; all where it is absent.
        every: stride in tokens.
        inline: each chunk of a stream carries its token's experts as "route": by layer [[expert, weight], ...]. Needs
            a stream.
    """

    level: Literal["routes", "gates", "full"] = "routes"
    layers: Annotated[list[TokenId], Field(min_length=1, max_length=1024)] | None = None
    every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    inline: bool = False


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: Text | None = None
    session_id: SessionId | None = None
    trace: TraceBody | None = None
    interventions: Annotated[list[dict[str, JsonValue]], Field(max_length=MOST_INTERVENTIONS)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)
        ]
    )  # fmt: skip
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """What was said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class ForkBody(Body):
    """POST /api/sessions/{id}/fork.

    Attributes:
        memory_only: the new session starts with what the fast-weight memory learned, and nothing else.
    """

    memory_only: bool = False
