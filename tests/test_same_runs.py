"""When are two runs the same? The lines of the table in docs/results.md, on the included model.

The same bits, the same tokens with logits that differ in their last digits, or near ties, where the
last digits decide. The order of a floating-point sum changes them, and batch size, chunking and
block size change that order.
"""

import pytest
import torch

from checkpoints.load import load_model
from checkpoints.tokenizer import load_tokenizer
from llm import LLM, SamplingParams

PROMPTS = ["Once upon a time there was a king who had three sons,", "The wolf said to the", "A Fox"]
PARAMS = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)
LARGEST_DIFFERENCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@pytest.fixture(scope="module", params=LARGEST_DIFFERENCE, ids=str)
def run(request, shipped_model_folder):
    """`run(together, **options)`: each prompt's tokens and their log-probabilities."""
    model = load_model(shipped_model_folder, request.param, "cpu").eval()
    tokenizer = load_tokenizer(shipped_model_folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]

    def generate(together=True, **options):
        llm = LLM(model, threads=1, **({"num_blocks": 100, "backend": "torch"} | options))
        groups = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = [out.outputs[0] for group in groups for out in llm.generate(group, PARAMS)]
        chosen = [[d[i].logprob for d, i in zip(o.logprobs, o.token_ids)] for o in outputs]
        generate.num_preemptions = llm.engine.scheduler.num_preemptions
        return [o.token_ids for o in outputs], torch.tensor(chosen, dtype=torch.float64)

    generate.bound = LARGEST_DIFFERENCE[request.param]
    return generate


def test_the_same_run_twice_gives_the_same_bits(run):
    tokens, logprobs = run()
    tokens_again, logprobs_again = run()
    assert tokens == tokens_again and torch.equal(logprobs, logprobs_again)
    assert len({token for ids in tokens for token in ids}) > 10


CHANGES = {
    "alone": {"together": False},
    "chunked prefill": {"max_num_batched_tokens": 5},
    "block_size": {"block_size": 3, "num_blocks": 100},
    "preempted": {"block_size": 4, "num_blocks": 16},
    "numba": {"backend": "numba"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_batch_chunking_block_size_or_backend_gives_the_same_tokens(run, change):
    tokens, logprobs = run()
    others, other_logprobs = run(**CHANGES[change])
    assert (run.num_preemptions > 0) == (change == "preempted")
    assert others == tokens
    assert (logprobs - other_logprobs).abs().max() < run.bound
