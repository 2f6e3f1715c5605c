"""The server over a real connection: what clients send, and what they get."""

import json

import pytest
from servers import running, wait_for

from llm import LLM, SamplingParams


@pytest.fixture(scope="module")
def server(shipped_model_folder):
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=256)
    with running(llm) as server:
        yield server


def events(answer) -> list[dict]:
    """The chunks of a stream, which ends with [DONE]."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_the_engine_writes(server):
    answer = server.complete(prompt="The wolf", max_tokens=9, seed=1)
    other = LLM(server.llm.model_name, dtype="float64", num_blocks=64)
    params = SamplingParams(max_tokens=9, seed=1)
    assert answer["choices"][0]["text"] == other.generate("The wolf", params)[0].outputs[0].text
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}


def test_a_stream_has_one_chunk_a_token_and_the_same_text(server):
    body = {"prompt": "The wolf", "max_tokens": 9, "seed": 1}
    chunks = events(server.post("/v1/completions", stream=True, **body))
    assert len(chunks) == 9
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == server.complete(**body)["choices"][0]["text"]


def test_a_client_that_goes_away_frees_its_blocks(server):
    body = {"prompt": "The wolf", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        assert server.llm.engine.scheduler.running
    wait_for(lambda: not server.llm.engine.scheduler.running, 1.0)
    server.wait_until_free()


def test_there_are_health_a_version_and_a_model(server):
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/version").json() == {"version": "0.1.0"}
    (model,) = server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny-gpt2", 1024)
    assert server.client.get("/v1/models/tiny-gpt2").json() == model
    assert server.client.get("/v1/models/gpt-4").status_code == 404
