"""`LLM`, and what it chooses: device, dtype, backend, tokenizer, the pool's size.

Small folders are written for most tests; a few use the shipped model, of which only properties are
asserted, never its words.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vocabularies import save_vocabulary

import llm as llm_module
from baselines import generate_no_cache
from checkpoints import load
from checkpoints.load import load_model
from checkpoints.tokenizer import END_OF_TEXT
from checkpoints.train_tiny import save_model
from engine import InferenceEngine
from kernels import backends
from kernels.backends import BACKENDS, resolve_backend, resolve_device, resolve_dtype
from kernels.triton_prefill import HAS_TRITON, INTERPRETED
from llm import LLM, SamplingParams, choose_num_blocks
from model import GPT, GPTConfig
from speedups.plan_ahead import AheadEngine

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SHAPE = {"vocab_size": 257, "max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
SHAPE |= {"tie_word_embeddings": False}  # its texts vary more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a tokenizer of 256 bytes; its file is in float16."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    config = GPTConfig(**SHAPE, eos_token_id=256)
    save_model(GPT(config).init_weights(std=0.2), folder, torch.float16)
    save_vocabulary(folder, merges=[])
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, num_blocks=32, block_size=4)


def assert_nothing_left(llm):
    """As if nothing had ever been asked."""
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    assert not llm.engine.has_unfinished()
    assert scheduler.running == [] and scheduler.num_waiting == 0
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks


def ids_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# ---- generate ------------------------------------------------------------------------------------
def test_generate_answers_in_the_order_of_the_prompts(llm):
    """The first asks for most and ends last."""
    prompts = ["a longer prompt than the others", "short", "x"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 1)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(ids) for ids in ids_of(outputs)] == [20, 3, 1]
    assert all(output.finished for output in outputs)
    assert ids_of(llm.generate(prompts, GREEDY)) == ids_of(llm.generate(prompts, [GREEDY] * 3))
    assert llm.generate([], GREEDY) == []
    assert len(ids_of(llm.generate("some text"))[0]) <= 16  # vLLM's defaults
    assert_nothing_left(llm)


REFUSED = [  # prompts, params, words
    (["one", "", "two"], GREEDY, "the prompt is empty"),
    (["one", "two", [257]], GREEDY, "token id 257"),
    (["one", "two", "three"], [GREEDY] * 2, "3 prompts but 2 sampling params"),
    (None, None, "given: prompts are text or lists, params SamplingParams"),
    ({"text": "a"}, None, r"a prompt has the keys \['text'\]: give 'prompt' or 'prompt_token_ids'"),
    ([[1.5, 2.0]], None, "token id 1.5: ids are integers"),
    ("a", {"n": 2}, "given: prompts are text or lists, params SamplingParams"),
]


@pytest.mark.parametrize("prompts, params, message", REFUSED, ids=lambda x: str(x)[:20])
def test_one_refused_prompt_among_many_leaves_nothing_behind(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert_nothing_left(llm)


def test_ctrl_c_in_the_middle_leaves_nothing_behind(folder):
    llm = LLM(folder, num_blocks=32, block_size=4, max_num_batched_tokens=6)
    want = ids_of(llm.generate(["one text", "another"], GREEDY))
    forward, calls = llm.engine.forward, iter(range(1, 1_000))

    def interrupted(batch):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return forward(batch)

    llm.engine.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one text", "another"], GREEDY)
    assert_nothing_left(llm)
    assert ids_of(llm.generate(["one text", "another"], GREEDY)) == want


def test_text_and_its_token_ids_are_the_same_prompt_and_one_prompt_needs_no_list(llm):
    text = "The cat"
    ids = llm.tokenizer.encode(text)
    as_text, as_ids = llm.generate([text, ids], GREEDY)
    assert as_text.outputs == as_ids.outputs
    assert as_text.prompt_token_ids == as_ids.prompt_token_ids == ids
    assert (as_text.prompt, as_ids.prompt) == (text, None)
    for alone in (llm.generate(text, GREEDY), llm.generate(ids, GREEDY)):
        assert ids_of(alone) == ids_of([as_text])


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7),
        np.array([5, 6, 7]),
        list(np.array([5, 6, 7])),
        torch.tensor([5, 6, 7]),
        {"prompt_token_ids": [5, 6, 7]},
        {"prompt_token_ids": (5, 6, 7), "prompt": "a text that stands for these ids"},
    ],
    ids=str,
)
def test_the_other_forms_in_which_vllm_takes_a_prompt(llm, prompt):
    expected = llm.generate([5, 6, 7], GREEDY)[0]
    for outputs in (llm.generate(prompt, GREEDY), llm.generate([prompt], GREEDY)):
        (output,) = outputs
        assert output.prompt_token_ids == [5, 6, 7] and output.outputs == expected.outputs
    (output,) = llm.generate({"prompt": "ab"}, GREEDY)
    assert output.prompt == "ab"
    both = llm.generate(np.array([[5, 6, 7], [8, 9, 10]]), GREEDY)
    assert [output.prompt_token_ids for output in both] == [[5, 6, 7], [8, 9, 10]]


# A token is a byte: "a" is 64, "b" 65, "c" 66, "x" 87.
WRITES_ABC = {"temperature": 0, "max_tokens": 6, "logit_bias": {"64": 90, "65": 60, "66": 30}}


def test_a_bad_word_is_not_written_neither_of_one_token_nor_of_several(llm):
    def written(**params):
        return llm.generate("q", SamplingParams(**WRITES_ABC | params))[0].outputs[0].text

    assert written() == "aaaaaa"
    assert written(bad_words=["a"]) == "bbbbbb"
    assert written(bad_words=["aa"]) == "ababab"
    assert written(bad_words=["aa", "b"]) == "acacac"
    assert written(bad_words=["aba"]) == "aaaaaa"  # a word of three tokens
    assert written(bad_words=["aaa", "qa"]) == "aabaab"  # what the prompt ends with is not written
    assert written(allowed_token_ids=[66, 87]) == "cccccc"
    assert written(allowed_token_ids=[66, 87], bad_words=["cc"]) == "cxcxcx"


def test_the_text_ends_with_its_stop_string_only_if_that_was_asked_for(llm):
    for more, text in (({}, "a"), ({"include_stop_str_in_output": True}, "aaa")):
        params = SamplingParams(**WRITES_ABC, stop=["aa", "b"], min_tokens=2, **more)
        (completion,) = llm.generate("q", params)[0].outputs
        assert (completion.text, completion.stop_reason) == (text, "aa")
        assert len(completion.token_ids) == 3


def test_special_tokens_leave_no_text_and_no_field_says_otherwise(llm):
    """As with vLLM's default, skip_special_tokens=True."""
    params = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    params |= {"logit_bias": {"256": 90, "64": 60}, "bad_words": [END_OF_TEXT * 2]}
    (completion,) = llm.generate("q", SamplingParams(**params))[0].outputs
    assert (completion.token_ids, completion.text) == ([256, 64, 256, 64], "aa")
    with pytest.raises(TypeError, match="unexpected keyword argument 'skip_special_tokens'"):
        SamplingParams(skip_special_tokens=False)


