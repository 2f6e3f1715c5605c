"""From OpenAI's requests to sampling parameters, and from pieces and outputs to answers."""

import json
import math

import pytest
from pydantic import ValidationError

from beam_search import BeamSearchParams
from outputs import ByteTokenizer, CompletionOutput, RequestOutput
from sampling import Logprob, SamplingParams
from sequence import RequestMetrics
from serving.engine_thread import Piece
from serving.openai_api import Answer, ApiError, ChatRequest, CompletionRequest, Offsets

GPT = "tiny-gpt2"


def completion(**fields) -> CompletionRequest:
    return CompletionRequest(**({"prompt": "The wolf"} | fields))


def chat(*messages: tuple[str, object], **fields) -> ChatRequest:
    messages = messages or (("user", "Hi"),)
    return ChatRequest(messages=[{"role": r, "content": c} for r, c in messages], **fields)


# ---- requests ------------------------------------------------------------------------------------
# What a client sends -> the parameters that differ from the defaults.
TRANSLATED = [
    ({}, {}),
    ({"max_tokens": 5, "temperature": 0}, {"max_tokens": 5, "temperature": 0}),
    ({"max_tokens": None}, {"max_tokens": None}),
    ({"max_completion_tokens": 7}, {"max_tokens": 7}),
    # null means the default, as OpenAI's clients send it
    ({"temperature": None, "stop": None, "logprobs": None, "n": None}, {}),
    ({"n": 3, "seed": 7, "top_p": 0.9}, {"n": 3, "seed": 7, "top_p": 0.9}),
    ({"stop": "\n"}, {"stop": "\n"}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"logit_bias": {"50": -100, "7": 1.5}}, {"logit_bias": {50: -100, 7: 1.5}}),
    ({"presence_penalty": 1, "frequency_penalty": -1.5},) * 2,
    ({"repetition_penalty": 1.0, "min_p": 0.1, "top_k": 5, "ignore_eos": True},) * 2,
    ({"min_tokens": 2, "stop_token_ids": [3], "bad_words": ["x"]},) * 2,
    ({"logprobs": 2}, {"logprobs": 2}),
    ({"logprobs": 1, "echo": True}, {"logprobs": 1, "prompt_logprobs": 1}),
    # fields that change nothing here
    ({"user": "me", "suffix": None, "use_beam_search": False, "store": 1}, {}),
    ({"stream": True, "stream_options": {"include_usage": True, "new": 1}}, {}),
    ({"response_format": {"type": "text"}, "n": 2}, {"n": 2}),
    ({"n": 2, "best_of": 5}, {"n": 2, "best_of": 5}),
]


@pytest.mark.parametrize("fields, params", TRANSLATED, ids=str)
def test_a_request_becomes_these_parameters(fields, params):
    assert completion(**fields).params() == SamplingParams(**params)


REFUSED = [
    ({"suffix": "!"}, "suffix is not served"),
    ({"best_of": 2, "stream": True}, "the best texts are known at the end"),
    ({"best_of": 1, "n": 2}, "best_of is 1"),
    ({"guided_json": {"type": "object"}}, "guided_json is not served"),
    ({"tools": [{}]}, "tools is not served"),
    ({"prompt_logprobs": 1}, "prompt_logprobs is not served"),
    ({"response_format": {"type": "json_object"}}, "response_format must be text"),
    ({"stream_options": {}}, "stream_options is for stream=true"),
    ({"logprobs": 21}, "logprobs is 21: it must be from 0 to 20"),
    ({"logprobs": -1}, "logprobs is -1: it must be from 0 to 20"),
    ({"logprobs": 10**30}, "logprobs is out of range"),
    ({"stop": ["x"] * 65}, "stop is too long"),
    ({"bad_words": ["x" * 2000]}, "bad_words is too long"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0"),
    ({"n": 0}, "n is 0"),
    ({"n": 2, "temperature": 0}, "n is 2"),
    ({"seed": 2**70}, "seed is"),
    ({"logit_bias": {"wolf": 1}}, "logit_bias is"),
    ({"logit_bias": {"1": "1"}}, "logit_bias is"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda x: str(x)[:40])
def test_what_would_change_the_answer_or_is_out_of_range_is_refused(fields, message):
    request = completion(**fields)
    with pytest.raises((ApiError, ValueError), match=message):
        request.prompts()
        request.params()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "2"},
        {"n": 1.5},
        {"max_tokens": True},
        {"temperature": "hot"},
        {"prompt": None},
        {"prompt": [1, "a"]},
        {"prompt": [[1], "a"]},
        {"prompt": {"text": "x"}},
        {"stop": [1]},
        {"stream": "yes"},
        {"echo": 1},
        {"stream_options": []},
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_and_never_guessed(fields):
    with pytest.raises(ValidationError):
        completion(**fields)


def test_a_million_wrong_items_give_one_error_for_each_form_of_a_prompt():
    with pytest.raises(ValidationError) as caught:
        completion(prompt=[None] * 1_000_000)
    assert len(caught.value.errors()) < 10


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("The wolf", ["The wolf"]),
        (["The wolf", "A fox"], ["The wolf", "A fox"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
    ids=str,
)
def test_a_prompt_has_four_forms(prompt, prompts):
    assert completion(prompt=prompt).prompts() == prompts


def test_a_conversation_becomes_a_text_that_a_base_model_continues():
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "you?"}]
    request = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", parts))
    expected = "Be brief.\nUser: Hi\nAssistant: Ho\nUser: And you?\nAssistant:"
    assert request.prompts() == [expected]
    params = request.params()
    assert params.max_tokens is None and params.stop == ("\nUser:",)
    assert chat(stop="x", max_tokens=3).params().stop == ("x", "\nUser:")


