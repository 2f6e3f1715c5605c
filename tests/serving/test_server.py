"""A running server and OpenAI's own client: what it sends, and what it gets.

The server runs the shipped model in float64, so that a text is the same in any batch.
"""

import asyncio
import threading

import httpx2
import openai
import pytest
from servers import events, running, wait_for

from beam_search import BeamSearchParams
from llm import LLM, SamplingParams

NAME = "tiny-gpt2"


@pytest.fixture(scope="module")
def server(shipped_model_folder):
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=256)
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(shipped_model_folder):
    """The engine without a server."""
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=64)

    def write(prompt, **params):
        (output,) = llm.generate(prompt, SamplingParams(**params))
        return [completion.text for completion in output.outputs]

    return write


# ---- OpenAI's client -----------------------------------------------------------------------------
def test_a_completion_is_what_the_engine_writes(client, alone):
    answer = client.completions.create(model=NAME, prompt="The wolf", max_tokens=9, seed=1, n=2)
    texts = alone("The wolf", max_tokens=9, seed=1, n=2)
    assert [choice.text for choice in answer.choices] == texts and texts[0] != texts[1]
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 18)


def test_several_prompts_are_answered_in_their_order(client, alone, server):
    prompts = ["The wolf", "A fox", "Once"]
    ids = [server.llm.tokenizer.encode(prompt) for prompt in prompts]
    texts = [alone(prompt, max_tokens=5, seed=2)[0] for prompt in prompts]
    for form in (prompts, ids):
        answer = client.completions.create(model=NAME, prompt=form, max_tokens=5, seed=2)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [0, 1, 2]


CAT = "🐈🐉"
# Only tokens of these two are drawn: some make whole characters, some never will.
STREAMED = [
    {"prompt": "The wolf", "seed": 1, "max_tokens": 12},
    {"prompt": ["The wolf", "A fox"], "seed": 3, "max_tokens": 9, "n": 2},
    {"prompt": "The wolf", "temperature": 0, "max_tokens": 40, "stop": ["and", "the"]},
    {"prompt": CAT, "seed": 0, "max_tokens": 40, "echo": True, "emojis": True},
    {"prompt": CAT, "seed": 0, "max_tokens": 40, "echo": True, "logprobs": 2, "emojis": True},
]


@pytest.mark.parametrize("body", STREAMED, ids=lambda body: ",".join(body))
def test_a_stream_joined_is_the_whole_answer_byte_for_byte(client, server, body):
    body = dict(body)
    if body.pop("emojis", None):
        body["extra_body"] = {"allowed_token_ids": server.llm.tokenizer.encode(CAT)}
    whole = client.completions.create(model=NAME, **body)
    texts = [""] * len(whole.choices)
    reasons = [None] * len(texts)
    num_chunks = 0
    for chunk in client.completions.create(model=NAME, stream=True, **body):
        (choice,) = chunk.choices
        assert reasons[choice.index] is None, "nothing follows the end of a text"
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        num_chunks += 1
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    opening = body.get("echo", False) and "logprobs" not in body
    assert num_chunks == whole.usage.completion_tokens + opening, "one token a chunk"
    if "extra_body" in body:
        num_emojis = sum(ord(char) > 0xFFFF for char in texts[0])
        assert texts[0].startswith(CAT) and num_emojis > 4 and "\ufffd" in texts[0]


def test_a_chat_streams_what_it_answers(client, alone):
    system = {"role": "system", "content": "A long tale of a fox."}
    messages = [system, {"role": "user", "content": "Hi"}]
    body = {"model": NAME, "messages": messages, "max_tokens": 9, "seed": 1}
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **body
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    prompt = "A long tale of a fox.\nUser: Hi\nAssistant:"
    (expected,) = alone(prompt, max_tokens=9, seed=1, stop="\nUser:")
    assert text == whole.choices[0].message.content == expected
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    # The whole answer's run has left the prompt's full blocks of 16 in the prefix cache.
    cached = last.usage.prompt_tokens_details.cached_tokens
    assert cached == (whole.usage.prompt_tokens - 1) // 16 * 16 > 0