def test_minus_1_is_all_log_probabilities_and_a_seed_of_the_engines_choice(llm):
    params = SamplingParams(max_tokens=1, logprobs=-1, prompt_logprobs=-1, seed=-1)
    assert params.seed is None
    (output,) = llm.generate("ab", params)
    (entry,) = output.outputs[0].logprobs
    assert sorted(entry) == list(range(257)) == sorted(output.prompt_logprobs[1])
    assert sum(math.exp(value.logprob) for value in entry.values()) == pytest.approx(1)


def test_a_bad_word_without_a_tokenizer_and_no_allowed_token_are_refused(tiny_gpt):
    with pytest.raises(ValueError, match="a bad word needs a tokenizer"):
        LLM(tiny_gpt(), num_blocks=8).generate([1], SamplingParams(bad_words=["x"]))
    with pytest.raises(ValueError, match=r"allowed_token_ids is \[\]: it must be not empty"):
        SamplingParams(allowed_token_ids=[])
    with pytest.raises(ValueError, match=r"bad_words is \[' '\]: it must be a list of strings"):
        SamplingParams(bad_words=[" "])


def test_generate_refuses_to_mix_with_requests_that_were_added_by_hand(folder):
    llm = LLM(folder, num_blocks=32)
    ids = [output.request_id for _ in range(2) for output in llm.generate(["a", "b"], GREEDY)]
    request_id = llm.engine.add_request("by hand", GREEDY)
    assert len({*ids, request_id}) == 5  # each request has a new one
    with pytest.raises(ValueError, match="still has requests.*llm.engine.step"):
        llm.generate("another", GREEDY)
    assert llm.engine.has_unfinished()  # the first is still there
    assert llm.engine.abort(request_id)
    llm.engine.step()
    assert_nothing_left(llm)


