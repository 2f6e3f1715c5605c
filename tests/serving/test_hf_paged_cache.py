"""PagedCache in transformers' own generate(): the oracle is DynamicCache, in the same process."""

import copy
import functools
import gc
import threading
import warnings

import pytest
import torch
from torch import Tensor

from block_allocator import BlockAllocator, NoFreeBlocks
from kernels.backends import BACKENDS
from kv_cache import KVCache

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from serving.hf_paged_cache import InPlace, PagedCache, paged_attention_forward  # noqa: E402

BLOCK_SIZE = 4
VOCABULARY = 97
# Weights of std 0.2: with a model's own 0.02 greedy decoding repeats one token, whatever the cache
# holds, and any cache passes.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "eos_token_id": None}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@functools.cache
def model_of(architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A small random model: GPT-2 has as many heads of K as of Q, Llama shares each by two."""
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, **COMMON
        ),
        "llama": lambda: transformers.LlamaConfig(**LLAMA, **COMMON),
        "mistral": lambda: transformers.MistralConfig(**LLAMA, **COMMON, sliding_window=10),
        "gemma2": lambda: transformers.Gemma2Config(
            **LLAMA, **COMMON, head_dim=8, sliding_window=64, query_pre_attn_scalar=8
        ),
    }
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs[architecture]())
    return model.to(dtype).requires_grad_(False).eval()


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded on the left to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def pool_for(model, num_blocks: int) -> tuple[KVCache, BlockAllocator]:
    """A pool full of NaN: whatever reads a slot that nobody wrote gives NaN."""
    cache = PagedCache.for_model(model, num_blocks, BLOCK_SIZE)
    cache.kv_cache.pool.fill_(float("nan"))
    return cache.kv_cache, cache.allocator


def generate(model, inputs, cache, max_new_tokens=12, **options):
    """generate() with a fixed seed: the tokens and the logits of each step."""
    transformers.set_seed(7)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the gather; a test of its own looks at these
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return output.sequences, output.logits


@torch.no_grad()
def forward(model, ids: Tensor, cache, mask: Tensor | None = None) -> Tensor:
    """The logits of all tokens of `ids`."""
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits


def assert_same_as_dynamic_cache(model, inputs, attention: str, backend: str = "auto", **options):
    """Generate with DynamicCache, then with PagedCache under `attention`; returns the cache."""
    model.set_attn_implementation("sdpa")
    expected, expected_logits = generate(
        model, inputs, DynamicCache(config=model.config), **options
    )
    assert len(expected[0].unique()) > 4, "the text repeats itself: any cache would pass"
    model.set_attn_implementation(attention)
    kv_cache, allocator = pool_for(model, num_blocks=160)
    cache = PagedCache(kv_cache, allocator, model.config, backend)
    tokens, logits = generate(model, inputs, cache, **options)
    assert torch.equal(tokens, expected)
    assert len(logits) == len(expected_logits)
    for mine, theirs in zip(logits, expected_logits, strict=True):
        if attention == "paged":  # the sums have another order; logits are about 10
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
        else:
            assert torch.equal(mine, theirs)
    allocator.check_integrity(cache.tables.table.tolist())
    used, unused = ("paged", "gather") if attention == "paged" else ("gather", "paged")
    assert cache.counts[used] >= 4  # at least two forwards of two layers
    assert cache.counts[unused] == 0
    return cache


# ---- the same tokens in every way to generate ----------------------------------------------------
RAGGED = [3, 9, 1, 14]
REPEATED = {  # one row with repetitions, which prompt lookup finds
    "input_ids": torch.tensor([[5, 6, 7, 8, 9] * 3]),
    "attention_mask": torch.ones(1, 15, dtype=torch.long),
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "two beams": {"num_beams": 2},
    "three beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "four sampled beams, all returned": {
        "num_beams": 4,
        "num_return_sequences": 4,
        "do_sample": True,
    },
    "a prompt in chunks of 5": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": "another model"},
}


@pytest.mark.parametrize("attention", ["sdpa", "paged"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_each_way_to_generate_gives_the_tokens_of_dynamic_cache(architecture, way, attention):
    options = dict(WAYS[way])
    for dtype in (torch.float64, torch.float32):
        model = model_of(architecture, dtype)
        inputs = left_padded(RAGGED)
        if way in ("prompt lookup", "assisted"):
            inputs = REPEATED
        if way == "assisted":
            options["assistant_model"] = model_of(architecture, dtype, seed=1)
        assert_same_as_dynamic_cache(model, inputs, attention, **options)


@pytest.mark.parametrize("attention", ["sdpa", "paged"])
def test_batches_of_1_to_8_ragged_rows_give_the_tokens_of_dynamic_cache(attention):
    lengths = [7, 2, 11, 1, 5, 16, 4, 9]
    for batch_size in range(1, 9):
        inputs = left_padded(lengths[:batch_size], seed=batch_size)
        assert_same_as_dynamic_cache(model_of("llama"), inputs, attention, max_new_tokens=6)


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_every_backend_of_this_machine_gives_the_tokens_of_dynamic_cache(backend):
    missing = BACKENDS[backend].missing
    if missing or BACKENDS[backend].device not in (None, "cpu"):
        pytest.skip(f"{backend} does not run here")
    cache = assert_same_as_dynamic_cache(
        model_of("llama"), left_padded([6, 3]), "paged", backend, max_new_tokens=5
    )
    assert cache.backend == backend
    assert cache.counts == {"paged": 10, "gather": 0}  # 5 forwards of 2 layers


@pytest.mark.parametrize("attention", ["sdpa", "paged"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_logits_in_bfloat16_are_as_close_as_its_rounding(architecture, attention):
    model = model_of(architecture, torch.bfloat16)
    ids = left_padded([11, 11])["input_ids"]
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    dense = DynamicCache(config=model.config)
    for piece in (ids[:, :7], ids[:, 7:10], ids[:, 10:]):
        model.set_attn_implementation("sdpa")
        expected = forward(model, piece, dense)
        model.set_attn_implementation(attention)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = forward(model, piece, cache)
        # 8 bits of mantissa: one step of rounding of a logit of 16 is 0.125
        bound = 0.5 if attention == "paged" else 0
        torch.testing.assert_close(logits, expected, rtol=0, atol=bound)
    assert expected.std() > 1
    assert cache.counts["paged" if attention == "paged" else "gather"] == 6


# ---- what the kernels lack -----------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "paged"])
def test_a_sliding_window_is_gathered_as_soon_as_a_row_is_longer(attention):
    model = model_of("mistral")
    inputs = left_padded([4, 7])
    dense = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    expected, expected_logits = generate(model, inputs, dense)
    model.set_attn_implementation(attention)
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    tokens, logits = generate(model, inputs, cache)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.stack(logits), torch.stack(expected_logits))
    # 12 forwards of 2 layers; rows of 7, 8, 9 and 10 tokens are within the window of 10
    in_place = 8 if attention == "paged" else 0
    assert cache.counts == {"paged": in_place, "gather": 24 - in_place}


def test_soft_caps_are_computed_by_the_attention_of_the_models_own_file():
    model = model_of("gemma2")
    ids = left_padded([9])["input_ids"]
    model.set_attn_implementation("eager")
    expected = forward(model, ids, DynamicCache(config=model.config))
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    with pytest.warns(UserWarning, match="asks for softcap, which the kernels lack"):
        logits = forward(model, ids, cache)
    torch.testing.assert_close(logits, expected)
    assert cache.counts == {"paged": 0, "gather": 2}
    # Another cache has no blocks to read: the same dense attention, soft caps included.
    torch.testing.assert_close(forward(model, ids, DynamicCache(config=model.config)), expected)


def test_a_mask_with_a_hole_is_read_from_gathered_keys():
    model = model_of("gpt2")
    ids = left_padded([8, 8])["input_ids"]
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 3] = 0
    model.set_attn_implementation("sdpa")
    expected = forward(model, ids, DynamicCache(), mask)
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    with pytest.warns(UserWarning, match="asks for this mask, which the kernels lack"):
        logits = forward(model, ids, cache, mask)
    assert torch.equal(logits, expected)
    assert cache.counts == {"paged": 0, "gather": 2}
    assert torch.equal(forward(model, ids, DynamicCache(), mask), expected)


def test_a_model_that_changes_its_keys_before_attention_sees_all_of_them():
    model = model_of("llama")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    k, v = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    cache.update(k, v, 0)
    keys, values = cache.update(k, v, 0)
    assert type(keys) is InPlace
    with pytest.warns(UserWarning, match="changes keys or values"):
        doubled = keys * 2
    assert torch.equal(doubled, torch.cat([k, k], dim=2) * 2)
    assert values.shape == (3, 2, 10, 8)
    assert torch.equal(torch.cat([values, v], dim=2), torch.cat([v, v, v], dim=2))


def test_attention_of_the_last_query_alone_reads_everything():
    """Some models drop all queries but the last one in their last layer."""
    model = model_of("gpt2")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    module = model.transformer.h[0].attn
    expected, _ = paged_attention_forward(module, q[:, :, -1:], k, v, None)
    keys, values = cache.update(k, v, 0)
    with pytest.warns(UserWarning, match="asks for this mask"):
        result, _ = paged_attention_forward(module, q[:, :, -1:], keys, values, None)
    assert torch.equal(result, expected)
    result, _ = paged_attention_forward(module, q, keys, values, None)
    torch.testing.assert_close(result[:, -1:], expected)
    assert cache.counts == {"paged": 1, "gather": 1}


def test_the_warning_that_paged_is_faster_is_given_once():
    model = model_of("gpt2")
    model.set_attn_implementation("sdpa")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for token in range(4):
            forward(model, torch.tensor([[token]]), cache)
    assert len(caught) == 1
    assert 'set_attn_implementation("paged")' in str(caught[0].message)


# ---- rows, blocks, copies ------------------------------------------------------------------------
def test_17_tokens_of_two_rows_hold_10_blocks_of_4():
    model = model_of("llama")
    kv_cache, allocator = pool_for(model, 20)
    cache = PagedCache(kv_cache, allocator, model.config)
    model.set_attn_implementation("paged")
    forward(model, left_padded([17, 17])["input_ids"], cache)
    assert cache.num_blocks_held == 10
    assert allocator.num_free == 10
    # 10 blocks of 4 tokens, K and V, 2 layers, 2 heads of 8 numbers of 8 bytes
    assert cache.bytes_held == 10 * 4 * 2 * 2 * 2 * 8 * 8
    cache.crop(-1)
    assert (cache.get_seq_length(), cache.num_blocks_held) == (16, 8)
    cache.crop(5)
    assert (cache.get_seq_length(), cache.num_blocks_held) == (5, 4)
    cache.reset()
    assert (cache.get_seq_length(), cache.num_blocks_held) == (0, 0)


def test_256_tokens_and_more_hold_at_most_a_tenth_more_bytes_than_they_need():
    model = model_of("llama", torch.float32)
    model.set_attn_implementation("paged")
    cache = PagedCache.for_model(model, num_blocks=80, block_size=16)
    k = torch.randn(4, 2, 256, 8)
    for length in range(256, 290):
        for layer in range(2):
            cache.update(k, k, layer)
        own = 2 * 4 * 2 * length * 8 * 4 * 2  # K and V, rows, heads, tokens, D, bytes, layers
        assert own <= cache.bytes_held <= 1.1 * own
        k = k[:, :, :1]


def test_beams_share_the_blocks_of_their_prompt():
    model = model_of("llama")
    cache = assert_same_as_dynamic_cache(
        model, left_padded([16]), "paged", num_beams=4, max_new_tokens=8
    )
    # The prompt's blocks once: of 4 x 6 entries of the tables at most 4 + 4 x 2 blocks differ.
    assert cache.num_blocks_held <= 12
    assert cache.tables.table.shape == (4, 6)


@pytest.mark.parametrize("num_tokens, num_free", [(7, 15), (8, 16)])
def test_a_deep_copy_shares_blocks_until_one_of_the_two_writes(num_tokens, num_free):
    """7 tokens: the second block has room for one more, and the first to write copies it."""
    model = model_of("llama")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    first = PagedCache(kv_cache, allocator, model.config)
    ids = left_padded([num_tokens])["input_ids"]
    forward(model, ids, first)
    second = copy.deepcopy(first)
    assert allocator.num_free == 18
    one = forward(model, torch.tensor([[5, 6]]), first)
    two = forward(model, torch.tensor([[8, 9]]), second)
    for new, logits in (([5, 6], one), ([8, 9], two)):
        whole = torch.cat([ids, torch.tensor([new])], dim=1)
        expected = forward(model, whole, DynamicCache(config=model.config))[:, -2:]
        torch.testing.assert_close(logits, expected)
    assert first.tables.table[0, 0] == second.tables.table[0, 0]
    assert allocator.num_free == num_free
    allocator.check_integrity(first.tables.table.tolist() + second.tables.table.tolist())
    first.release()
    second.release()
    allocator.check_integrity([])


def test_selected_and_repeated_rows_continue_as_the_rows_they_were():
    model = model_of("gpt2")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 40)
    cache = PagedCache(kv_cache, allocator, model.config)
    dense = DynamicCache(config=model.config)
    ids = left_padded([6, 6, 6])["input_ids"]
    forward(model, ids, cache)
    forward(model, ids, dense)
    changes = [
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([5, 0, 0, 2])),
        ("reorder_cache", torch.tensor([3, 3, 1, 0])),
        ("batch_select_indices", torch.tensor([True, False, True, True])),
        ("crop", -3),
    ]
    for step, (method, argument) in enumerate(changes):
        getattr(cache, method)(argument)
        getattr(dense, method)(argument)
        allocator.check_integrity(cache.tables.table.tolist())
        B = cache.tables.table.shape[0]
        new = torch.arange(2 * B).view(B, 2) + 7 * step
        torch.testing.assert_close(forward(model, new, cache), forward(model, new, dense))
        for mine, theirs in zip(cache.layers, dense.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys)
            torch.testing.assert_close(mine.values, theirs.values)
    allocator.check_integrity(cache.tables.table.tolist())


def test_tokens_that_were_dropped_leave_no_trace():
    """Every length, every number of dropped tokens, at blocks of 4: then the same continuation."""
    model = model_of("llama")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 20)
    ids = left_padded([13])["input_ids"]
    expected = forward(model, ids, DynamicCache(config=model.config))
    for dropped in range(1, 10):
        with PagedCache(kv_cache, allocator, model.config) as cache:
            forward(model, ids[:, :9], cache)
            cache.crop(-dropped)
            logits = forward(model, ids[:, 9 - dropped :], cache)
            torch.testing.assert_close(logits, expected[:, 9 - dropped :])
    allocator.check_integrity([])


# ---- several caches, one pool --------------------------------------------------------------------
def test_two_caches_in_two_threads_over_one_pool_do_not_meet():
    model = model_of("llama")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 40)
    batches = [left_padded([5, 3], seed=1)["input_ids"], left_padded([9], seed=2)["input_ids"]]
    expected = [forward(model, ids, DynamicCache(config=model.config)) for ids in batches]
    failures = []

    def work(ids, expected):
        try:
            for _ in range(15):
                with PagedCache(kv_cache, allocator, model.config) as cache:
                    pieces = [forward(model, ids[:, t : t + 1], cache) for t in range(len(ids[0]))]
                torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    allocator.check_integrity([])


def test_500_caches_leave_no_block_behind_however_they_end():
    model = model_of("gpt2", torch.float32)
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 8)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for i in range(500):
        cache = PagedCache(kv_cache, allocator, model.config)
        forward(model, ids, cache)
        assert allocator.num_free == 6
        if i % 4 == 0:
            cache.release()
        elif i % 4 == 1:
            with cache:
                pass
        elif i % 4 == 2:
            cache.itself = cache  # a cycle: only the garbage collector can find it
            del cache
            gc.collect(0)
        else:
            del cache
        allocator.check_integrity([])


# ---- errors --------------------------------------------------------------------------------------
def test_a_pool_that_is_exhausted_in_any_step_changes_nothing():
    """Another cache takes the pool's blocks at every step of a generation, then gives them back."""
    model = model_of("llama")
    model.set_attn_implementation("paged")
    ids = left_padded([13, 13])["input_ids"]
    expected = forward(model, ids, DynamicCache(config=model.config))
    failed = 0
    for step in range(13):
        kv_cache, allocator = pool_for(model, 12)
        cache = PagedCache(kv_cache, allocator, model.config)
        for t in range(step):
            forward(model, ids[:, t : t + 1], cache)
        taken = allocator.allocate(allocator.num_free)
        held = cache.tables.table.ravel().tolist()
        try:
            logits = forward(model, ids[:, step : step + 1], cache)
        except NoFreeBlocks as error:
            failed += 1
            assert "PagedCache: 2 rows" in str(error)
            assert "0 of 12 free" in str(error)
            assert [layer.length for layer in cache.layers] == [step, step]
            assert cache.tables.table.ravel().tolist() == held
            allocator.free(taken)
            logits = forward(model, ids[:, step : step + 1], cache)
        torch.testing.assert_close(logits, expected[:, step : step + 1])
        cache.release()
    assert failed == 4  # the steps that begin a block: 0, 4, 8, 12


def test_a_copy_on_write_without_a_free_block_changes_nothing():
    model = model_of("llama")
    model.set_attn_implementation("paged")
    kv_cache, allocator = pool_for(model, 2)
    cache = PagedCache(kv_cache, allocator, model.config)
    forward(model, torch.tensor([[5, 6, 7]]), cache)
    cache.batch_repeat_interleave(3)
    with pytest.raises(NoFreeBlocks, match="2 blocks asked for, 1 of 2 free"):
        forward(model, torch.tensor([[1], [2], [3]]), cache)
    allocator.check_integrity([[0], [0], [0]])
    cache.batch_select_indices(torch.tensor([0, 2]))  # two rows need one copy
    logits = forward(model, torch.tensor([[1], [3]]), cache)
    dense = DynamicCache(config=model.config)
    expected = forward(model, torch.tensor([[5, 6, 7, 1], [5, 6, 7, 3]]), dense)
    torch.testing.assert_close(logits, expected[:, -1:])


def test_a_released_cache_raises_one_clear_error():
    model = model_of("gpt2")
    cache = PagedCache.for_model(model, 8, BLOCK_SIZE)
    cache.release()
    cache.release()
    with pytest.raises(ValueError, match="was released: make a new one"):
        generate(model, REPEATED, cache)


def test_another_batch_without_a_reset_raises_one_clear_error():
    model = model_of("gpt2")
    cache = PagedCache.for_model(model, 40, BLOCK_SIZE)
    generate(model, left_padded([5, 3]), cache)
    with pytest.raises(ValueError, match="holds 2 rows and got 3: call reset"):
        generate(model, left_padded([5, 30, 4]), cache)
    cache.reset()
    assert cache.allocator.num_free == 40
    generate(model, left_padded([5, 30, 4]), cache)


@pytest.mark.parametrize("attention", ["sdpa", "paged"])
def test_a_step_that_ended_between_two_layers_is_noticed_by_the_next_one(attention, monkeypatch):
    model = model_of("gpt2")
    model.set_attn_implementation(attention)
    cache = PagedCache.for_model(model, 16, BLOCK_SIZE)
    ids = torch.arange(2, 9)[None]
    first = forward(model, ids, cache)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.transformer.h[1], "forward", interrupted)  # layer 0 has written
        forward(model, ids[:, :1], cache)
    with pytest.raises(ValueError, match="a step was interrupted: call reset"):
        forward(model, ids[:, :1], cache)
    cache.reset()
    assert cache.allocator.num_free == 16
    assert torch.equal(forward(model, ids, cache), first)