def test_the_chat_helper_collects_a_whole_answer(client):
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": NAME, "messages": messages, "seed": 1, "stop": " the"}
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop" and final.choices[0].message.content


def test_the_asynchronous_client_is_served_too(server, alone):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = client.completions.create
            tasks = [
                create(model=NAME, prompt="The wolf", max_tokens=9, seed=seed) for seed in range(8)
            ]
            stream = await create(model=NAME, prompt="A", max_tokens=5, seed=1, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            return [a.choices[0].text for a in await asyncio.gather(*tasks)], text

    texts, streamed = asyncio.run(ask())
    assert texts == [alone("The wolf", max_tokens=9, seed=seed)[0] for seed in range(8)]
    assert [streamed] == alone("A", max_tokens=5, seed=1)


def test_the_client_gets_openais_exceptions(client, server):
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model=NAME, prompt="x", max_tokens=1000, timeout=0.05)
    server.wait_until_free()


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.root.split("/")[-1], model.max_model_len) == (NAME, NAME, 1024)
    assert client.models.retrieve(NAME) == model


def test_the_likeliest_of_several_texts_are_answered(client, shipped_model_folder):
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=64)
    params = SamplingParams(n=2, best_of=6, max_tokens=5, seed=1)
    (output,) = llm.generate("The wolf", params)
    body = {"prompt": "The wolf", "n": 2, "best_of": 6, "max_tokens": 5, "seed": 1}
    answer = client.completions.create(model=NAME, **body)
    assert [choice.text for choice in answer.choices] == [c.text for c in output.outputs]
    assert [choice.logprobs for choice in answer.choices] == [None, None]


def test_a_beam_search_answers_the_best_texts_best_first(client, shipped_model_folder):
    """vLLM's extension: in one batch with everything else."""
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=64)
    prompts = ["The wolf", "A fox"]
    found = llm.beam_search(prompts, BeamSearchParams(4, max_tokens=8, num_return_sequences=3))
    extra = {"use_beam_search": True, "beam_width": 4}
    answer = client.completions.create(
        model=NAME, prompt=prompts, n=3, max_tokens=8, temperature=0, extra_body=extra
    )
    assert [choice.index for choice in answer.choices] == [*range(6)]
    texts = [completion.text for output in found for completion in output.outputs]
    assert [choice.text for choice in answer.choices] == texts and len(set(texts)) == 6
    for fields in ({"stream": True}, {"top_p": 0.5}, {"n": 5}, {"logprobs": 1}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=NAME, prompt="x", extra_body=extra, **fields)


def test_prompts_with_another_cache_salt_share_no_blocks(server):
    """Otherwise the time to the first token would tell what others have asked."""
    hits = server.llm.engine.scheduler
    body = {"prompt": [9] * 100, "max_tokens": 1}

    def num_hits(salt: str) -> int:
        before = hits.num_blocks_hit
        server.complete(cache_salt=salt, **body)
        return hits.num_blocks_hit - before

    assert [num_hits("a"), num_hits("a"), num_hits("b")] == [0, 6, 0]


# ---- other clients -------------------------------------------------------------------------------
def test_a_request_of_lm_eval_gets_prompt_plus_one_entries_and_the_most_likely_token(server):
    """`is_greedy` is whether a token's score equals the largest of its top_logprobs."""
    ids = server.llm.tokenizer.encode("Once upon a time there was a king")
    body = {"model": NAME, "prompt": [ids, ids[:3]], "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = server.complete(**body, temperature=0, seed=1234)
    for choice, prompt in zip(answer["choices"], (ids, ids[:3]), strict=True):
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(prompt) + 1}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        pairs = list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[1:]
        assert all(value <= max(top.values()) for value, top in pairs)
        # The generated token is the most likely one; some of the prompt's are, some are not.
        assert pairs[-1][0] == max(pairs[-1][1].values())
    greedy = [value == max(top.values()) for value, top in pairs]
    assert choice["text"].startswith("Once upon a") and greedy[-1]