def test_a_chat_refuses_pictures_unknown_roles_and_counts_without_logprobs():
    with pytest.raises(ApiError, match="no text"):
        chat(("user", [{"type": "image_url", "image_url": {}}])).prompts()
    with pytest.raises(ApiError, match="top_logprobs is for logprobs=true"):
        chat(top_logprobs=2).params()
    with pytest.raises(ApiError, match="echo is not served"):
        chat(echo=True).params()
    with pytest.raises(ValidationError):
        chat(("robot", "Hi"))
    assert chat(logprobs=True, top_logprobs=2).params().logprobs == 2
    assert chat(logprobs=True).params().logprobs == 0


def test_a_beam_search_has_parameters_of_its_own():
    search = completion(use_beam_search=True, n=2, max_tokens=9, temperature=1.0, top_p=1.0)
    expected = BeamSearchParams(2, max_tokens=9, num_return_sequences=2)
    assert search.params() == expected
    wider = completion(use_beam_search=True, n=2, beam_width=4, length_penalty=0.5)
    assert wider.params() == BeamSearchParams(4, length_penalty=0.5, num_return_sequences=2)
    for fields, message in (
        ({"stop": "x"}, "stop is for sampling"),
        ({"temperature": 0.5}, "temperature is for sampling"),
        ({"stream": True}, "no text before its end"),
        ({"echo": True}, "neither echo nor logprobs"),
        ({"beam_width": 0}, "beam_width is 0"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ):
        with pytest.raises((ApiError, ValueError), match=message):
            completion(use_beam_search=True, **fields).params()


# ---- answers -------------------------------------------------------------------------------------
TOKENIZER = ByteTokenizer()
CAT = "🐈"
WRITTEN = f" a {CAT} é"
IDS = TOKENIZER.encode(WRITTEN)


def score(token_id: int, others: dict[int, float] | None = None) -> dict[int, Logprob]:
    """The log-probability -1 of a token, and those of others, best first."""
    values = {token_id: -1.0} | (others or {})
    ordered = sorted(values, key=values.get, reverse=True)
    return {
        i: Logprob(values[i], rank, TOKENIZER.token_text(i)) for rank, i in enumerate(ordered, 1)
    }


def pieces_of(texts: list[str], prompt_scores=None, scores=None) -> list[Piece]:
    """A piece for each token of WRITTEN, with the text that is complete with it."""
    count = len(IDS)
    return [
        Piece(
            prompt_number=0,
            index=0,
            text=text,
            token_ids=[token_id],
            logprobs=scores and [scores[i]],
            prompt_logprobs=prompt_scores if i == 0 else None,
            finish_reason="length" if i == count - 1 else None,
            error=None,
        )
        for i, (token_id, text) in enumerate(zip(IDS, texts, strict=True))
    ]


TEXTS = [" ", "a", " ", "", "", "", CAT, " ", "", "é"]  # the cat has four bytes, é two


def output_of(prompt: str, prompt_scores=None, scores=None) -> RequestOutput:
    whole = CompletionOutput(0, WRITTEN, IDS, scores, finish_reason="length")
    ids = TOKENIZER.encode(prompt)
    metrics = RequestMetrics()
    return RequestOutput("0", None, ids, [whole], prompt_scores, metrics, True, num_cached_tokens=2)


USAGE = {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
USAGE["prompt_tokens_details"] = {"cached_tokens": 2}


def answer_to(request, prompt: str = "The", n: int = 1) -> Answer:
    return Answer(request, GPT, TOKENIZER, [prompt], [TOKENIZER.encode(prompt)], n)


def test_a_whole_answer_has_every_field_that_openai_names():
    answer = answer_to(completion()).whole([output_of("The")])
    assert answer.pop("id").startswith("cmpl-") and answer.pop("created") > 1.7e9
    choice = {"index": 0, "text": WRITTEN, "logprobs": None}
    assert answer == {
        "object": "text_completion",
        "model": GPT,
        "choices": [choice | {"finish_reason": "length", "stop_reason": None}],
        "usage": USAGE,
    }
    message = answer_to(chat()).whole([output_of("The")])["choices"][0]["message"]
    assert message == {"role": "assistant", "content": WRITTEN}


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("with_scores", [False, True])
def test_chunks_joined_are_the_whole_answer(echo, with_scores):
    """One chunk a token, none of them with half a cat; the log-probabilities joined too."""
    scores = [score(i, {65: -0.5}) for i in IDS] if with_scores else None
    prompt_scores = [None, score(104), score(101)] if with_scores and echo else None
    request = completion(echo=echo, logprobs=1 if with_scores else None, stream=True)
    whole = answer_to(request).whole([output_of("The", prompt_scores, scores)])["choices"][0]
    answer = answer_to(request)
    chunks = [c["choices"][0] for c in answer.openings()]
    assert len(chunks) == (echo and not with_scores)
    chunks += [answer.chunk(p)["choices"][0] for p in pieces_of(TEXTS, prompt_scores, scores)]
    assert "".join(c["text"] for c in chunks) == whole["text"] == "The" * echo + WRITTEN
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    for field in whole["logprobs"] or ():
        joined = sum((c["logprobs"][field] for c in chunks), [])
        assert joined == whole["logprobs"][field] and len(joined) == 3 * echo + 10


def test_offsets_count_characters_and_a_part_of_one_begins_where_it_does():
    # The space, a, the space, four bytes of the cat, the space, two bytes of é.
    assert list(Offsets(TOKENIZER).of(IDS)) == [0, 1, 2, 3, 3, 3, 3, 4, 5, 5]


def test_the_best_of_several_tokens_with_one_text_stands_for_them():
    """Bytes 0x9F and 0x90 both read U+FFFD. A client asks: is the token's score the best one?"""
    scores = [score(0x90, {0x9F: -3.0})]
    answer = answer_to(completion(logprobs=2))
    found = answer._logprobs(0, [0x90], scores)
    assert found["top_logprobs"] == [{"\ufffd": -1.0}] and found["token_logprobs"] == [-1.0]


def test_minus_infinity_becomes_a_number_that_json_has():
    entry = {65: Logprob(-math.inf, 1, "A")}
    found = answer_to(completion(logprobs=1))._logprobs(0, [65], [entry])
    assert json.loads(json.dumps(found, allow_nan=False))["token_logprobs"] == [-9999.0]


def test_a_chats_log_probabilities_have_bytes_and_so_many_others_as_were_asked():
    scores = [score(65, {66: -0.5, 67: -2.0})]
    request = chat(logprobs=True, top_logprobs=2)
    (entry,) = answer_to(request)._logprobs(0, [65], scores)["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("A", -1.0, [65])
    assert [top["token"] for top in entry["top_logprobs"]] == ["B", "A"]


def test_a_stream_reports_usage_as_it_is_told():
    def usages(**options):
        answer = answer_to(completion(stream=True, stream_options=options or None))
        chunks = [answer.chunk(piece) for piece in pieces_of(TEXTS)]
        chunks += answer.closing([output_of("The")])
        return [chunk.get("usage", "none") for chunk in chunks], chunks[-1]["choices"]

    assert usages()[0] == ["none"] * 10
    assert usages(include_usage=True) == ([None] * 10 + [USAGE], [])
    counts, choices = usages(include_usage=True, continuous_usage_stats=True)
    assert [u["completion_tokens"] for u in counts] == [*range(1, 11), 10] and choices == []


def test_a_chats_stream_begins_with_the_role_of_each_choice():
    openings = list(answer_to(chat(stream=True), n=2).openings())
    deltas = [chunk["choices"][0]["delta"] for chunk in openings]
    assert deltas == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in openings] == [0, 1]
    assert {chunk["object"] for chunk in openings} == {"chat.completion.chunk"}


def test_text_i_of_prompt_p_is_choice_p_times_n_plus_i():
    answer = Answer(completion(n=2), GPT, TOKENIZER, ["a", "b"], [[97], [98]], n=2)
    piece = pieces_of(TEXTS)[0]._replace(prompt_number=1, index=1)
    assert answer.chunk(piece)["choices"][0]["index"] == 3


def test_a_text_that_ended_with_an_error_is_no_answer():
    output = output_of("The")
    output.outputs[0].finish_reason, output.outputs[0].error = "error", "the logits are NaN"
    with pytest.raises(ApiError, match="the logits are NaN") as caught:
        answer_to(completion()).whole([output])
    assert caught.value.status == 500 and caught.value.body["error"]["type"] == "server_error"