def test_keys_with_gradients_are_refused():
    model = model_of("gpt2")
    cache = PagedCache.for_model(model, 8, BLOCK_SIZE)
    k = torch.randn(1, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="torch.no_grad"):
        cache.update(k, k, 0)


def test_a_layer_that_differs_from_the_pool_is_refused():
    cache = PagedCache.for_model(model_of("llama", torch.float32), 8, BLOCK_SIZE)
    k = torch.randn(1, 2, 3, 8)
    cache.update(k, k, 0)
    with pytest.raises(ValueError, match="layer 1 has values of 2 heads of 4 .* 2 heads of 8"):
        cache.update(k, k[..., :4], 1)
    with pytest.raises(ValueError, match="layer 1 has keys of 4 heads of 8"):
        cache.update(k.repeat(1, 2, 1, 1), k, 1)
    with pytest.raises(ValueError, match="torch.float64"):
        cache.update(k.double(), k.double(), 1)


def test_a_pool_that_does_not_fit_is_refused():
    config = model_of("gpt2").config
    with pytest.raises(ValueError, match="the model has 2 layers, the pool 3"):
        PagedCache(KVCache(3, 8, 4, 4, 8), BlockAllocator(8, 4), config)
    with pytest.raises(ValueError, match="8 blocks of 2 tokens, the pool 8 of 4"):
        PagedCache(KVCache(2, 8, 4, 4, 8), BlockAllocator(8, 2), config)


@pytest.mark.parametrize(
    "config, why",
    [
        ("T5Config", "encoder-decoder"),
        ("BartConfig", "encoder-decoder"),
        ("WhisperConfig", "encoder-decoder"),
        ("MambaConfig", "more than keys and values"),
        ("Mamba2Config", "more than keys and values"),
        ("JambaConfig", "more than keys and values"),
        ("RecurrentGemmaConfig", "more than keys and values"),
        ("RwkvConfig", "more than keys and values"),
        ("Qwen3NextConfig", "more than keys and values"),
        ("FalconH1Config", "more than keys and values"),
        ("BambaConfig", "more than keys and values"),
    ],
)
def test_a_model_that_is_no_decoder_of_attention_layers_is_refused(config, why):
    kv_cache, allocator = KVCache(2, 8, 4, 4, 8), BlockAllocator(8, 4)
    with pytest.raises(ValueError, match=why):
        PagedCache(kv_cache, allocator, getattr(transformers, config)())