def test_a_progress_bar_goes_to_stderr_only_if_asked_for(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err


# ---- the model -----------------------------------------------------------------------------------
def test_without_a_name_it_is_the_shipped_model(shipped_model_folder):
    llm = LLM(num_blocks=16)
    assert (llm.model_name, llm.weights) == (str(shipped_model_folder), "trained weights")
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))
    ids = output.outputs[0].token_ids
    assert len(set(ids)) > 3 and output.outputs[0].text == llm.tokenizer.decode(ids)
    end = llm.model.config.vocab_size - 1
    assert (llm.engine.eos_token_ids, llm.tokenizer.eos_token_id) == ((end,), end)


def test_a_gpt_object_is_served_as_it_is_with_token_ids(tiny_gpt):
    model = tiny_gpt(seed=5, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    llm = LLM(model, num_blocks=32, block_size=4)
    prompts = [[1, 2, 3], [4] * 9]
    assert ids_of(llm.generate(prompts, GREEDY)) == generate_no_cache(model, prompts, 6)
    assert llm.engine.cache.pool.dtype == torch.float64
    assert llm.weights == "given weights"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        llm.generate("text", GREEDY)
    for options in ({"dtype": "float32"}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="move or cast it first"):
            LLM(model, num_blocks=8, **options)


def test_a_gpt_object_that_drops_out_at_random_is_refused():
    model = GPT(GPTConfig(**SHAPE, dropout=0.1)).init_weights()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        LLM(model, num_blocks=8)
    assert LLM(model.eval(), num_blocks=8).generate([[1, 2]], GREEDY)


def test_random_shapes_say_that_their_weights_are_random(monkeypatch):
    monkeypatch.setitem(load.RANDOM_SHAPES, "gpt2", (2, 2, 32))
    llm = LLM("random:gpt2", num_blocks=8)
    assert (llm.model_name, llm.weights) == ("random:gpt2", "random weights")
    assert llm.tokenizer is None
    (output,) = llm.generate([[50256, 1]], GREEDY)
    assert len(output.outputs[0].token_ids) == 6 and output.outputs[0].text == ""


# ---- device, dtype, backend ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, dtype",
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_dtype_is_that_of_model_and_pool(folder, name, dtype):
    """The weights' file is in float16. On a CPU "auto" is float32."""
    llm = LLM(folder, device="cpu", dtype=name, num_blocks=32, block_size=4)
    assert {parameter.dtype for parameter in llm.model.parameters()} == {dtype}
    assert llm.engine.cache.pool.dtype == dtype
    outputs = llm.generate(["one", "a longer prompt", "x"], SamplingParams(seed=1, max_tokens=8))
    assert len({token_id for ids in ids_of(outputs) for token_id in ids}) > 3


def test_auto_is_the_gpu_where_there_is_one_and_bfloat16_where_it_has_it(monkeypatch):
    for sees_gpu, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees_gpu=sees_gpu: sees_gpu)
        assert resolve_device("auto") == torch.device(name)
    for has_bfloat16, want in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16: has)
        assert resolve_dtype("auto", torch.device("cuda")) == want
        assert resolve_dtype("float32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(
    ("options", "memory_gb", "want"),
    [
        ({}, None, 2048),  # no GPU
        ({}, 24, 2048),
        ({}, 80, 8192),
        ({"max_num_batched_tokens": 6}, 80, 6),
    ],
)
def test_a_step_has_more_tokens_on_a_large_gpu_where_no_number_is_given(
    options, memory_gb, want, tiny_gpt, monkeypatch
):
    if memory_gb:
        gpu = SimpleNamespace(total_memory=memory_gb * 1e9)
        default, device = llm_module.default_budget, torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        monkeypatch.setattr(llm_module, "default_budget", lambda _: default(device))
    llm = LLM(tiny_gpt(), num_blocks=8, **options)
    assert llm.config.max_num_batched_tokens == want
    assert llm.engine.scheduler.max_num_batched_tokens == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu': choose auto, cpu or cuda"),
        ({"device": "cuda"}, "'cuda', but PyTorch sees no GPU: use device='cpu'"),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float32, float64, bfloat16, float16"),
        (
            {"backend": "cublas"},
            "backend is 'cublas': choose auto, triton, triton-simple, numba, torch",
        ),
        ({"block_size": 0}, "block_size is 0: it must be an integer of at least 1"),
        ({"max_seq_len": 65}, "max_seq_len is 65, the model has 64 positions"),
        ({"max_seq_len": 0}, "max_seq_len is 0: it must be"),
        ({"num_blocks": 0}, "num_blocks is 0: it must be"),
        ({"threads": 0}, "threads is 0: it must be an integer of at least 1"),
        ({"cuda_graphs": None}, "cuda_graphs is None: it must be True or False"),
        ({"plan_ahead": 1}, "plan_ahead is 1: it must be True or False"),
        ({"fused": "yes"}, "fused is 'yes': it must be True or False"),
        ({"backend": "torch", "fused": True}, "fused is for backend triton, it is torch"),
        ({"few_rows": True}, "few_rows is True: it must be an integer of at least 0"),
        ({"few_rows": -1}, "few_rows is -1: it must be an integer of at least 0"),
        ({"few_rows": 2}, "few_rows is 2: it needs fused=True"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(
    monkeypatch, folder, options, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message) as refusal:
        LLM(folder, **options)
    assert "\n" not in str(refusal.value)
    with pytest.raises(TypeError, match="num_block"):
        LLM(folder, num_block=8)  # no option of this name


HERE = torch.device("cpu")
NUMBA_OR_TORCH = "torch" if BACKENDS["numba"].missing else "numba"


def count_calls(monkeypatch):
    """The names of the backends whose kernels run from now on, a write and a read each."""
    calls = []

    def counting(name, kind, kernel):
        def counted(*args, **kwargs):
            calls.append((name, kind))
            return kernel(*args, **kwargs)

        return counted

    for name, backend in BACKENDS.items():
        kernels = backend.load()
        counted = backends.Kernels(
            paged_attention=counting(name, "read", kernels.paged_attention),
            write_kv=counting(name, "write", kernels.write_kv),
        )
        monkeypatch.setitem(BACKENDS, name, backend._replace(load=lambda counted=counted: counted))
    return calls


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_backend_that_was_named_is_the_one_that_runs(monkeypatch, folder, backend):
    if backend != "auto" and BACKENDS[backend].missing:
        pytest.skip(f"{backend} is not installed")
    if backend != "auto" and BACKENDS[backend].device not in (None, "cpu"):
        pytest.skip(f"{backend} does not run on a CPU")
    calls = count_calls(monkeypatch)
    llm = LLM(folder, backend=backend, device="cpu", num_blocks=8)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    ids = ids_of(llm.generate("abc", params))
    prompts = [llm.tokenizer.encode("abc")]
    assert ids == generate_no_cache(load_model(folder, torch.float32), prompts, 3)
    assert llm.backend == (NUMBA_OR_TORCH if backend == "auto" else backend)
    # Three steps of two layers.
    assert calls == [(llm.backend, "write"), (llm.backend, "read")] * (3 * 2)


def test_a_dtype_that_a_backend_lacks_goes_to_the_next_one_and_says_so_once(monkeypatch, folder):
    if BACKENDS["numba"].missing:
        pytest.skip("numba is not installed")
    calls = count_calls(monkeypatch)
    with pytest.warns(UserWarning, match="'numba' has no float16: 'torch' is used") as said:
        llm = LLM(folder, backend="auto", device="cpu", dtype="float16", num_blocks=8)
        llm.generate("abc", SamplingParams(temperature=0, max_tokens=3))
    assert llm.backend == "torch" and {name for name, _ in calls} == {"torch"}
    assert len([one for one in said if "float16" in str(one.message)]) == 1


def stand_in(monkeypatch, **changes):
    """BACKENDS as another machine would have it: `numba={"library": "absent"}`."""
    changes["triton-simple"] = changes.get("triton", {"device": "cuda"})
    for name, change in changes.items():
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(**change))
    monkeypatch.setattr(backends, "INTERPRETED", False)


