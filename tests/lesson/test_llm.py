"""The face that vLLM's users know, and the choices behind it: device, dtype, backend, pool.

Small folders are written for most tests; a few use the shipped model, of which only properties are
asserted, never its words.
"""

import copy
import json

import pytest
import torch

import llm as llm_module
from baselines import generate_no_cache
from checkpoints import load
from checkpoints.load import load_model, save_model
from checkpoints.tokenizer import save_vocabulary
from engine import InferenceEngine
from kernels import backends
from kernels.backends import BACKENDS, resolve_backend, resolve_device, resolve_dtype
from kernels.triton_prefill import HAS_TRITON, INTERPRETED
from llm import LLM, RequestOutput, SamplingParams, choose_num_blocks
from model import GPT, GPTConfig
from outputs import CompletionOutput
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
def ids_only(tmp_path_factory):
    """The same without tokenizer files."""
    folder = tmp_path_factory.mktemp("without_tokenizer")
    config = GPTConfig(**SHAPE, eos_token_id=256)
    save_model(GPT(config).init_weights(std=0.2), folder, torch.float16)
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
    assert_nothing_left(llm)


def test_params_are_one_for_all_prompts_or_one_each_or_vllms_defaults(llm):
    prompts = ["one", "two", "three"]
    assert ids_of(llm.generate(prompts, GREEDY)) == ids_of(llm.generate(prompts, [GREEDY] * 3))
    assert llm.generate([], GREEDY) == []
    (output,) = llm.generate("some text")
    assert len(output.outputs) == 1 and len(output.outputs[0].token_ids) <= 16
    with pytest.raises(ValueError, match="3 prompts but 2 sampling params"):
        llm.generate(prompts, [GREEDY] * 2)
    assert_nothing_left(llm)


def test_text_and_its_token_ids_are_the_same_prompt_and_one_prompt_needs_no_list(llm):
    text = "The cat"
    ids = llm.tokenizer.encode(text)
    as_text, as_ids = llm.generate([text, ids], GREEDY)
    assert as_text.outputs == as_ids.outputs
    assert as_text.prompt_token_ids == as_ids.prompt_token_ids == ids
    assert (as_text.prompt, as_ids.prompt) == (text, None)
    for alone in (llm.generate(text, GREEDY), llm.generate(ids, GREEDY)):
        assert ids_of(alone) == ids_of([as_text])


def test_the_tokens_are_those_of_the_model_without_a_cache(folder):
    llm = LLM(folder, dtype="float64", num_blocks=32)
    prompts = [llm.tokenizer.encode(text) for text in ("one", "a longer one", "x")]
    want = generate_no_cache(load_model(folder, torch.float64), prompts, 12, eos_token_id=256)
    params = SamplingParams(temperature=0, max_tokens=12)
    assert ids_of(llm.generate(prompts, params)) == want
    assert max(len(set(ids)) for ids in want) > 3


def test_an_output_is_vllms_request_output(llm):
    params = SamplingParams(n=2, seed=1, max_tokens=5, logprobs=1, prompt_logprobs=0)
    (output,) = llm.generate(["abc"], params)
    assert isinstance(output, RequestOutput) and output.finished
    assert output.prompt == "abc" and len(output.prompt_token_ids) == 3
    assert len(output.prompt_logprobs) == 3 and output.prompt_logprobs[0] is None
    assert output.metrics.arrival_time <= output.metrics.finished_time
    for index, completion in enumerate(output.outputs):
        assert isinstance(completion, CompletionOutput) and completion.index == index
        assert isinstance(completion.text, str)
        assert len(completion.logprobs) == len(completion.token_ids) <= 5
        assert completion.cumulative_logprob < 0
        assert completion.finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    "place, bad", [(0, ""), (1, []), (2, [257]), (1, [3] * 64), (2, 7)], ids=lambda x: str(x)[:12]
)
def test_one_refused_prompt_among_many_leaves_nothing_behind(llm, place, bad):
    prompts = ["one", "two"]
    prompts.insert(place, bad)
    with pytest.raises(ValueError):
        llm.generate(prompts, GREEDY)
    assert_nothing_left(llm)
    assert len(llm.generate("and it still works", GREEDY)) == 1


