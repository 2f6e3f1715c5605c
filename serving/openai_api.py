"""Requests in OpenAI's form to sampling parameters, and outputs to OpenAI's answers.

OpenAI's API is what most programs that use a language model speak, so a server that speaks it too
needs no new client. It has two ways in: `completions`, where the model continues a text, and
`chat.completions`, where messages are first written as one text. vLLM adds fields to both
(`top_k`, `ignore_eos`, ..); they are read here too, under the same names.

    {"prompt": "The wolf",         ─>  [[464, 1987]], SamplingParams(max_tokens=9, seed=1)
     "max_tokens": 9, "seed": 1}       (ids)                │ engine
    {"choices": [{"index": 0, "text": " said", ..}], ..}  <─┘

A field that is not known is ignored, as OpenAI does. A field that would change the text, and that
this server cannot obey, is refused: an answer to another question is worse than none. All mistakes
of a client become an `ApiError`. This file knows nothing of HTTP connections and of threads.

The tests send what OpenAI's own client, lm-eval, guidellm and vLLM's benchmark send.
platform.openai.com/docs/api-reference; docs.vllm.ai, "OpenAI-Compatible Server".
"""

import codecs
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from beam_search import BeamSearchParams
from outputs import CompletionOutput, RequestOutput, Tokenizer
from sampling import Logprobs, SamplingParams

MAX_LOGPROBS = 20  # of the most likely tokens, as in vLLM
MAX_STRINGS = 64  # stop strings, and bad words, of one request: each is looked for at every token
MAX_STRING_CHARS = 1024
LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON does not have; as in vLLM

# What would change the answer and is not served, if it is neither null, false nor empty.
REFUSED = """suffix tools functions structured_outputs guided_json guided_regex guided_choice
guided_grammar logits_processors truncate_prompt_tokens prompt_embeds prompt_logprobs
echo chat_template continue_final_message documents audio""".split()


class ApiError(Exception):
    """A request that is refused, with OpenAI's fields and the status of the answer."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code or status}
        }


# ---- what clients send ---------------------------------------------------------------------------
# A list of a million wrong items would give a million error messages: the first one is enough.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    """How a stream reports the number of tokens."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None  # one more chunk at the end
    continuous_usage_stats: bool | None = None  # in each chunk


class SamplingFields(BaseModel):
    """What both kinds of requests have. A field that is null has the default of SamplingParams."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None  # in each choice, beside the text
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    # Its items, and all ranges, are checked by SamplingParams.
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    min_tokens: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None  # only prompts with the same one share blocks
    # A beam search in place of sampling, as in vLLM; its names are those of BeamSearchParams.
    use_beam_search: bool | None = None
    beam_width: int | None = None  # n texts are answered: by default all of them
    length_penalty: float | None = None
    early_stopping: bool | str | None = None

    def refuse_unknown_meanings(self) -> None:
        """Raise ApiError for a field that would change the answer and is not served."""
        unknown = self.model_extra or {}
        for name in REFUSED:
            if unknown.get(name):
                raise ApiError(f"{name} is not served here: leave it out", param=name)
        if self.stream and (self.best_of or 0) > (self.n or 1):
            raise ApiError("the best texts are known at the end: no stream", param="best_of")
        form = unknown.get("response_format")
        if form and form != {"type": "text"}:
            raise ApiError("response_format must be text: leave it out", param="response_format")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for stream=true", param="stream_options")
        for name in ("stop", "bad_words"):
            strings = getattr(self, name) or []
            strings = [strings] if isinstance(strings, str) else strings
            if len(strings) > MAX_STRINGS or any(len(s) > MAX_STRING_CHARS for s in strings):
                limits = f"{MAX_STRINGS} strings of {MAX_STRING_CHARS} characters at most"
                raise ApiError(f"{name} is too long: {limits}", param=name)

    def beam_search_params(self) -> BeamSearchParams:
        """The parameters of a search. Raises ApiError or ValueError for what is not served."""
        if self.stream:
            raise ApiError("a beam search has no text before its end: leave out stream")
        names = {field.name for field in fields(SamplingParams)} & set(type(self).model_fields)
        default = SamplingParams()
        for name in sorted(names - {"n", "max_tokens", "logprobs"}):
            value = getattr(self, name)
            if value and value != getattr(default, name):
                raise ApiError(f"{name} is for sampling: leave it out", param=name)
        names = {"beam_width", "length_penalty", "early_stopping"}
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        given = {"beam_width": self.n or 1, "num_return_sequences": self.n} | given
        return BeamSearchParams(max_tokens=self.most_tokens, **given)

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """The parameters; `changes` replace fields. Raises ValueError for a value out of range."""
        names = {field.name for field in fields(SamplingParams)} & set(type(self).model_fields)
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**(given | {"max_tokens": self.most_tokens} | changes))

    @property
    def most_tokens(self) -> int | None:
        """The limit of a text under its older or its newer name; None: what fits."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens


