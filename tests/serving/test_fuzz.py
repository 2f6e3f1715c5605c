"""Requests made from the server's own OpenAPI description, right ones and wrong ones.

schemathesis draws them for each route; the server must answer each with what is no fault of its
own, in OpenAI's form. The model is a small random one, so that a request takes milliseconds.
PAGEDGPT_FUZZ=1000 draws that many for each route and kind.
"""

import os
from collections import Counter

import httpx2
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from servers import running

from llm import LLM
from outputs import ByteTokenizer

NUM_EXAMPLES = int(os.environ.get("PAGEDGPT_FUZZ", "12"))
ROUTES = {
    "/health": "GET",
    "/version": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/models/{model_id}": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
}
STREAMS_FOREVER = {"/events"}


class Bytes(ByteTokenizer):
    """A token a byte, for a model of 256 tokens."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def server(tiny_gpt):
    llm = LLM(tiny_gpt(vocab_size=256), num_blocks=64)
    llm.tokenizer = llm.engine.tokenizer = llm.engine.output_processor.tokenizer = Bytes()
    with running(llm, served_model_name="toy", max_waiting=2000) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server):
    description = server.client.get("/openapi.json").json()
    return schemathesis.openapi.from_dict(description)


def test_every_route_of_the_description_is_fuzzed(schema):
    found = {operation.ok().full_path for operation in schema.get_all_operations()}
    assert found - STREAMS_FOREVER - {"/"} == set(ROUTES)


def repair(body, error: dict) -> bool:
    """Change the field that an error is about, so that the next try gets further.

    The description has no ranges, so nearly every request that is made from it has some number that
    is out of range, and without this none would be served.
    """
    if not isinstance(body, dict):
        return False
    word = error["param"] or error["message"].split()[0]
    if word not in body or word == "prompt":
        word = "use_beam_search" if "beam search" in error["message"] else "prompt"
    if word == "prompt":
        body["prompt"] = "The wolf"
    elif word == "model":
        body["model"] = "toy"
    elif word == "messages":
        body["messages"] = [{"role": "user", "content": "Hi"}]
    elif word == "tokens":
        body["tokens"] = [72, 105]
    else:
        body.pop(word, None)
    return True


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ROUTES)
def test_no_request_is_the_servers_fault(server, schema, path, mode):
    operation = schema[path][ROUTES[path]]
    if mode.is_negative and ROUTES[path] == "GET":
        pytest.skip("any path is a right one")

    statuses = Counter()

    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case):
        arguments = case.as_transport_kwargs(base_url=server.url)
        arguments.pop("cookies", None)
        body = arguments.get("json")
        if isinstance(body, dict):
            body.setdefault("max_tokens", 3)
        for _ in range(40):
            try:
                answer = server.client.request(**arguments)
            except (httpx2.InvalidURL, httpx2.LocalProtocolError, UnicodeEncodeError, ValueError):
                return  # the client itself refuses to send it
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code < 400:
                break
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            if mode.is_negative or not repair(body, error):
                break

    check()
    print(path, mode.value, dict(statuses))
    if mode.is_positive and not path.startswith("/v1/models/"):
        assert statuses[200], "no request was served"
    server.wait_until_free()