def test_auto_takes_the_fastest_that_the_machine_has(monkeypatch):
    gpu = torch.device("cuda")
    triton = {"library": None, "device": "cuda"}
    stand_in(monkeypatch, numba={"library": None}, triton=triton)
    assert resolve_backend("auto", gpu, torch.bfloat16) == "triton"
    assert resolve_backend("auto", HERE, torch.bfloat16) == "numba"
    assert resolve_backend("torch", gpu, torch.bfloat16) == "torch"
    stand_in(monkeypatch, numba={"library": "absent"}, triton={"library": "absent"})
    for device in (HERE, gpu):
        assert resolve_backend("auto", device, torch.float32) == "torch"


@pytest.mark.parametrize(
    ("name", "change", "device", "message"),
    [
        ("numba", {"library": "absent"}, "cpu", "'numba' needs absent, which is not installed"),
        ("numba", {"library": None}, "cuda", "'numba' runs on cpu, the model is on cuda"),
        ("triton", {"device": "cuda"}, "cpu", "runs on cuda, the model is on cpu"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(monkeypatch, name, change, device, message):
    stand_in(monkeypatch, **{name: change})
    with pytest.raises(ValueError, match=message):
        resolve_backend(name, torch.device(device), torch.float32)


def test_interpreted_kernels_run_only_if_they_are_named(monkeypatch):
    if BACKENDS["triton"].missing:
        pytest.skip("triton is not installed")
    assert backends.INTERPRETED == INTERPRETED  # what Triton decided when it was imported
    stand_in(monkeypatch, triton={"device": "cpu"})
    monkeypatch.setattr(backends, "INTERPRETED", True)
    assert resolve_backend("auto", HERE, torch.float32) == NUMBA_OR_TORCH
    assert resolve_backend("triton", HERE, torch.float32) == "triton"


# ---- the pool ------------------------------------------------------------------------------------
def test_the_pool_has_the_blocks_that_were_asked_for_and_a_scratch_block(folder):
    llm = LLM(folder, num_blocks=11, block_size=4)
    assert llm.engine.scheduler.allocator.num_blocks == llm.config.num_blocks == 11
    assert llm.engine.cache.pool.shape == (2, 12, 2, 2, 4, 16)  # layers, blocks, K V, H, size, D


@pytest.mark.parametrize(
    "options, num_blocks",
    [
        # A token's K and V: 2 * 2 layers * 32 numbers of 4 bytes, 512 bytes; a block of 4 is 2,048.
        ({"kv_cache_mb": 0.1, "block_size": 4}, 48),  # 100,000 // 2,048
        ({"kv_cache_mb": 0.1, "block_size": 4, "dtype": "bfloat16"}, 97),
        # Measured, and no larger than all sequences can fill.
        ({"max_num_seqs": 3, "block_size": 16}, 3 * (64 // 16)),
        ({"max_num_seqs": 3, "block_size": 16, "max_seq_len": 40}, 3 * 3),  # 40 tokens: 3 blocks
    ],
    ids=str,
)
def test_the_pools_size_is_given_in_bytes_or_measured(folder, options, num_blocks):
    llm = LLM(folder, device="cpu", **options)
    assert llm.engine.scheduler.allocator.num_blocks == num_blocks


def test_a_shorter_max_seq_len_ends_texts_earlier(folder):
    llm = LLM(folder, num_blocks=16, max_seq_len=20)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([[5] * 8], params)
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="prompt has 20 tokens, max_seq_len is 20: shorten it"):
        llm.generate([[5] * 20], params)


def test_the_engines_seed_makes_two_llms_write_the_same(folder):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first, again, other = (
        ids_of(LLM(folder, num_blocks=32, seed=seed).generate(["a", "b"], params))
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_policy_and_a_reservation_can_be_given(folder):
    """Last come first served, and each sequence reserves all that it may ever need."""

    def reserve(seq):
        return seq.num_prompt_tokens + seq.max_tokens

    pool = {"num_blocks": 8, "block_size": 4}
    llm = LLM(folder, **pool, reserve=reserve, policy=lambda seq: -seq.request.arrival)
    for _ in range(3):
        llm.engine.add_request([1, 2, 3, 4], SamplingParams(max_tokens=12))  # two of 16 fit
    llm.engine.step()
    running = [
        (seq.request.request_id, len(seq.block_table)) for seq in llm.engine.scheduler.running
    ]
    assert running == [("2", 4), ("1", 4)]


@pytest.mark.parametrize(
    "config, generation, named, ends",
    [
        (255, None, END_OF_TEXT, (255, 256)),  # the tokenizer has 256
        ([254, 255], None, END_OF_TEXT, (254, 255, 256)),
        (255, [253, 254, 50256], END_OF_TEXT, (253, 254, 255, 256)),
        (None, 253, None, (253,)),
        (None, None, None, ()),
    ],
)
def test_what_ends_a_text_is_what_config_generation_config_and_tokenizer_say(
    folder, tmp_path, config, generation, named, ends
):
    copy_folder(folder, tmp_path, config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    llm = LLM(tmp_path, num_blocks=16)
    assert llm.engine.eos_token_ids == ends
    for end in ends:
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias={end: 100})
        assert llm.generate("abc", params)[0].outputs[0].token_ids == [end]
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias={end: 100}, ignore_eos=True)
        assert llm.generate("abc", params)[0].outputs[0].token_ids == [end] * 3


def test_an_end_that_is_no_integer_is_refused_by_its_file(folder, tmp_path):
    copy_folder(folder, tmp_path, 256)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, "2"]}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is neither an int"):
        LLM(tmp_path, num_blocks=16)


def copy_folder(folder, target, eos_token_id):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text()) | {"eos_token_id": eos_token_id}
    (target / "config.json").write_text(json.dumps(config))


def test_a_model_that_names_no_end_of_text_writes_up_to_max_tokens(folder, tmp_path):
    copy_folder(folder, tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    llm = LLM(tmp_path, num_blocks=16)
    always_256 = SamplingParams(temperature=0, max_tokens=5, logit_bias={256: 100})
    (output,) = llm.generate("abc", always_256)
    assert output.outputs[0].token_ids == [256] * 5
    assert output.outputs[0].finish_reason == "length"


def test_threads_are_left_alone_unless_they_are_given(folder):
    before = torch.get_num_threads()
    try:
        LLM(folder, num_blocks=8, threads=before + 1)
        assert torch.get_num_threads() == before + 1
        LLM(folder, num_blocks=8)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# ---- where the model comes from ------------------------------------------------------------------
def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    save_model(GPT(GPTConfig(**SHAPE)).init_weights(), tmp_path, torch.float32)
    save_vocabulary(tmp_path, merges=[(b"a", b"b"), (b"c", b"d")])
    expected = f"{tmp_path}: the tokenizer has 258 tokens, and the model has 257 rows"
    with pytest.raises(ValueError, match=expected):
        LLM(tmp_path)


def test_a_token_that_was_added_to_the_tokenizer_alone_is_refused_only_in_a_prompt(tmp_path):
    save_model(GPT(GPTConfig(**SHAPE)).init_weights(std=0.2), tmp_path, torch.float32)
    save_vocabulary(tmp_path, merges=[])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 257}))
    llm = LLM(tmp_path, num_blocks=16)
    assert len(llm.generate("abc", GREEDY)[0].outputs[0].token_ids) == 6
    with pytest.raises(ValueError, match="token id 257"):
        llm.generate("abc[PAD]", GREEDY)