class CompletionRequest(SamplingFields):
    """POST /v1/completions: the model continues each prompt."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    echo: bool | None = None  # the answer begins with the prompt
    logprobs: int | None = None
    max_tokens: int | None = 16  # null: what fits behind the prompt

    def params(self) -> SamplingParams | BeamSearchParams:
        """Raises ApiError or ValueError for what is not served."""
        self.refuse_unknown_meanings()
        check_logprobs(self.logprobs, "logprobs")
        if self.use_beam_search:
            if self.echo or self.logprobs:
                raise ApiError("a beam search serves neither echo nor logprobs")
            return self.beam_search_params()
        scores = {"logprobs": self.logprobs}
        if self.echo:
            scores["prompt_logprobs"] = self.logprobs
        return self.sampling_params(**scores)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text or token ids. A list of numbers is one prompt."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        prompts: Any = [self.prompt] if is_one else self.prompt
        if not prompts:
            raise ApiError("prompt is an empty list: give at least one", param="prompt")
        return prompts


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    # A text, or parts of {"type": "text", "text": ..}.
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        """The text of all parts. Raises ApiError for a part that is no text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        parts = []
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError("a message has a part that is no text", param="messages")
            parts.append(part["text"])
        return "".join(parts)


SPEAKERS = {"user": "User", "assistant": "Assistant"}  # system messages stand alone


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions: a conversation, whose next message the model writes."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def params(self) -> SamplingParams | BeamSearchParams:
        """Raises ApiError or ValueError for what is not served."""
        self.refuse_unknown_meanings()
        if self.use_beam_search:
            raise ApiError("a beam search is for completions", param="use_beam_search")
        check_logprobs(self.top_logprobs, "top_logprobs")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs is for logprobs=true", param="top_logprobs")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return self.sampling_params(
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            # A base model goes on with the user's next message: the text ends before it.
            stop=[*stop, f"\n{SPEAKERS['user']}:"],
        )

    def prompts(self) -> list[str | list[int]]:
        """The conversation as one text, in a plain form that a base model can continue.

        Example: system "Be brief." and user "Hi" -> "Be brief.\\nUser: Hi\\nAssistant:"
        """
        lines = [
            f"{SPEAKERS[message.role]}: {message.text}"
            if message.role in SPEAKERS
            else message.text
            for message in self.messages
        ]
        return ["\n".join([*lines, f"{SPEAKERS['assistant']}:"])]


class TokenizeRequest(BaseModel):
    """POST /tokenize."""

    model_config = ConfigDict(strict=True)
    prompt: str


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True)
    tokens: TokenIds


def check_logprobs(count: int | None, name: str) -> None:
    """Raise ApiError for more log-probabilities a token than are served."""
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        found = f"{name} is {count if abs(count) < 10**9 else 'out of range'}"
        raise ApiError(f"{found}: it must be from 0 to {MAX_LOGPROBS}", param=name)


# ---- log-probabilities ---------------------------------------------------------------------------
def number(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


class Offsets:
    """Where each token begins in a text, in characters.

    A token may hold a part of a character only: three tokens of one cat emoji all begin at its
    offset.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._end = start

    def of(self, token_ids: Iterable[int]) -> Iterator[int]:
        """The offsets of the next tokens."""
        for token_id in token_ids:
            yield self._end
            self._end += len(self._utf8.decode(self.tokenizer.token_bytes(token_id)))


def completion_logprobs(
    token_ids: list[int], scores: list[Logprobs | None], offsets: Offsets
) -> dict:
    """Four lists with one entry a token; a prompt's first token has no score, and null there."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict | None] = []
    for token_id, entry in zip(token_ids, scores, strict=True):
        if entry is None:
            values.append(None)
            tops.append(None)
            tokens.append(offsets.tokenizer.token_text(token_id))
            continue
        top: dict[str, float] = {}
        for logprob in entry.values():  # best first
            # Several tokens may have the text U+FFFD: the best of them stands for all.
            top.setdefault(logprob.decoded_token or "", number(logprob.logprob))
        tokens.append(entry[token_id].decoded_token or "")
        values.append(number(entry[token_id].logprob))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": list(offsets.of(token_ids)),
    }


def chat_logprobs(
    token_ids: list[int], scores: list[Logprobs], tokenizer: Tokenizer, num_top: int
) -> dict:
    """The same for a chat: an entry a token, with the bytes of each token."""

    def entry(token_id: int, scores: Logprobs) -> dict:
        logprob = scores[token_id]
        return {
            "token": logprob.decoded_token or "",
            "logprob": number(logprob.logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            entry(token_id, of_token)
            | {"top_logprobs": [entry(other, of_token) for other in [*of_token][:num_top]]}
            for token_id, of_token in zip(token_ids, scores, strict=True)
        ]
    }


# ---- what clients get ----------------------------------------------------------------------------
def usage(num_prompt_tokens: int, num_written: int, outputs: Sequence[RequestOutput] = ()) -> dict:
    """The numbers of tokens of an answer.

    The whole outputs of its prompts, where they are known, say how many tokens of the prompts were
    found in the prefix cache.
    """
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_written,
        "total_tokens": num_prompt_tokens + num_written,
    }
    if outputs:
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