def test_a_request_of_guidellm_and_of_vllms_benchmark(server):
    body = {
        "model": NAME,
        "prompt": "The wolf",
        "stream": True,
        "max_tokens": 7,
        "ignore_eos": True,
        "stop": None,
        "logprobs": None,
        "repetition_penalty": 1.0,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    chunks = events(server.post("/v1/completions", **body))
    assert [len(chunk["choices"]) for chunk in chunks] == [1] * 7 + [0]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, 8), 7]


def test_text_becomes_tokens_and_tokens_become_text(server):
    ids = server.llm.tokenizer.encode(CAT)
    found = server.post("/tokenize", prompt=CAT).json()
    assert found == {"count": len(ids), "max_model_len": 1024, "tokens": ids}
    assert server.post("/detokenize", tokens=ids).json() == {"prompt": CAT}
    assert server.post("/detokenize", tokens=[3072]).status_code == 400


def test_there_are_health_a_version_metrics_and_a_description(server):
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/version").json() == {"version": "0.1.0"}
    server.complete(prompt="The wolf", max_tokens=3, ignore_eos=True)
    text = server.client.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny-gpt2"} 0.0' in text
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(paths)
    assert server.client.get("/docs").status_code == 404  # it would load scripts from elsewhere


# ---- mistakes ------------------------------------------------------------------------------------
BAD_BODIES = [
    (b"", 400),
    (b"{", 400),
    (b'{"prompt": "x"', 400),
    (b'"x"', 400),
    (b"[]", 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b'{"prompt": "\\ud83d"}', 400),  # half of a surrogate pair
    (b'{"prompt": "x", "model": "\\ud83d"}', 404),
    (b'{"prompt": "x", "max_tokens": 1e999}', 400),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    (b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}", 400),
    (b'{"prompt": "x", "temperature": NaN}', 400),
    (b'{"prompt": "x", "logit_bias": {"' + b"9" * 5000 + b'": 1}}', 400),
    (b'{"prompt": "x", "logit_bias": {"3072": 1}}', 400),
    (b"[" * 100_000 + b"]" * 100_000, 400),
    (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    (b'{"prompt": [' + b"null," * 300_000 + b"null]}", 400),
    (b'{"prompt": "x", "stop": ["' + b'","' * 90_000 + b'"]}', 400),
    (b'{"prompt": [3072]}', 400),
    (b'{"prompt": [-1]}', 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [[]]}', 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": ["x", ""]}', 400),
    (b'{"prompt": "x", "max_tokens": 1024}', 400),  # with the prompt it is longer than the context
    (b'{"prompt": "x", "n": 1025}', 400),
    (b'{"prompt": ["x", "x"], "n": 600}', 400),
    (b'{"prompt": "' + b"wolf " * 100_000 + b'"}', 400),
    (b'{"prompt": "' + b"x" * 3_000_000 + b'"}', 413),
]


