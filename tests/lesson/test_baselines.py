"""What paging replaces must be right and fast too, or the comparison with paging is worth nothing.

First the two roads without blocks: no cache, and slabs, against a dense oracle that is written out
here, one sequence and one token at a time. They run in float64, where the order of a sum does not
decide a token, on models with std 0.2, which write several distinct tokens. Then the reservations
and the buddies, in numbers that can be checked by hand. Then both under the real scheduler and
engine.
"""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import baselines
from baselines import (
    BuddyAllocator,
    ContiguousCache,
    attend_without_cache,
    generate_contiguous,
    generate_no_cache,
    next_logits,
    power_of_two,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
from block_allocator import BlockAllocator, NoFreeBlocks
from engine import InferenceEngine, eager_forward
from kv_cache import KVCache
from paged_attention import paged_attention
from sampling import SamplingParams
from scheduler import Scheduler, reserve_now
from sequence import Continuation, Request, Sequence

RESERVATIONS = [reserve_maximum, reserve_power_of_two, reserve_oracle]


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


def new_cache(model, max_num_seqs, max_seq_len=None, fill=math.nan):
    """Slabs full of NaN: whoever reads what nobody wrote says nothing but NaN from then on."""
    shape = model.config
    longest = max_seq_len or shape.max_seq_len
    sizes = shape.n_layer, max_num_seqs, longest, shape.n_head, shape.head_dim
    cache = ContiguousCache(*sizes, model.wte.weight.dtype)
    cache.slabs.fill_(fill)
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


# ---- the same tokens on all roads ----------------------------------------------------------------
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
    expected = [dense_greedy(model, prompt, 20) for prompt in prompts]
    assert generate_no_cache(model, prompts, 20) == expected
    assert generate_contiguous(model, prompts, 20, cache=new_cache(model, len(prompts))) == expected
    assert len(set(sum(expected, []))) >= 5, "one token repeated would prove nothing"


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


def test_prompts_are_left_as_they_were(model):
    prompts = random_prompts([3, 4])
    before = copy.deepcopy(prompts)
    generate_no_cache(model, prompts, 3)
    generate_contiguous(model, prompts, 3)
    assert prompts == before


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
ROADS = [generate_no_cache, generate_contiguous]


@pytest.mark.parametrize("generate", ROADS)
def test_a_sequence_ends_at_eos_and_keeps_it_while_the_others_go_on(model, generate):
    prompts = random_prompts([5, 1, 14, 2])
    free = generate(model, prompts, 16)
    eos = free[0][6]
    ended = generate(model, prompts, 16, eos_token_id=eos)
    expected = [dense_greedy(model, prompt, 16, eos) for prompt in prompts]
    assert ended == expected
    assert ended[0][-1] == eos and len(ended[0]) <= 7
    assert any(len(token_ids) == 16 for token_ids in ended), "somebody went on to the end"


@pytest.mark.parametrize("generate", ROADS)
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


@pytest.mark.parametrize("generate", ROADS)
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


def test_token_by_token_the_slabs_hold_the_keys_and_values_of_their_sequence():
    cache = ContiguousCache(1, 3, 8, num_kv_heads=2, head_dim=4)
    cache.slabs.fill_(math.nan)
    k, v = torch.randn(2, 6, 2, 4)
    cache.attend([0, 0], [4, 2])(0, torch.randn(6, 2, 4), k, v)
    assert torch.equal(cache.slabs[0, 0, 0, :, :4].transpose(0, 1), k[:4])
    assert torch.equal(cache.slabs[0, 1, 0, :, :4].transpose(0, 1), v[:4])
    assert torch.equal(cache.slabs[0, 0, 1, :, :2].transpose(0, 1), k[4:])
    assert torch.equal(cache.slabs[0, 1, 1, :, :2].transpose(0, 1), v[4:])
    assert cache.slabs[:, :, :, :, 4:].isnan().all(), "nothing is touched before it is in reach"


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


def test_two_caches_at_once_do_not_mix(model):
    """Two batches take turns, step by step; each says what it says alone."""
    batches = [random_prompts([5, 2], seed=3), random_prompts([1, 8], seed=4)]
    caches = [new_cache(model, 2), new_cache(model, 2)]
    expected = [[dense_greedy(model, prompt, 8) for prompt in batch] for batch in batches]
    starts = [[0, 0], [0, 0]]
    sequences = copy.deepcopy(batches)
    for _ in range(8):
        for i, cache in enumerate(caches):
            logits = next_logits(model, cache.attend, sequences[i], starts[i])
            starts[i] = [len(token_ids) for token_ids in sequences[i]]
            for ids, token_id in zip(sequences[i], logits.argmax(-1).tolist(), strict=True):
                ids.append(token_id)
    for batch, grown, tokens in zip(batches, sequences, expected, strict=True):
        assert [ids[len(prompt) :] for ids, prompt in zip(grown, batch, strict=True)] == tokens


@pytest.mark.parametrize("kind", [0, 1], ids=["a key", "a value"])
def test_one_changed_number_in_a_slab_changes_its_sequences_logits_only(model, kind):
    """The mutation: were the slab not read, nothing would change."""
    prompts = random_prompts([6, 9])
    slabs = new_cache(model, 2)
    next_logits(model, slabs.attend, prompts, [0, 0])
    longer = [[*prompt, 1] for prompt in prompts]
    before = next_logits(model, slabs.attend, longer, [6, 9])
    slabs.slabs[0, kind, 0, 2, 3, 5] += 1
    after = next_logits(model, slabs.attend, longer, [6, 9])
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert (after[1] - before[1]).abs().max() < 1e-9


# ---- how much is reserved ------------------------------------------------------------------------
def a_sequence(num_prompt_tokens, max_tokens, num_generated=0):
    token_ids = [0] * (num_prompt_tokens + num_generated)
    return SimpleNamespace(
        num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, token_ids=token_ids
    )


def test_a_power_of_two_is_never_below_its_number_and_less_than_twice_as_large():
    assert [power_of_two(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert [power_of_two(n) for n in (25, 1023, 1024, 1025)] == [32, 1024, 1024, 2048]


def test_the_three_reservations_for_10_tokens_of_a_prompt_and_15_more():
    seq = a_sequence(10, 15)
    assert reserve_maximum(64)(seq) == 64
    assert reserve_power_of_two(64)(seq) == 26, "10 and 16"
    assert reserve_oracle(64)(seq) == 25
    assert reserve_now(seq) == 10, "paged"


def test_no_reservation_is_larger_than_the_longest_sequence():
    seq = a_sequence(20, 30)
    assert [reserve(40)(seq) for reserve in RESERVATIONS] == [40, 40, 40]
    assert [reserve(60)(seq) for reserve in RESERVATIONS] == [60, 52, 50]


@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_a_reservation_is_the_same_all_along_and_never_too_small(reserve):
    for prompt, more in ((1, 1), (3, 60), (31, 1), (31, 2), (63, 9)):
        reserved = {reserve(64)(a_sequence(prompt, more, n)) for n in range(min(more, 64 - prompt))}
        assert len(reserved) == 1 and reserved.pop() >= min(prompt + more, 64)


# ---- buddies -------------------------------------------------------------------------------------
def regions(allocator):
    """The free regions as (first block, size), seen from outside: by taking the largest each time.

    Which of two equally large ones comes first is not said, so they come sorted.
    """
    twin = copy.deepcopy(allocator)
    found = []
    while twin.num_free:
        block_ids = twin.allocate(twin.num_free)
        found.append((block_ids[0], len(block_ids)))
    return sorted(found)


def books(allocator):
    counts = [allocator.ref_count(block_id) for block_id in range(allocator.num_blocks)]
    return counts, regions(allocator), allocator.num_reserved


def test_three_blocks_take_a_region_of_four_and_the_fourth_is_lost_meanwhile():
    allocator = BuddyAllocator(num_blocks=8, block_size=4)
    assert allocator.allocate(3) == [0, 1, 2]
    assert (allocator.num_reserved, allocator.num_free) == (4, 4)
    assert [allocator.ref_count(block_id) for block_id in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert allocator.allocate(1) == [4], "not 3: that belongs to the first allocation"


def test_a_region_is_halved_until_it_fits():
    allocator = BuddyAllocator(8)
    assert allocator.allocate(1) == [0]
    assert regions(allocator) == [(1, 1), (2, 2), (4, 4)]


def test_the_tightest_region_is_taken_first():
    allocator = BuddyAllocator(8)
    allocator.allocate(1)
    assert allocator.allocate(2) == [2, 3]
    assert allocator.allocate(1) == [1]
    assert allocator.allocate(4) == [4, 5, 6, 7]
    assert allocator.num_free == 0 and allocator.num_reserved == 8


def test_freed_buddies_merge_until_the_pool_is_whole_again():
    allocator = BuddyAllocator(8)
    a, b, c = allocator.allocate(1), allocator.allocate(1), allocator.allocate(2)
    allocator.free(a)
    assert regions(allocator) == [(0, 1), (4, 4)]
    allocator.free(c)
    assert regions(allocator) == [(0, 1), (2, 2), (4, 4)]
    allocator.free(b)
    assert regions(allocator) == [(0, 8)]


def test_neighbours_that_are_not_buddies_do_not_merge():
    allocator = BuddyAllocator(8)
    pairs = [allocator.allocate(2) for _ in range(4)]
    assert pairs == [[0, 1], [2, 3], [4, 5], [6, 7]]
    allocator.free(pairs[1])
    allocator.free(pairs[2])
    assert regions(allocator) == [(2, 2), (4, 2)], "4 adjacent blocks, but not at a multiple of 4"
    assert allocator.num_free == 2


@pytest.mark.parametrize(
    "num_blocks, expected",
    [
        (1, [(0, 1)]),
        (7, [(0, 4), (4, 2), (6, 1)]),
        (8, [(0, 8)]),
        (12, [(0, 8), (8, 4)]),
        (100, [(0, 64), (64, 32), (96, 4)]),
    ],
)
def test_a_pool_of_any_size_is_cut_into_powers_of_two(num_blocks, expected):
    allocator = BuddyAllocator(num_blocks)
    assert regions(allocator) == expected
    ones = [allocator.allocate(1) for _ in range(num_blocks)]
    assert sorted(sum(ones, [])) == list(range(num_blocks))
    for block_ids in ones:
        allocator.free(block_ids)
    allocator.check_integrity([])
    assert regions(allocator) == expected


def test_the_pool_can_have_enough_free_blocks_and_still_refuse():
    """External fragmentation, the disease that equal blocks cannot have."""
    buddies, paged = BuddyAllocator(8), BlockAllocator(8)
    for allocator in (buddies, paged):
        pairs = [allocator.allocate(2) for _ in range(4)]
        allocator.free(pairs[0])
        allocator.free(pairs[2])
    before = books(buddies)
    assert buddies.num_blocks - buddies.num_reserved == 4 and buddies.num_free == 2
    with pytest.raises(NoFreeBlocks, match="3 adjacent blocks asked for: 4 of 8 are free, 2 adj"):
        buddies.allocate(3)
    assert books(buddies) == before, "all or nothing"
    assert len(paged.allocate(3)) == 3


def test_asking_for_no_blocks_gives_none_and_freeing_none_frees_none():
    allocator = BuddyAllocator(4)
    before = books(allocator)
    assert allocator.allocate(0) == []
    allocator.free([])
    allocator.fork([])
    assert books(allocator) == before


def test_it_needs_as_many_blocks_as_any_allocator_while_a_region_can_be_so_large():
    allocator = BuddyAllocator(num_blocks=8, block_size=4)
    assert [allocator.blocks_needed(n) for n in (0, 1, 4, 5, 17, 32)] == [0, 1, 1, 2, 5, 8]


def test_what_no_region_can_ever_hold_needs_more_blocks_than_there_are():
    """Or a request for 9 adjacent of 12 blocks would be accepted and wait for ever."""
    allocator = BuddyAllocator(num_blocks=12, block_size=4)
    assert allocator.blocks_needed(32) == 8
    assert allocator.blocks_needed(33) == 16
    assert allocator.blocks_needed(48) == 16
    scheduler = Scheduler(allocator, 4, 16, max_seq_len=64, reserve=reserve_oracle(64))
    with pytest.raises(ValueError, match="need 16 blocks of 4, the pool has 12"):
        scheduler.add(make_request(0, 30, 3))
    scheduler.add(make_request(1, 30, 2))
    run(scheduler)


@pytest.mark.parametrize("num_blocks, block_size", [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_blocks_or_tokens_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="both must be at least 1"):
        BuddyAllocator(num_blocks, block_size)


def test_it_remembers_no_contents():
    allocator = BuddyAllocator(8, 4)
    table = allocator.allocate(2)
    allocator.publish(table, list(range(8)), 8)
    assert allocator.match_prefix(list(range(8))) == []
    assert allocator.num_evicted == 0


# ---- holders -------------------------------------------------------------------------------------
def test_a_forked_allocation_is_free_when_the_last_holder_leaves():
    allocator = BuddyAllocator(8)
    table = allocator.allocate(3)
    allocator.fork(table)
    assert [allocator.ref_count(block_id) for block_id in range(4)] == [2, 2, 2, 0]
    allocator.check_integrity([table, table])
    allocator.free(table)
    assert allocator.num_reserved == 4
    allocator.free(table)
    assert regions(allocator) == [(0, 8)]


def test_several_allocations_may_be_freed_in_one_list():
    """So a sequence may grow after all: its table is then one allocation after another."""
    allocator = BuddyAllocator(8)
    table = allocator.allocate(3) + allocator.allocate(1) + allocator.allocate(2)
    assert table == [0, 1, 2, 4, 6, 7]
    allocator.free(table)
    assert regions(allocator) == [(0, 8)]


BAD_LISTS = {
    "its first block": [0],
    "all but its last": [0, 1],
    "all but its first": [1, 2],
    "another order": [2, 1, 0],
    "with the block that was lost to rounding": [0, 1, 2, 3],
    "whole, and then a part of another": [0, 1, 2, 4],
    "a free block": [6],
    "a block that does not exist": [8],
    "a negative block": [-1],
    "twice in one list": [0, 1, 2, 0, 1, 2],
}


@pytest.mark.parametrize("block_ids", BAD_LISTS.values(), ids=BAD_LISTS)
def test_freeing_anything_but_whole_allocations_raises_and_changes_nothing(block_ids):
    allocator = BuddyAllocator(8)
    tables = [allocator.allocate(3), allocator.allocate(2)]
    assert tables == [[0, 1, 2], [4, 5]]
    before = books(allocator)
    with pytest.raises(ValueError):
        allocator.free(block_ids)
    assert books(allocator) == before
    allocator.check_integrity(tables)


def test_freeing_twice_raises_and_changes_nothing():
    allocator = BuddyAllocator(8)
    kept, table = allocator.allocate(2), allocator.allocate(3)
    allocator.free(table)
    before = books(allocator)
    with pytest.raises(ValueError, match="are not what allocate returned, or are free"):
        allocator.free(table)
    assert books(allocator) == before
    allocator.check_integrity([kept])


def test_forking_a_part_or_what_is_free_raises_and_changes_nothing():
    allocator = BuddyAllocator(8)
    table = allocator.allocate(3)
    before = books(allocator)
    for block_ids in ([0, 1], [1], [6]):
        with pytest.raises(ValueError, match="are not what allocate returned"):
            allocator.fork(block_ids)
    assert books(allocator) == before
    allocator.check_integrity([table])


# ---- the books notice ----------------------------------------------------------------------------
def two_tables():
    """Blocks 0-2 (and 3 lost) and 4-5 of 8; free: 6-7."""
    allocator = BuddyAllocator(8)
    return allocator, [allocator.allocate(3), allocator.allocate(2)]


def test_right_books_pass():
    allocator, tables = two_tables()
    allocator.check_integrity(tables)
    allocator.check_integrity(iter(tables))


def counted_once_more(allocator, tables):
    allocator._ref_counts[1] += 1


def counted_once_less(allocator, tables):
    allocator._ref_counts[2] -= 1


def a_free_block_is_counted(allocator, tables):
    allocator._ref_counts[6] = 1


def a_table_names_another_block(allocator, tables):
    tables[0][2] = 3


def a_table_names_a_block_outside(allocator, tables):
    tables[0].append(8)


def a_table_is_missing(allocator, tables):
    tables.pop()


def an_allocation_is_forgotten(allocator, tables):
    del allocator._held[4]


def an_allocation_is_longer(allocator, tables):
    allocator._held[4] = 3


def an_allocation_claims_the_block_lost_to_rounding(allocator, tables):
    allocator._held[0] = 4


def an_allocation_is_shorter(allocator, tables):
    allocator._held[0] = 2


def a_free_region_is_lost(allocator, tables):
    allocator._free.clear()


def a_free_region_is_larger(allocator, tables):
    allocator._free[6] = 4


def a_free_region_lies_elsewhere(allocator, tables):
    allocator._free = {4: 2}


def a_free_region_overlaps(allocator, tables):
    allocator._free[5] = 1


def free_buddies_stay_apart(allocator, tables):
    allocator._free = {6: 1, 7: 1}


CORRUPTIONS = [
    counted_once_more,
    counted_once_less,
    a_free_block_is_counted,
    a_table_names_another_block,
    a_table_names_a_block_outside,
    a_table_is_missing,
    an_allocation_is_forgotten,
    an_allocation_is_longer,
    an_allocation_claims_the_block_lost_to_rounding,
    an_allocation_is_shorter,
    a_free_region_is_lost,
    a_free_region_is_larger,
    a_free_region_lies_elsewhere,
    a_free_region_overlaps,
    free_buddies_stay_apart,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_every_corruption_is_noticed(corrupt):
    allocator, tables = two_tables()
    corrupt(allocator, tables)
    with pytest.raises(AssertionError):
        allocator.check_integrity(tables)


def test_a_region_at_a_crooked_address_is_noticed():
    """Blocks 1-2 as one region of two: it tiles the pool, but its buddy would be wrong."""
    allocator = BuddyAllocator(4)
    tables = [allocator.allocate(1)]
    allocator._free = {1: 2, 3: 1}
    with pytest.raises(AssertionError, match="a region of 2 blocks starts at block 1"):
        allocator.check_integrity(tables)


# ---- random games against a model that only knows which block belongs to whom --------------------
class Buddies(RuleBasedStateMachine):
    """The model: one cell a block, with the number of the allocation that reserved it, or None."""

    @initialize(num_blocks=st.integers(1, 40))
    def start(self, num_blocks):
        self.allocator = BuddyAllocator(num_blocks, 4)
        self.cells = [None] * num_blocks
        self.tables = {}  # allocation -> (block ids, holders)
        self.num_allocations = 0

    def largest_free(self):
        """The longest free run that is a power of two and starts at a multiple of its size."""
        best, size = 0, 1
        while size <= len(self.cells):
            for first in range(0, len(self.cells) - size + 1, size):
                if all(cell is None for cell in self.cells[first : first + size]):
                    best = size
            size *= 2
        return best

    @rule(n=st.integers(1, 12))
    def allocate(self, n):
        size = 1
        while size < n:
            size *= 2
        if size > self.largest_free():
            with pytest.raises(NoFreeBlocks):
                self.allocator.allocate(n)
            return
        table = self.allocator.allocate(n)
        first = table[0]
        assert table == list(range(first, first + n)), "adjacent and ascending"
        assert first % size == 0, "aligned"
        assert self.cells[first : first + size] == [None] * size, "nobody else's"
        self.num_allocations += 1
        self.cells[first : first + size] = [self.num_allocations] * size
        self.tables[self.num_allocations] = (table, 1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        number = data.draw(st.sampled_from(sorted(self.tables)))
        table, holders = self.tables[number]
        self.allocator.fork(table)
        self.tables[number] = (table, holders + 1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.tables))))

    def release(self, number):
        table, holders = self.tables[number]
        self.allocator.free(table)
        if holders > 1:
            self.tables[number] = (table, holders - 1)
            return
        del self.tables[number]
        self.cells = [None if cell == number else cell for cell in self.cells]

    @precondition(lambda self: any(len(table) > 1 for table, _ in self.tables.values()))
    @rule(data=st.data())
    def free_a_part(self, data):
        several = [table for table, _ in self.tables.values() if len(table) > 1]
        table = data.draw(st.sampled_from(several))
        with pytest.raises(ValueError):
            self.allocator.free(table[: data.draw(st.integers(1, len(table) - 1))])

    @invariant()
    def books_agree(self):
        if not hasattr(self, "cells"):
            return
        self.allocator.check_integrity(
            [table for table, holders in self.tables.values() for _ in range(holders)]
        )
        assert self.allocator.num_free == self.largest_free()
        assert self.allocator.num_reserved == sum(cell is not None for cell in self.cells)

    def teardown(self):
        if hasattr(self, "cells"):
            while self.tables:
                self.release(next(iter(self.tables)))
            self.books_agree()
            assert regions(self.allocator) == regions(BuddyAllocator(len(self.cells)))


TestBuddies = Buddies.TestCase
TestBuddies.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- under the real scheduler --------------------------------------------------------------------
def make_request(arrival, num_prompt_tokens, max_tokens, stop_token_ids=frozenset()):
    prompt = [2] * num_prompt_tokens
    request = Request(str(arrival), prompt, arrival)
    seq = Sequence(request, 0, list(prompt), num_prompt_tokens, max_tokens)
    seq.stop_token_ids = stop_token_ids
    request.sequences = [seq]
    return request


def run(scheduler, rng=None):
    """Steps to the end, the books checked after each; the most that ran and waited at once."""
    most_running = most_waiting = 0
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        scheduler.check_integrity()
        assert plan.scheduled, "a step without work would go on for ever"
        most_running = max(most_running, len(scheduler.running))
        most_waiting = max(most_waiting, scheduler.num_waiting)
        tokens = [0 if rng is None or rng.random() > 0.05 else 1 for _ in plan.sampled]
        chosen = zip(plan.sampled, tokens, strict=True)
        scheduler.update(plan, [Continuation(seq, [token_id]) for seq, token_id in chosen])
        scheduler.check_integrity()
    return most_running, most_waiting


@pytest.mark.parametrize("num_blocks", [32, 44])
@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_50_random_requests_run_to_the_end_without_preemption(reserve, num_blocks):
    rng = random.Random(7)
    allocator = BuddyAllocator(num_blocks, block_size=4)
    scheduler = Scheduler(allocator, 16, 24, max_seq_len=64, reserve=reserve(64))
    sizes = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(50)]
    requests = [make_request(i, *size, frozenset({1})) for i, size in enumerate(sizes)]
    for request in requests:
        scheduler.add(request)
    most_running, most_waiting = run(scheduler, rng)
    assert scheduler.num_preemptions == 0 and scheduler.num_recomputed_tokens == 0
    assert 2 <= most_running < 16 and most_waiting > 20, "memory was what they waited for"
    reasons = {}
    for request, (prompt, more) in zip(requests, sizes, strict=True):
        seq = request.sequences[0]
        reasons[seq.finish_reason] = reasons.get(seq.finish_reason, 0) + 1
        if seq.finish_reason == "length":
            assert len(seq.token_ids) == min(prompt + more, 64)
    assert reasons["stop"] > 5 and reasons["length"] > 5
    assert allocator.num_reserved == 0
    assert regions(allocator) == regions(BuddyAllocator(num_blocks))


def test_a_running_sequence_lies_in_one_piece():
    allocator = BuddyAllocator(32, block_size=4)
    scheduler = Scheduler(allocator, 16, 64, max_seq_len=64, reserve=reserve_oracle(64))
    for i, size in enumerate([(5, 6), (20, 9), (1, 1), (13, 20)]):
        scheduler.add(make_request(i, *size))
    scheduler.schedule()
    tables = [seq.block_table for seq in scheduler.running]
    assert tables == [[0, 1, 2], [8, 9, 10, 11, 12, 13, 14, 15], [4], list(range(16, 25))]
    # 11, 29, 2 and 33 tokens: regions of 4, 8, 1 and 16, of which 1, 0, 0 and 7 blocks are rounding
    assert allocator.num_reserved == 29
    assert allocator.num_reserved - sum(len(table) for table in tables) == 8


def test_sequences_that_reserve_nothing_ahead_still_run_but_preempt_each_other():
    """One block at a time from the buddies: not contiguous any more, but the books stay right."""
    allocator = BuddyAllocator(16, block_size=4)
    scheduler = Scheduler(allocator, 16, 24, max_seq_len=64, reserve=reserve_now)
    for i in range(10):
        scheduler.add(make_request(i, 6, 20))
    run(scheduler)
    assert scheduler.num_preemptions > 0
    assert regions(allocator) == [(0, 16)]


def test_two_sequences_run_where_the_maximum_is_reserved_and_eight_where_it_is_paged():
    """The demo's pool of 16 blocks of 4 with max_seq_len 32."""
    started = {
        "maximum": baselines.start_sequences(BuddyAllocator(16, 4), reserve_maximum(32)),
        "power of two": baselines.start_sequences(BuddyAllocator(16, 4), reserve_power_of_two(32)),
        "oracle": baselines.start_sequences(BuddyAllocator(16, 4), reserve_oracle(32)),
        "paged": baselines.start_sequences(BlockAllocator(16, 4), reserve_now),
    }
    names = {plan: "".join(owners) for plan, owners in started.items()}
    assert names == {
        "maximum": "AB",
        "power of two": "ABCD",
        "oracle": "ABCD",
        "paged": "ABCDEFGH",
    }
    assert started["maximum"]["B"] == ([8, 9, 10, 11, 12, 13, 14, 15], 9)
    assert started["oracle"]["B"] == ([4, 5, 6], 9)


# ---- under the real engine -----------------------------------------------------------------------
@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_the_paged_engine_on_contiguous_memory_writes_the_contiguous_engines_tokens(model, reserve):
    """Same engine, same kernel, only the memory is planned as before paging."""
    block_size, num_blocks = 4, 44  # the longest sequence takes 16 of them
    prompts = random_prompts([5, 1, 14, 2, 30, 7, 22, 44])
    cache = KVCache(2, num_blocks, block_size, 4, 16, torch.float64)
    cache.pool.fill_(math.nan)
    allocator = BuddyAllocator(num_blocks, block_size)
    scheduler = Scheduler(allocator, 16, 20, max_seq_len=64, reserve=reserve(64))
    forward = eager_forward(model, cache, paged_attention)
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=97)
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=24))

    done = {}
    most_running = 0
    while engine.has_unfinished():
        output = engine.step()
        scheduler.check_integrity()
        most_running = max(most_running, len(scheduler.running))
        for seq in scheduler.running:
            assert seq.block_table == list(range(seq.block_table[0], seq.block_table[-1] + 1))
        done |= {o.request_id: o.outputs[0].token_ids for o in output.outputs if o.finished}

    expected = generate_contiguous(model, prompts, 24, cache=new_cache(model, 8))
    assert [done[str(i)] for i in range(8)] == expected
    assert [len(token_ids) for token_ids in expected] == [24, 24, 24, 24, 24, 24, 24, 20]
    assert len(set(sum(expected, []))) >= 5
    assert 2 <= most_running < 8, "some had to wait for memory"
    assert scheduler.num_preemptions == 0
    assert allocator.num_reserved == 0