@pytest.mark.parametrize("vocab_size", [257, 50257, 50304])
def test_a_model_of_gpt2s_vocabulary_without_files_gets_tiktokens_own(
    vocab_size, folder, tmp_path, monkeypatch
):
    ours = llm_module.load_tokenizer(folder)
    monkeypatch.setattr(llm_module, "gpt2_tokenizer", lambda: ours)
    found = llm_module.find_tokenizer(tmp_path, vocab_size)
    assert (found is ours) == (vocab_size != 257)
    assert (llm_module.find_tokenizer(None, vocab_size) is ours) == (vocab_size != 257)
    for path in (folder, folder / "model.safetensors"):  # files beside the weights come first
        beside = llm_module.find_tokenizer(path, vocab_size)
        assert beside is not ours and beside.vocab_size == 257


# ---- how steps are run ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"plan_ahead": True},
        pytest.param(
            {"plan_ahead": True, "fused": True, "backend": "triton"},
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="interpreted Triton"),
            ],
        ),
    ],
    ids=str,
)
def test_steps_that_are_planned_ahead_or_joined_write_the_same_texts(folder, options):
    texts = []
    for config in ({}, options):
        llm = LLM(folder, dtype="float64", num_blocks=24, block_size=4, max_num_seqs=5, **config)
        prompts = [[n, 2 * n, 3 * n] for n in range(1, 9)]
        params = [SamplingParams(temperature=n % 2, seed=n, max_tokens=5 + n) for n in range(8)]
        texts.append(ids_of(llm.generate(prompts, params)))
        assert type(llm.engine) is (AheadEngine if config else InferenceEngine)
        assert llm.config.fused == config.get("fused", False)
        assert_nothing_left(llm)
    assert texts[0] == texts[1] and len({token for text in texts[0] for token in text}) > 8


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="Triton's interpreter is needed")
def test_few_rows_reach_the_joined_forward(monkeypatch, folder):
    given = []
    monkeypatch.setattr(
        "kernels.triton_fused.fused_forward",
        lambda model, cache, otherwise, few_rows: given.append(few_rows) or otherwise,
    )
    for few_rows in (0, 2, 16):
        LLM(folder, backend="triton", num_blocks=8, fused=True, few_rows=few_rows)
    assert given == [0, 2, 16]


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="Triton's interpreter is needed")
def test_a_model_whose_steps_cannot_be_joined_is_refused_with_the_reason():
    model = GPT(GPTConfig(**SHAPE, activation_function="relu")).eval()
    with pytest.raises(ValueError, match="this model's steps can't be joined: "):
        LLM(model, backend="triton", fused=True)


