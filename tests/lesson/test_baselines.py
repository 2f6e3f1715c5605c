"""What paging replaces must be right and fast too, or the comparison with paging is worth nothing.

The oracle is dense attention, written out here: one sequence, one token at a time. It runs in
float64, where the order of a sum does not decide a token, on models with std 0.2, which write
several distinct tokens.
"""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F

from baselines import (
    ContiguousCache,
    attend_without_cache,
    generate_contiguous,
    generate_no_cache,
    next_logits,
)


# ---- the oracle ----------------------------------------------------------------------------------
def dense_attend(layer, q, k, v):
    """Attention of one whole sequence as the textbook writes it."""
    T, H, D = q.shape
    out = torch.empty_like(q)
    for h in range(H):
        scores = q[:, h] @ k[:, h].T / math.sqrt(D)
        scores[torch.triu(torch.ones(T, T), diagonal=1).bool()] = -math.inf
        out[:, h] = scores.softmax(-1) @ v[:, h]
    return out


def dense_logits(model, token_ids):
    """Scores of the token after `token_ids`, (V,)."""
    hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), dense_attend)
    return model.logits(hidden[-1])


def dense_greedy(model, prompt, max_tokens, eos_token_id=None):
    """One sequence, one token at a time, nothing kept."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_tokens, model.config.max_seq_len):
        ids.append(dense_logits(model, ids).argmax().item())
        if ids[-1] == eos_token_id:
            break
    return ids[len(prompt) :]


def random_prompts(lengths, seed=0, vocab_size=97):
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def new_cache(model, max_num_seqs, max_seq_len=None):
    """Slabs full of NaN: a number that is read and was never written spoils all that follows."""
    shape = model.config
    longest = max_seq_len or shape.max_seq_len
    sizes = shape.n_layer, max_num_seqs, longest, shape.n_head, shape.head_dim
    cache = ContiguousCache(*sizes, model.wte.weight.dtype)
    cache.slabs.fill_(math.nan)
    return cache


@pytest.fixture(scope="module")
def model(tiny_gpt):
    """2 layers, 4 heads of 16, 97 tokens, max_seq_len 64; float64."""
    return tiny_gpt(dtype=torch.float64)


# ---- no cache ------------------------------------------------------------------------------------
def test_sequences_laid_end_to_end_attend_each_to_its_own_tokens():
    q, k, v = torch.randn(3, 9, 2, 8, dtype=torch.float64)
    out = attend_without_cache([0, 0, 0], [4, 1, 4])(0, q, k, v)
    for first, end in ((0, 4), (4, 5), (5, 9)):
        alone = dense_attend(0, q[first:end], k[first:end], v[first:end])
        assert torch.allclose(out[first:end], alone, atol=1e-12)


def test_without_a_cache_every_step_computes_every_token_again(model):
    num_rows = []
    hook = model.register_forward_pre_hook(lambda _, inputs: num_rows.append(len(inputs[0])))
    generate_no_cache(model, random_prompts([3, 5]), max_tokens=4)
    without = num_rows.copy()
    num_rows.clear()
    generate_contiguous(model, random_prompts([3, 5]), max_tokens=4)
    hook.remove()
    assert without == [8, 10, 12, 14]
    assert num_rows == [8, 2, 2, 2]


# ---- the same tokens with slabs and without a cache ----------------------------------------------
LENGTHS = {
    "one prompt of one token": [1],
    "three of one token": [1, 1, 1],
    "equal lengths": [7, 7, 7],
    "ragged": [5, 1, 14, 2],
    "the shortest and the longest that can be": [1, 63],
    "longest first": [40, 20, 10, 5, 1],
    "all lengths up to 12": list(range(1, 13)),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_cache_and_contiguous_write_the_dense_oracles_tokens(model, lengths):
    prompts = random_prompts(lengths)
    before = copy.deepcopy(prompts)
    expected = [dense_greedy(model, prompt, 20) for prompt in prompts]
    assert generate_no_cache(model, prompts, 20) == expected
    assert generate_contiguous(model, prompts, 20, cache=new_cache(model, len(prompts))) == expected
    assert len(set(sum(expected, []))) >= 5, "one token repeated would prove nothing"
    assert prompts == before


def test_the_logits_of_every_step_are_the_dense_oracles(model):
    sequences = random_prompts([5, 1, 14, 2])
    slabs = new_cache(model, 4)
    starts = [0, 0, 0, 0]
    for _ in range(8):
        expected = torch.stack([dense_logits(model, token_ids) for token_ids in sequences])
        kept = next_logits(model, slabs.attend, sequences, starts)
        again = next_logits(model, attend_without_cache, sequences, [0, 0, 0, 0])
        assert (kept - expected).abs().max() < 1e-9 and (again - expected).abs().max() < 1e-9
        starts = [len(token_ids) for token_ids in sequences]
        for token_ids, token_id in zip(sequences, expected.argmax(-1).tolist(), strict=True):
            token_ids.append(token_id)


def test_a_prompt_may_also_arrive_in_pieces(model):
    """Several new tokens after several kept ones: the one case that needs a whole mask."""
    prompts = random_prompts([17, 9, 30])
    expected = torch.stack([dense_logits(model, prompt) for prompt in prompts])
    slabs = new_cache(model, 3)
    ends = [[4, 1, 11], [5, 8, 12], [17, 9, 30]]
    starts = [0, 0, 0]
    for upto in ends:
        pieces = [prompt[:end] for prompt, end in zip(prompts, upto, strict=True)]
        logits = next_logits(model, slabs.attend, pieces, starts)
        starts = upto
    assert (logits - expected).abs().max() < 1e-9


def test_no_prompts_have_no_continuations(model):
    assert generate_no_cache(model, [], 5) == [] == generate_contiguous(model, [], 5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, None)])
def test_a_model_in_fewer_bits_runs_on_slabs_of_its_own_dtype(tiny_gpt, model, dtype, bound):
    small = tiny_gpt(dtype=dtype)
    slabs = new_cache(small, 2)
    prompts = random_prompts([6, 3])
    logits = next_logits(small, slabs.attend, prompts, [0, 0])
    assert slabs.slabs.dtype == logits.dtype == dtype and logits.isfinite().all()
    if bound is not None:
        exact = next_logits(model, attend_without_cache, prompts, [0, 0])
        assert (logits - exact).abs().max() < bound
    written = generate_contiguous(small, prompts, 8, cache=slabs)
    assert [len(token_ids) for token_ids in written] == [8, 8]


# ---- where a sequence ends -----------------------------------------------------------------------
GENERATORS = [generate_no_cache, generate_contiguous]


@pytest.mark.parametrize("generate", GENERATORS)
def test_a_sequence_ends_at_eos_and_keeps_it_while_the_others_go_on(model, generate):
    prompts = random_prompts([5, 1, 14, 2])
    free = generate(model, prompts, 16)
    eos = free[0][6]
    ended = generate(model, prompts, 16, eos_token_id=eos)
    expected = [dense_greedy(model, prompt, 16, eos) for prompt in prompts]
    assert ended == expected
    assert ended[0][-1] == eos and len(ended[0]) <= 7
    assert any(len(token_ids) == 16 for token_ids in ended), "at least one went on to the end"


@pytest.mark.parametrize("generate", GENERATORS)
def test_a_sequence_ends_where_the_context_is_full(model, generate):
    prompts = random_prompts([60, 10, 63])
    written = generate(model, prompts, 20)
    assert [len(token_ids) for token_ids in written] == [4, 20, 1]
    assert written == [dense_greedy(model, prompt, 20) for prompt in prompts]


def test_shorter_slabs_end_a_sequence_earlier(model):
    prompts = random_prompts([12, 3])
    written = generate_contiguous(model, prompts, 20, cache=new_cache(model, 2, max_seq_len=16))
    assert [len(token_ids) for token_ids in written] == [4, 13]
    assert written == [dense_greedy(model, prompt, 20)[:n] for prompt, n in zip(prompts, [4, 13])]


@pytest.mark.parametrize("generate", GENERATORS)
def test_what_cannot_be_generated_is_refused_in_one_sentence(model, generate):
    with pytest.raises(ValueError, match="prompt has 0 tokens, max_seq_len is 64"):
        generate(model, [[1, 2], []], 5)
    with pytest.raises(ValueError, match="prompt has 64 tokens, max_seq_len is 64"):
        generate(model, random_prompts([64]), 5)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        generate(model, [[1, 2]], 0)


def test_more_prompts_than_slabs_are_refused(model):
    with pytest.raises(ValueError, match="3 prompts, 2 slabs: raise max_num_seqs"):
        generate_contiguous(model, random_prompts([1, 2, 3]), 5, cache=new_cache(model, 2))


# ---- the slabs -----------------------------------------------------------------------------------
def test_every_sequence_holds_a_slab_for_the_longest_text_from_the_start():
    cache = ContiguousCache(2, 3, 64, num_kv_heads=4, head_dim=16, dtype=torch.float32)
    assert cache.slabs.shape == (2, 2, 3, 4, 64, 16)
    # 2 layers x K and V x 4 heads x 16 numbers x 4 bytes = 1,024 bytes a token
    assert cache.slabs.nbytes == 3 * 64 * 1024


def watch_library_calls(monkeypatch):
    calls = []
    library = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        calls.append((q, k, v, options))
        return library(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("lengths, has_mask", [([9, 9, 9], False), ([9, 4, 1], True)])
def test_a_decode_step_is_one_library_call_a_layer_on_views_of_the_slabs(
    model, monkeypatch, lengths, has_mask
):
    """What makes it a fair baseline: nothing is gathered, nothing is concatenated, no padding."""
    slabs = new_cache(model, 5)
    prompts = random_prompts(lengths)
    next_logits(model, slabs.attend, prompts, [0, 0, 0])
    calls = watch_library_calls(monkeypatch)
    next_logits(model, slabs.attend, [[*prompt, 1] for prompt in prompts], lengths)
    assert len(calls) == model.config.n_layer
    for layer, (q, k, v, options) in enumerate(calls):
        assert q.shape == (3, 4, 1, 16) and k.shape == v.shape == (3, 4, 10, 16)
        assert k.data_ptr() == slabs.slabs[layer, 0].data_ptr(), "K is read where it lies"
        assert v.data_ptr() == slabs.slabs[layer, 1].data_ptr()
        assert (options["attn_mask"] is not None) == has_mask and not options["is_causal"]


def test_a_prefill_of_whole_prompts_needs_no_mask(model, monkeypatch):
    calls = watch_library_calls(monkeypatch)
    next_logits(model, new_cache(model, 3).attend, random_prompts([9, 4, 1]), [0, 0, 0])
    assert [options["attn_mask"] for *_, options in calls] == [None, None]
    assert all(options["is_causal"] for *_, options in calls)


def test_several_query_heads_may_share_one_head_of_keys_and_values():
    generator = torch.Generator().manual_seed(0)
    grouped, repeated = (ContiguousCache(1, 2, 8, heads, 8, torch.float64) for heads in (2, 6))
    for starts, counts in (([0, 0], [3, 5]), ([3, 5], [1, 1])):
        N = sum(counts)
        q = torch.randn(N, 6, 8, dtype=torch.float64, generator=generator)
        k, v = torch.randn(2, N, 2, 8, dtype=torch.float64, generator=generator)
        few = grouped.attend(starts, counts)(0, q, k, v)
        many = repeated.attend(starts, counts)(
            0, q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        )
        assert few.shape == (N, 6, 8) and torch.allclose(few, many, atol=1e-12)


def test_a_cache_may_be_used_again_for_fewer_and_shorter_prompts(model):
    slabs = new_cache(model, 4)
    generate_contiguous(model, random_prompts([40, 30, 50, 20], seed=1), 10, cache=slabs)
    prompts = random_prompts([2, 9, 1], seed=2)
    again = generate_contiguous(model, prompts, 12, cache=slabs)
    assert again == [dense_greedy(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("kind", [0, 1], ids=["a key", "a value"])
def test_one_changed_number_in_a_slab_changes_its_sequences_logits_only(model, kind):
    """Had the step not read the slab, nothing would change."""
    prompts = random_prompts([6, 9])
    slabs = new_cache(model, 2)
    next_logits(model, slabs.attend, prompts, [0, 0])
    longer = [[*prompt, 1] for prompt in prompts]
    before = next_logits(model, slabs.attend, longer, [6, 9])
    slabs.slabs[0, kind, 0, 2, 3, 5] += 1
    after = next_logits(model, slabs.attend, longer, [6, 9])
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert (after[1] - before[1]).abs().max() < 1e-9