@pytest.mark.parametrize("at_step", [1, 5])
def test_ctrl_c_in_the_middle_leaves_nothing_behind(folder, at_step):
    llm = LLM(folder, num_blocks=32, block_size=4, max_num_batched_tokens=6)
    want = ids_of(llm.generate(["one text", "another"], GREEDY))
    forward = llm.engine.forward
    calls = iter(range(1, 1_000))

    def interrupted(batch):
        if next(calls) == at_step:
            raise KeyboardInterrupt
        return forward(batch)

    llm.engine.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one text", "another"], GREEDY)
    assert_nothing_left(llm)
    assert ids_of(llm.generate(["one text", "another"], GREEDY)) == want


def test_generate_refuses_to_mix_with_requests_that_were_added_by_hand(folder):
    llm = LLM(folder, num_blocks=32)
    ids = [output.request_id for _ in range(2) for output in llm.generate(["a", "b"], GREEDY)]
    request_id = llm.engine.add_request("by hand", GREEDY)
    assert len({*ids, request_id}) == 5  # each request has a new one
    with pytest.raises(ValueError, match="still has requests.*llm.engine.step"):
        llm.generate("another", GREEDY)
    assert llm.engine.has_unfinished()  # the first is still there
    assert llm.engine.abort(request_id)
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
    assert llm.model_name == str(shipped_model_folder)
    assert llm.weights == "trained weights"
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))
    ids = output.outputs[0].token_ids
    assert len(set(ids)) > 3  # it writes, whatever it writes
    assert output.outputs[0].text == llm.tokenizer.decode(ids)
    assert llm.engine.eos_token_id == llm.tokenizer.eos_token_id == llm.model.config.vocab_size - 1


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
    with pytest.raises(
        ValueError, match="a text prompt needs a tokenizer, and this model has none"
    ):
        llm.generate("text")


def test_a_folder_without_tokenizer_files_serves_token_ids_and_refuses_text(folder, ids_only):
    with_text, without = LLM(folder, num_blocks=16), LLM(ids_only, num_blocks=16)
    prompt = with_text.tokenizer.encode("abc")
    (want,), (got,) = with_text.generate([prompt], GREEDY), without.generate([prompt], GREEDY)
    assert got.outputs[0].token_ids == want.outputs[0].token_ids
    assert got.outputs[0].text == "" and got.prompt is None
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer, and this model has no"):
        without.generate("text")
    with pytest.raises(ValueError, match="a stop string needs a tokenizer, and this model has no"):
        without.generate([[1]], SamplingParams(stop="x"))
    assert_nothing_left(without)


# ---- device, dtype, backend ----------------------------------------------------------------------
@pytest.mark.parametrize("in_file", [torch.float16, torch.float64])
def test_dtype_auto_is_float32_on_a_cpu_whatever_the_file_holds(tmp_path, in_file):
    save_model(GPT(GPTConfig(**SHAPE)).init_weights(std=0.2), tmp_path, in_file)
    llm = LLM(tmp_path, device="cpu", num_blocks=8)
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.float32}
    assert llm.engine.cache.pool.dtype == torch.float32


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_every_dtype_runs_in_model_and_pool(folder, name):
    llm = LLM(folder, device="cpu", dtype=name, num_blocks=32, block_size=4)
    dtype = getattr(torch, name)
    assert {parameter.dtype for parameter in llm.model.parameters()} == {dtype}
    assert llm.engine.cache.pool.dtype == dtype
    outputs = llm.generate(["one", "a longer prompt", "x"], SamplingParams(seed=1, max_tokens=8))
    assert all(output.finished for output in outputs)
    assert len({token_id for ids in ids_of(outputs) for token_id in ids}) > 3