# ---- how large a pool ----------------------------------------------------------------------------
BLOCK_BYTES = 589_824  # a block of 16 tokens of GPT-2 in 16 bits


def test_a_pool_of_exactly_k_blocks_of_bytes_holds_k_blocks():
    # 66.650112 * 1e6 is 66650111.99999999 in floating point: 113 blocks, not 112.
    for k in range(1, 2000):
        assert choose_num_blocks(589_824, 1, kv_cache_mb=k * 589_824 / 10**6) == k


POOLS = {  # bytes of a block, free bytes, options -> blocks, or the words of the refusal
    "num_blocks": (BLOCK_BYTES, 2**40, {"num_blocks": 100}, 100),
    "a megabyte is a million bytes": (1_000_000, 2**40, {"kv_cache_mb": 7}, 7),
    "rounded down": (1_000_001, 2**40, {"kv_cache_mb": 7}, 6),
    "a quarter of what is free": (BLOCK_BYTES, 2**30, {}, 455),  # 2**28 // 589,824
    "never more than 1 GiB": (BLOCK_BYTES, 2**40, {}, 1820),
    "never more than is useful": (BLOCK_BYTES, 2**40, {"most_useful": 512}, 512),
    "one block": (BLOCK_BYTES, 4 * BLOCK_BYTES, {}, 1),
    "a GPU's share": (BLOCK_BYTES, 100 * BLOCK_BYTES, {"device": "cuda"}, 90),
    "another share": (
        BLOCK_BYTES,
        100 * BLOCK_BYTES,
        {"device": torch.device("cuda"), "gpu_memory_utilization": 0.25},
        25,
    ),
    "two sizes": (BLOCK_BYTES, 2**40, {"num_blocks": 8, "kv_cache_mb": 64}, "both size the pool"),
    "no block": (BLOCK_BYTES, 2**40, {"num_blocks": 0}, "num_blocks is 0: the pool needs at least"),
    "no block in MB": (BLOCK_BYTES, 2**40, {"kv_cache_mb": 0.5}, "holds no block: one takes 0.590"),
    "no room": (
        BLOCK_BYTES,
        BLOCK_BYTES,
        {},
        "one block takes 1 MB, 0 MB may be used: lower block",
    ),
    "no room for the scratch block": (
        BLOCK_BYTES,
        BLOCK_BYTES * 5 // 2,
        {"num_blocks": 2},
        "the pool needs 2 MB, 1 MB are free: lower num_blocks",
    ),
}


@pytest.mark.parametrize("block_bytes, free_bytes, options, expected", POOLS.values(), ids=POOLS)
def test_the_pools_size_is_as_given_or_from_the_free_memory(
    monkeypatch, block_bytes, free_bytes, options, expected
):
    monkeypatch.setattr(llm_module, "free_memory_bytes", lambda device: free_bytes)
    options = {"most_useful": 10**6} | options
    if isinstance(expected, int):
        assert choose_num_blocks(block_bytes, **options) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            choose_num_blocks(block_bytes, **options)
