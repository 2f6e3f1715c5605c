"""Requests made from the server's own OpenAPI description, right ones and wrong ones.

schemathesis draws them for each route; the server must answer each with what is no fault of its
own, in OpenAI's form. The model is a small random one, so that a request takes milliseconds.
PAGEDGPT_FUZZ=1000 draws that many for each route and kind.
"""

import os

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


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ROUTES)
def test_no_request_is_the_servers_fault(server, schema, path, mode):
    operation = schema[path][ROUTES[path]]
    if mode.is_negative and ROUTES[path] == "GET":
        pytest.skip("any path is a right one")

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
        if isinstance(arguments.get("json"), dict):
            arguments["json"].setdefault("max_tokens", 3)
        try:
            answer = server.client.request(**arguments)
        except (httpx2.InvalidURL, httpx2.LocalProtocolError, UnicodeEncodeError, ValueError):
            return  # the client itself refuses to send it
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()
    server.wait_until_free()