class Answer:
    """Writes the answer to one request: whole with `whole`, or chunk by chunk.

    `prompts` are its prompts as they came, texts or ids, `prompt_ids` are their token ids.
    """

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        model: str,
        tokenizer: Tokenizer | None,
        prompts: list[str | list[int]],
        prompt_ids: list[list[int]],
        n: int,
    ):
        self.request = request
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.n = n
        self.is_chat = isinstance(request, ChatRequest)
        self.echoes = isinstance(request, CompletionRequest) and bool(request.echo)
        name = "chatcmpl" if self.is_chat else "cmpl"
        self.head = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.num_written = 0  # tokens so far, of all choices
        self._offsets: dict[int, Offsets] = {}

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompt_ids))

    def echoed(self, prompt_number: int) -> str:
        """A prompt as text."""
        prompt = self.prompts[prompt_number]
        if isinstance(prompt, str):
            return prompt
        tokens = map(self.tokenizer.token_bytes, prompt) if self.tokenizer else ()
        return b"".join(tokens).decode(errors="replace")

    # ---- a whole answer ----
    def whole(self, outputs: list[RequestOutput]) -> dict:
        """The answer that holds all texts. Raises ApiError if one of them ended with an error."""
        choices = []
        for prompt_number, output in enumerate(outputs):
            for completion in output.outputs:
                if completion.finish_reason == "error":
                    raise ApiError(completion.error or "the text ended with an error", status=500)
                index = prompt_number * self.n + completion.index
                choices.append(
                    {
                        "index": index,
                        **self._content(prompt_number, output, completion),
                        "finish_reason": completion.finish_reason,
                        "stop_reason": completion.stop_reason,
                        **self._token_ids(completion.token_ids),
                    }
                )
        self.num_written = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        counts = usage(self.num_prompt_tokens, self.num_written, outputs)
        return self.head | {"choices": choices, "usage": counts}

    def _content(self, number: int, output: RequestOutput, completion: CompletionOutput) -> dict:
        """A choice's text and its log-probabilities."""
        ids, scores = completion.token_ids, completion.logprobs
        if self.is_chat:
            return {
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": self._logprobs(0, ids, scores),
            }
        text = completion.text
        if self.echoes:
            text = self.echoed(number) + text
            if scores is not None:
                ids = output.prompt_token_ids + ids
                scores = [*(output.prompt_logprobs or []), *scores]
        index = number * self.n + completion.index
        return {"text": text, "logprobs": self._logprobs(index, ids, scores)}

    def _logprobs(self, index: int, token_ids: list[int], scores: list | None) -> dict | None:
        """The log-probabilities of a choice's next tokens, None if they were not asked for."""
        # A beam search has scores whether they were asked for or not.
        if not scores or self.tokenizer is None or self.request.logprobs in (None, False):
            return None
        if self.is_chat:
            num_top = self.request.top_logprobs or 0
            return chat_logprobs(token_ids, scores, self.tokenizer, num_top)
        offsets = self._offsets.setdefault(index, Offsets(self.tokenizer))
        return completion_logprobs(token_ids, scores, offsets)

    def _token_ids(self, token_ids: list[int]) -> dict:
        """The new ids of a choice, where they were asked for."""
        return {"token_ids": token_ids} if self.request.return_token_ids else {}

    # ---- a stream ----
    def openings(self) -> Iterator[dict]:
        """The chunks before the first token: a chat's role, or the prompts that are echoed."""
        for index in range(len(self.prompts) * self.n):
            if self.is_chat:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
            elif self.echoes and self.request.logprobs is None:
                yield self._chunk(index, {"text": self.echoed(index // self.n)}, None)

    def chunk(self, piece: Any) -> dict:
        """The chunk of one step's piece of a text (see engine_thread.py)."""
        index = piece.prompt_number * self.n + piece.index
        self.num_written += len(piece.token_ids)
        text, ids = piece.text, piece.token_ids
        scores = piece.logprobs
        if self.echoes and piece.prompt_logprobs is not None:
            # With log-probabilities the prompt stands in one chunk with the first token.
            text = self.echoed(piece.prompt_number) + text
            ids = self.prompt_ids[piece.prompt_number] + ids
            scores = [*piece.prompt_logprobs, *(scores or [])]
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        content |= self._token_ids(piece.token_ids)
        return self._chunk(index, content, self._logprobs(index, ids, scores), piece.finish_reason)

    def _chunk(
        self, index: int, content: dict, logprobs: dict | None, reason: str | None = None
    ) -> dict:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = self.head | {"choices": [choice]}
        if self.is_chat:
            chunk["object"] = "chat.completion.chunk"
        options = self.request.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(self.num_prompt_tokens, self.num_written)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def closing(self, outputs: list[RequestOutput]) -> Iterator[dict]:
        """The chunk after the last token: the number of tokens, where it was asked for."""
        options = self.request.stream_options
        if options is not None and options.include_usage:
            counts = usage(self.num_prompt_tokens, self.num_written, outputs)
            chunk = self.head | {"choices": [], "usage": counts}
            if self.is_chat:
                chunk["object"] = "chat.completion.chunk"
            yield chunk