def test_auto_is_the_gpu_where_there_is_one_and_bfloat16_where_it_has_it(monkeypatch):
    for sees_gpu, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees_gpu=sees_gpu: sees_gpu)
        assert resolve_device("auto") == torch.device(name)
    for has_bfloat16, want in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16: has)
        assert resolve_dtype("auto", torch.device("cuda")) == want
        assert resolve_dtype("float32", torch.device("cuda")) == torch.float32


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda', but PyTorch sees no GPU: use device='cpu'"):
        LLM(folder, device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu': choose auto, cpu or cuda"),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float32, float64, bfloat16, float16"),
        (
            {"backend": "cublas"},
            "backend is 'cublas': choose auto, triton, triton-simple, numba, torch",
        ),
        ({"block_size": 0}, "block_size is 0: it must be an integer of at least 1"),
        ({"max_seq_len": 65}, "max_seq_len is 65, the model has 64 positions"),
        ({"max_seq_len": 0}, "max_seq_len is 0: it must be"),
        ({"num_blocks": 0}, "num_blocks is 0: it must be"),
        ({"num_blocks": 8, "kv_cache_mb": 1.0}, "num_blocks=8 and kv_cache_mb=1.0 both size"),
        ({"kv_cache_mb": 0.001}, "kv_cache_mb=0.001 holds no block: one takes 0.008 MB"),
        ({"threads": 0}, "threads is 0: it must be an integer of at least 1"),
        ({"cuda_graphs": None}, "cuda_graphs is None: it must be True or False"),
        ({"plan_ahead": 1}, "plan_ahead is 1: it must be True or False"),
        ({"fused": "yes"}, "fused is 'yes': it must be True or False"),
        ({"backend": "torch", "fused": True}, "fused is for backend triton, it is torch"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(folder, options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        LLM(folder, **options)
    assert "\n" not in str(refusal.value)
    with pytest.raises(TypeError, match="num_block"):
        LLM(folder, num_block=8)  # no option of this name


@pytest.mark.parametrize("name", ["no/such/folder", "gpt2", "random:gpt3", "", "random:"])
def test_a_model_that_does_not_exist_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError) as refusal:
        LLM(name, num_blocks=8)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


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
    llm.generate("abc", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
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


def test_without_numba_and_triton_pytorch_does_it_all(monkeypatch):
    stand_in(monkeypatch, numba={"library": "absent"}, triton={"library": "absent"})
    for device in (HERE, torch.device("cuda")):
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


def test_a_measured_pool_on_a_cpu_takes_a_quarter_of_what_is_free(monkeypatch, folder):
    monkeypatch.setattr(llm_module, "free_memory_bytes", lambda device: 1_000_000)
    llm = LLM(folder, block_size=16, device="cpu")
    assert llm.engine.scheduler.allocator.num_blocks == 30  # 250,000 // (16 tokens of 512 bytes)


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
    llm = LLM(
        folder,
        num_blocks=8,
        block_size=4,
        reserve=lambda seq: seq.num_prompt_tokens + seq.max_tokens,
        policy=lambda seq: -seq.request.arrival,
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for _ in range(3):
        llm.engine.add_request([1, 2, 3, 4], params)  # 16 tokens each: two fit
    llm.engine.step()
    running = [seq.request.request_id for seq in llm.engine.scheduler.running]
    assert running == ["2", "1"]
    assert [len(seq.block_table) for seq in llm.engine.scheduler.running] == [4, 4]
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert llm.engine.scheduler.num_preemptions == 0


def test_a_config_that_names_no_end_of_text_writes_up_to_max_tokens(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["eos_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, num_blocks=16)
    assert llm.engine.eos_token_id is None
    always_256 = SamplingParams(temperature=0, max_tokens=5, logit_bias={256: 100})
    (output,) = llm.generate("abc", always_256)
    assert output.outputs[0].token_ids == [256] * 5
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "prompts, params", [(None, None), (7, None), ({"prompt": "a"}, None), ("a", {"n": 2})]
)
def test_what_is_neither_text_nor_a_list_is_refused_by_its_type(folder, prompts, params):
    with pytest.raises(ValueError, match="given: prompts are text or lists, params SamplingParams"):
        LLM(folder, num_blocks=8).generate(prompts, params)


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
def as_nanogpt(model, path):
    """The checkpoint that nanoGPT's train.py writes of such a model."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 257}
    state = {
        name if name == "lm_head.weight" else f"transformer.{name}": weight
        for name, weight in model.state_dict().items()
    }
    torch.save({"model": state, "model_args": args | {"bias": True, "dropout": 0.0}}, path)


def test_a_nanogpt_checkpoint_is_served_with_the_tokenizer_that_lies_beside_it(tmp_path):
    config = GPTConfig(**SHAPE | {"tie_word_embeddings": True}, activation_function="gelu")
    model = GPT(config).init_weights(std=0.2).requires_grad_(False).eval()
    as_nanogpt(model, tmp_path / "ckpt.pt")
    (want,) = LLM(model, num_blocks=16).generate([[1, 2, 3]], GREEDY)
    for name in (tmp_path, tmp_path / "ckpt.pt"):  # the folder of a training run, or the file
        alone = LLM(name, num_blocks=16)
        assert alone.tokenizer is None
        assert alone.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == (
            want.outputs[0].token_ids
        )
    save_vocabulary(tmp_path, merges=[])
    assert LLM(tmp_path / "ckpt.pt", num_blocks=16).tokenizer.vocab_size == 257


def test_a_name_on_the_hub_is_served_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    commit = "c0ffee" * 6 + "beef"
    repository = tmp_path / "models--me--tales"
    snapshot = repository / "snapshots" / commit
    save_model(GPT(GPTConfig(**SHAPE)).init_weights(std=0.2), snapshot, torch.float32)
    save_vocabulary(snapshot, merges=[])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    llm = LLM("me/tales", num_blocks=16)
    assert (llm.model_name, llm.weights) == ("me/tales", "trained weights")
    assert llm.generate("abc", GREEDY)[0].prompt_token_ids == llm.tokenizer.encode("abc")


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
    vocab_size, folder, ids_only, monkeypatch
):
    ours = llm_module.load_tokenizer(folder)
    monkeypatch.setattr(llm_module, "gpt2_tokenizer", lambda: ours)
    found = llm_module.find_tokenizer(ids_only, vocab_size)
    assert (found is ours) == (vocab_size != 257)
    assert (llm_module.find_tokenizer(None, vocab_size) is ours) == (vocab_size != 257)
    beside = llm_module.find_tokenizer(folder, vocab_size)  # what lies beside it is believed first
    assert beside is not ours and beside.vocab_size == 257


# ---- how steps are run ---------------------------------------------------------------------------
def texts_of(folder, **config):
    """Token ids of eight prompts, some of which end by themselves, and the LLM that wrote them."""
    llm = LLM(folder, dtype="float64", num_blocks=24, block_size=4, max_num_seqs=5, **config)
    prompts = [[n, 2 * n, 3 * n] for n in range(1, 9)]
    params = [SamplingParams(temperature=n % 2, seed=n, max_tokens=5 + n) for n in range(8)]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params)], llm


def test_planning_ahead_writes_the_same_texts(folder):
    expected, plain = texts_of(folder)
    got, ahead = texts_of(folder, plan_ahead=True)
    assert type(plain.engine) is InferenceEngine and type(ahead.engine) is AheadEngine
    assert got == expected and len({token for text in got for token in text}) > 8
    assert ahead.engine.scheduler.allocator.num_free == 24


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="Triton's interpreter is needed")
def test_joined_steps_write_the_same_texts(folder):
    expected, _ = texts_of(folder)
    got, fused = texts_of(folder, backend="triton", fused=True, plan_ahead=True)
    assert got == expected and fused.config.fused


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="Triton's interpreter is needed")
def test_a_model_whose_steps_cannot_be_joined_is_refused_with_the_reason():
    model = GPT(GPTConfig(**SHAPE, activation_function="relu")).eval()
    with pytest.raises(ValueError, match="this model's steps can't be joined: "):
        LLM(model, backend="triton", fused=True)


# ---- how large a pool ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "block_bytes, options, num_blocks",
    [
        (589_824, {"num_blocks": 100}, 100),  # a block of GPT-2 in 16 bits
        (1_000_000, {"kv_cache_mb": 7}, 7),  # a megabyte is a million bytes
        (1_000_001, {"kv_cache_mb": 7}, 6),
        (250_000, {"kv_cache_mb": 0.75}, 3),
        (36_864, {"kv_cache_mb": 1000}, 27_126),  # tokens of GPT-2 in a gigabyte
    ],
)
def test_a_pool_is_as_large_as_it_is_told(block_bytes, options, num_blocks):
    assert choose_num_blocks(block_bytes, most_useful=64, **options) == num_blocks


def test_a_pool_of_exactly_k_blocks_of_bytes_holds_k_blocks():
    # 66.650112 * 1e6 is 66650111.99999999 in floating point: 113 blocks, not 112.
    for k in range(1, 2000):
        assert choose_num_blocks(589_824, 1, kv_cache_mb=k * 589_824 / 10**6) == k


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_blocks": 8, "kv_cache_mb": 64}, "num_blocks=8 and kv_cache_mb=64 both size the"),
        ({"num_blocks": 0}, "num_blocks is 0: the pool needs at least 1 block"),
        ({"kv_cache_mb": 0.5}, "kv_cache_mb=0.5 holds no block: one takes 0.590 MB"),
        ({"kv_cache_mb": -3}, "kv_cache_mb=-3 holds no block: one takes 0.590 MB"),
    ],
    ids=str,
)
def test_a_pool_of_two_sizes_or_of_no_block_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_num_blocks(589_824, 64, **options)


@pytest.mark.parametrize(
    "free_bytes, most_useful, num_blocks",
    [
        pytest.param(2**30, 10**6, 455, id="a quarter of what is free"),  # 2**28 // 589,824
        pytest.param(2**32, 10**6, 1820, id="a quarter of 4 GiB is 1 GiB"),
        pytest.param(2**40, 10**6, 1820, id="never more than 1 GiB"),
        pytest.param(2**40, 512, 512, id="never more than all sequences could fill"),
        pytest.param(4 * 589_824, 512, 1, id="one block"),
    ],
)
def test_on_a_cpu_the_pool_takes_a_quarter_and_at_most_a_gibibyte(
    monkeypatch, free_bytes, most_useful, num_blocks
):
    monkeypatch.setattr(llm_module, "free_memory_bytes", lambda device: free_bytes)
    assert choose_num_blocks(589_824, most_useful) == num_blocks


def test_on_a_gpu_the_pool_takes_the_share_it_is_given(monkeypatch):
    monkeypatch.setattr(llm_module, "free_memory_bytes", lambda device: 100 * 589_824)
    for share, num_blocks in ((0.5, 50), (0.25, 25)):
        chosen = choose_num_blocks(
            589_824, 10**6, gpu_memory_utilization=share, device=torch.device("cuda")
        )
        assert chosen == num_blocks
    assert choose_num_blocks(589_824, 7, gpu_memory_utilization=0.5, device="cuda") == 7


def test_a_machine_without_room_for_a_block_is_refused(monkeypatch):
    monkeypatch.setattr(llm_module, "free_memory_bytes", lambda device: 589_824)
    with pytest.raises(ValueError, match="one block takes 1 MB, 0 MB may be used: lower block"):
        choose_num_blocks(589_824, 64)
    with pytest.raises(ValueError, match="the pool needs 2 MB, 1 MB are free: lower num_blocks"):
        choose_num_blocks(589_824, 64, num_blocks=2)