@pytest.mark.parametrize("body, status", BAD_BODIES, ids=lambda x: ascii(x)[:40])
def test_a_bad_body_is_a_clients_mistake_in_openais_form(server, body, status):
    answer = server.client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} == set(error) and len(answer.content) < 2000
    assert not server.llm.engine.requests, "nothing of it is left"


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/v1/models/gpt-4", {}, 404),
        ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 400),  # no CORS preflight
        ("OPTIONS", "/v1/completions", {"Origin": "http://evil"}, 405),
    ],
)
def test_other_mistakes(server, method, path, headers, status):
    answer = server.client.request(method, path, content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == status and "error" in answer.json()
    assert not [name for name in answer.headers if name.startswith("access-control")]


# ---- clients that leave --------------------------------------------------------------------------
LONG = {"prompt": "The wolf", "max_tokens": 1000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_blocks_within_a_step(server, stream):
    scheduler = server.llm.engine.scheduler
    with httpx2.Client(base_url=server.url) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/completions", json=LONG, timeout=0.1)
    wait_for(lambda: not scheduler.running, 0.5)
    server.wait_until_free()


def test_a_client_that_leaves_before_its_request_starts_is_forgotten(shipped_model_folder):
    """One sequence runs at a time: the second waits, and its client leaves."""
    llm = LLM(shipped_model_folder, num_blocks=128, max_num_seqs=1)
    with running(llm) as server:
        body = LONG | {"stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with server.client.stream("POST", "/v1/completions", json=body):
                wait_for(lambda: llm.engine.scheduler.num_waiting == 1)
            wait_for(lambda: llm.engine.scheduler.num_waiting == 0, 0.5)
            assert next(line for line in lines if line)  # the first goes on
        server.wait_until_free()


def test_too_many_requests_are_told_to_come_back(shipped_model_folder):
    llm = LLM(shipped_model_folder, num_blocks=128, max_num_seqs=1)
    with running(llm, max_waiting=1) as server:
        body = LONG | {"stream": True}
        with server.client.stream("POST", "/v1/completions", json=body):
            with server.client.stream("POST", "/v1/completions", json=body):
                answer = server.post("/v1/completions", **LONG)
                assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
        server.wait_until_free()
        assert server.complete(prompt="x", max_tokens=2)["choices"]
        assert server.app.state.engine_thread.num_sequences == 0
        # More than can ever be served at once is no matter of time.
        assert server.post("/v1/completions", prompt=["x"] * 3).status_code == 400


def test_the_log_has_a_line_a_request_and_its_prompt_only_where_that_was_asked(
    shipped_model_folder, caplog
):
    caplog.set_level("INFO")
    llm = LLM(shipped_model_folder, num_blocks=128)
    for log_prompts in (False, True):
        with running(llm, log_prompts=log_prompts) as server:
            caplog.clear()
            server.complete(prompt="The wolf", max_tokens=3, ignore_eos=True)
            assert ("The wolf" in caplog.text) == log_prompts
            assert ": prompts 1, tokens 2 + 3, done" in caplog.text


def test_a_request_that_takes_too_long_ends(shipped_model_folder, caplog):
    caplog.set_level("INFO")
    llm = LLM(shipped_model_folder, num_blocks=128)
    llm.generate("x", SamplingParams(max_tokens=2))  # compiles the kernels
    with running(llm, timeout_s=0.5) as server:
        answer = server.post("/v1/completions", **LONG)
        assert answer.status_code == 408 and "longer than the server allows" in answer.text
        *chunks, last = events(server.post("/v1/completions", stream=True, **LONG))
        assert chunks and last["error"]["code"] == 408
        server.wait_until_free()
        wait_for(lambda: caplog.text.count("the request took longer") == 2)


def test_a_step_that_fails_ends_its_requests_and_no_later_ones(shipped_model_folder):
    llm = LLM(shipped_model_folder, num_blocks=128)
    with running(llm) as server:
        forward = llm.engine.forward

        def broken(batch):
            raise MemoryError("none left")

        llm.engine.forward = broken
        answer = server.post("/v1/completions", prompt="x")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        *_, last = events(server.post("/v1/completions", prompt="x", stream=True))
        assert last["error"]["message"] == "the engine failed: MemoryError"
        llm.engine.forward = forward
        assert server.complete(prompt="x", max_tokens=2)["choices"]
        llm.engine.forward = broken
        for _ in range(3):  # in a row: then the thread ends, and says so
            assert server.post("/v1/completions", prompt="x").status_code == 500
        wait_for(lambda: server.client.get("/health").status_code == 503)
        assert server.post("/v1/completions", prompt="x").status_code == 503


def test_a_watcher_sees_each_step_in_the_engines_thread(server):
    seen = []
    server.app.state.engine_thread.watch(lambda output: seen.append(threading.current_thread()))
    server.complete(prompt="The wolf", max_tokens=5, ignore_eos=True)
    assert len(seen) >= 5 and {thread.name for thread in seen} == {"engine"}


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tiny_gpt):
    with running(LLM(tiny_gpt()), served_model_name="toy") as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True, "temperature": 0}
        (choice,) = server.complete(**body)["choices"]
        assert choice["text"] == "" and len(choice["token_ids"]) == 4
        chunks = events(server.post("/v1/completions", stream=True, **body))
        assert [c["choices"][0]["token_ids"] for c in chunks] == [[i] for i in choice["token_ids"]]
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"prompt": "text"}),
        ):
            answer = server.post(path, **body)
            assert answer.status_code == 400 and "no tokenizer" in answer.text
