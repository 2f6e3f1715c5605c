"""A head with rows of padding computes the same logits, and nothing sees the others."""

import copy

import pytest
import torch

from checkpoints.train_tiny import save_model
from kernels.padded_head import pad_vocabulary
from kernels.triton_prefill import INTERPRETED
from kernels.triton_sampling import draw_tokens_triton
from llm import LLM
from model import GPT, GPTConfig, attend_one_sequence
from sampling import SampleRow, SamplingParams, draw_tokens
from watch.explain import weight_bytes

SHAPE = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}


@torch.inference_mode()
def logits_of(model, ids):
    """(T,) ids -> (T, V)"""
    return model.logits(model(ids, torch.arange(len(ids)), attend_one_sequence))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def plain_and_padded(request):
    """A model of 61 tokens, and the same with a head of 64 rows, of which three are NaN."""
    config = GPTConfig(**SHAPE, tie_word_embeddings=request.param)
    plain = GPT(config).init_weights(std=0.3).double().eval().requires_grad_(False)
    padded = pad_vocabulary(copy.deepcopy(plain))
    assert padded.lm_head.padded.shape == (64, 48) and padded.lm_head.padded[61:].abs().sum() == 0
    padded.lm_head.padded[61:] = torch.nan  # a row that were seen would spoil every result
    return plain, padded


def test_rows_of_logits_from_a_padded_head_are_64_numbers_apart(plain_and_padded):
    want, got = (logits_of(model, torch.arange(9)) for model in plain_and_padded)
    assert got.shape == want.shape == (9, 61) and got.stride() == (64, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_pad_rows_are_neither_counted_nor_saved(plain_and_padded, tmp_path):
    plain, padded = plain_and_padded
    want, got = plain.state_dict(), padded.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[name], got[name]) for name in want)
    assert padded.num_parameters() == plain.num_parameters()
    assert weight_bytes(padded, 3, 3) == weight_bytes(plain, 3, 3)
    assert (padded.lm_head.weight is padded.wte.weight) == plain.config.tie_word_embeddings
    for name, model in (("plain", plain), ("padded", padded)):
        save_model(model, tmp_path / name, torch.float32)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "padded")]
    assert files[0] == files[1]


PARAMS = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_k": 5},
    {"seed": 3, "top_p": 0.7, "top_k": 1000},
    {"seed": 4, "min_p": 0.2, "temperature": 2.0},
    {"temperature": 0, "logit_bias": {60: 3.0, 7: -100.0}},
    {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0, "min_tokens": 4, "stop_token_ids": [60, 3, 9]},
    {"temperature": 0, "logprobs": 61, "prompt_logprobs": 61},
]


def test_no_way_to_choose_tokens_sees_the_pad_rows(plain_and_padded):
    """All at once, so that steps of prompts and decoding sequences are mixed."""
    prompts = [[1 + i, 60, 5, 2 * i] for i in range(len(PARAMS))]
    params = [SamplingParams(**p, max_tokens=12, ignore_eos=True) for p in PARAMS]
    results = []
    for model in plain_and_padded:
        llm = LLM(model, num_blocks=64, block_size=4, max_num_batched_tokens=12)
        results.append(llm.generate(prompts, params))
    plain, padded = ([output.outputs[0] for output in outputs] for outputs in results)
    assert [text.token_ids for text in padded] == [text.token_ids for text in plain]
    assert len({token for text in plain for token in text.token_ids}) > 12
    for want, got in zip(plain[-1].logprobs, padded[-1].logprobs, strict=True):
        assert len(want) == len(got) == 61
        assert [got[t].logprob for t in want] == pytest.approx([p.logprob for p in want.values()])
        assert [got[t].rank for t in want] == [p.rank for p in want.values()]
    want, got = results[0][-1].prompt_logprobs, results[1][-1].prompt_logprobs
    assert got[0] is want[0] is None
    for want_row, got_row in zip(want[1:], got[1:], strict=True):
        ranks = {token: p.rank for token, p in want_row.items()}
        assert ranks == {token: p.rank for token, p in got_row.items()} and len(ranks) == 61


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is needed")
def test_the_gpus_sampler_reads_rows_that_are_further_apart_than_they_are_long(plain_and_padded):
    _, padded = plain_and_padded
    logits = logits_of(padded, torch.arange(len(PARAMS) - 1)).float()
    rows = [
        SampleRow(SamplingParams(**p), i, 9, [3, i, 3], 1, (60,)) for i, p in enumerate(PARAMS[:-1])
    ]
    view = torch.full((len(rows), 64), torch.nan)[:, :61].copy_(logits)
    want, got = draw_tokens(logits.contiguous(), rows), draw_tokens_triton(view, rows)
    assert view.stride() == (64, 1) and got[0].tolist() == want[0].tolist()
    assert got[1].tolist() == want[1].tolist()
