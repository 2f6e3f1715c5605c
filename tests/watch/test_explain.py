"""Where a step's time goes: counted by hand on a small model, judged, and nothing else changed.

The model is conftest's: 2 layers of 64, 97 tokens. A layer has 64 x (192 + 64 + 256) + 256 x 64 =
49,152 weights in its four products, 576 biases and 256 numbers of LayerNorm; the last LayerNorm has
128, the head 97 x 64 = 6,208.
"""

import contextlib
import copy
import io
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from worlds import needs_gpu

import generate
from block_allocator import BlockAllocator
from engine import InferenceEngine, eager_forward
from kernels import linear_cpu
from kernels.packed_linear import is_packed, pack
from kv_cache import KVCache
from llm import LLM
from outputs import BlockCounts, StepOutput, Timings
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import RUNNING, Continuation, Plan, Request, Scheduled, Sequence
from watch import explain
from watch.explain import CountedStep, Explained, Explainer, count_operations, table, weight_bytes
from watch.recorder import read_recording
from watch.roofline import Ceilings, Work, floors_ms


def explained_engine(model, num_blocks=24, max_num_batched_tokens=64):
    """An engine over blocks of 4, and its explainer."""
    shape, dtype = model.config, model.wte.weight.dtype
    cache = KVCache(shape.n_layer, num_blocks, 4, shape.n_head, shape.head_dim, dtype)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4), 8, max_num_batched_tokens, 64)
    engine = InferenceEngine(eager_forward(model, cache), cache, scheduler, shape.vocab_size)
    return engine, explain_to(engine, model)


def explain_to(engine, model):
    explainer = Explainer(model, engine.cache, engine.forward)
    engine.watchers.append(explainer)
    return explainer


def greedy(num_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=num_tokens, **more)


def run_all(engine):
    while engine.has_unfinished():
        engine.step()


def counts(explainer):
    """Rows, sample rows, context tokens, pairs and whether it is a decode, of each step."""
    return [tuple(step[:5]) for step in explainer.steps]


def counted(rows=1, samples=1, context=1, pairs=1, is_decode=True, measured_ms=2.0, host_ms=1.0):
    return CountedStep(rows, samples, context, pairs, is_decode, measured_ms, host_ms)


# ---- what a step has to do -----------------------------------------------------------------------
# Prompts as (tokens, tokens to write), and by hand what each step has to do.
COUNTED = {
    "two prompts": (
        [(5, 3), (2, 3)],
        [
            (7, 2, 5 + 2, 15 + 3, False),  # 1 + 2 + 3 + 4 + 5 and 1 + 2 pairs
            (2, 2, 6 + 3, 6 + 3, True),
            (2, 2, 7 + 4, 7 + 4, True),
        ],
    ),
    "a prompt in pieces wants logits only of its last row": (
        [(20, 2)],
        [
            (8, 0, 8, sum(range(1, 9)), False),
            (8, 0, 16, sum(range(9, 17)), False),
            (4, 1, 20, 17 + 18 + 19 + 20, False),
            (1, 1, 21, 21, True),
        ],
    ),
    "a prompt of one token is a decode step": ([(1, 1)], [(1, 1, 1, 1, True)]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_work_of_each_step_is_counted_by_hand(tiny_gpt, name):
    """Rows, sample rows, context tokens, pairs, and whether it is a decode step."""
    prompts, expected = COUNTED[name]
    engine, explainer = explained_engine(tiny_gpt(), max_num_batched_tokens=8)
    for num_tokens, num_written in prompts:
        engine.add_request(list(range(num_tokens)), greedy(num_written))
    run_all(engine)
    assert counts(explainer) == expected


def test_a_prompt_beside_a_decode_is_no_decode_step(tiny_gpt):
    engine, explainer = explained_engine(tiny_gpt())
    engine.add_request([5], greedy(2))
    engine.step()
    engine.add_request([6, 7], greedy(1))
    run_all(engine)
    assert counts(explainer)[1:] == [(3, 2, 2 + 2, 2 + 3, False)]


def test_a_scored_prompt_wants_the_logits_of_all_its_rows_once(tiny_gpt):
    """As many rows as the forward gave: of the first of two texts, and not after a preemption."""
    engine, explainer = explained_engine(tiny_gpt(), max_num_batched_tokens=8)
    forward, given = engine.forward, []
    engine.forward = lambda batch: given.append(len(batch.sample_rows)) or forward(batch)

    def two_tokens_each(sequences, logits):
        return [Continuation(seq, [5, 6]) for seq in sequences]

    params = SamplingParams(n=2, max_tokens=9, prompt_logprobs=1)
    engine.add_request(list(range(9)), params, strategy=two_tokens_each)
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(engine.requests["0"].sequences[0])
    run_all(engine)
    # First 8 rows of the prompt, then its last one, from which both texts begin. Then each text has
    # 2 rows a step, one of which leads to tokens. When the first text comes back, its first 14
    # tokens lead to none, and the second one has to wait.
    assert [step.num_sample_rows for step in explainer.steps] == given == [8, 1, 2, 2, 1, 0, 2, 1]


def test_a_step_reads_all_layers_the_head_and_two_rows_a_token(tiny_gpt):
    layers = (2 * (49_152 + 576 + 256) + 128) * 4
    assert layers == 400_384
    model = tiny_gpt()
    assert weight_bytes(model, num_rows=0, num_sample_rows=1) == layers + 6_208 * 4 == 425_216
    assert weight_bytes(model, num_rows=7, num_sample_rows=2) == 425_216 + 7 * 2 * 64 * 4
    # Where nothing is sampled, the last layer is done when its K and V are written.
    rest = 4_160 + 128 + 2 * 16_384 + 256 + 64 + 128  # c_proj, ln_2, mlp and its biases, ln_f
    assert weight_bytes(model, num_rows=4, num_sample_rows=0) == layers - rest * 4 + 4 * 2 * 64 * 4
    assert weight_bytes(tiny_gpt(dtype=torch.bfloat16), 7, 2) * 2 == weight_bytes(model, 7, 2)
    untied = tiny_gpt(tie_word_embeddings=False)
    assert weight_bytes(untied, 7, 2) == weight_bytes(model, 7, 2)


def test_operations_are_those_of_products_and_of_pairs(tiny_gpt):
    # 7 rows through a layer and the next one's QKV, 2 through its rest and the head, 18 pairs of
    # twice 64 numbers in 2 layers.
    by_hand = 7 * (49_152 + 12_288) + 2 * (36_864 + 6_208) + 18 * 2 * 64 * 2
    model = tiny_gpt()
    assert count_operations(model, counted(7, 2, 7, 18)) == 2 * by_hand == 1_041_664
    with FlopCounterMode(display=False) as counter:  # PyTorch's counter: products only
        last_two = torch.tensor([5, 6])
        model.logits(model(torch.arange(7), torch.arange(7), lambda layer, q, k, v: v, last_two))
    assert count_operations(model, counted(7, 2, 7, pairs=0)) == counter.get_total_flops()


@pytest.mark.parametrize("in_panels", [True, False], ids=["in panels", "in the library's order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_are_counted_as_plain_ones(tiny_gpt, monkeypatch, dtype, in_panels):
    """Sizes for which panels need no zeros to be filled up."""
    if not in_panels:
        monkeypatch.setattr(linear_cpu, "can_use_panels", lambda dtype: False)
    elif not linear_cpu.can_use_panels(dtype):
        pytest.skip("no panels on this machine")
    plain = tiny_gpt(dtype=dtype, n_embd=768, n_inner=768, vocab_size=192)
    packed = pack(copy.deepcopy(plain))
    if not is_packed(packed):
        pytest.skip("nothing is packed on this machine")
    for num_sample_rows in (2, 0):
        assert weight_bytes(packed, 7, num_sample_rows) == weight_bytes(plain, 7, num_sample_rows)
        step = counted(7, num_sample_rows)
        assert count_operations(packed, step) == count_operations(plain, step)


# ---- what it takes -------------------------------------------------------------------------------
def output_of(scheduled, sampled=1, **timings):
    """The output of a step with (start, new tokens) of each sequence; `sampled` get a token."""
    entries = []
    for start, num_new_tokens in scheduled:
        seq = Sequence(Request("0", [5] * 99, 0), 0, [5] * 99, 99, max_tokens=9, status=RUNNING)
        seq.num_computed_tokens = start + num_new_tokens
        entries.append(Scheduled(seq, start, num_new_tokens))
    plan = Plan(entries, sampled=[entry.seq for entry in entries[:sampled]])
    return StepOutput(plan, [], [], [], BlockCounts(), Timings(**timings))


def test_the_hosts_own_time_is_that_of_the_plan_and_of_the_update(tiny_gpt):
    model = tiny_gpt()
    _, explainer = explained_engine(model)
    explainer(output_of([(0, 2)], schedule=1.5, forward=40.0, sample=8.0, update=0.5))
    (step,) = explainer.steps
    assert (step.measured_ms, step.host_ms) == (50.0, 2.0)
    assert explainer.work(step) == Work(
        weight_bytes=weight_bytes(model, 2, 1),
        kv_bytes=2 * 2 * 2 * 64 * 4,  # 2 tokens: K and V, 2 layers, 64 floats
        operations=count_operations(model, step),
        launches=None,
        host_ms=2.0,
    )


def test_a_step_that_ran_no_sequence_is_not_counted(tiny_gpt):
    engine, explainer = explained_engine(tiny_gpt())
    engine.abort(engine.add_request([7, 3], greedy(2)))
    run_all(engine)
    assert explainer.steps == []
    with pytest.raises(ValueError, match="0 steps were counted"):
        explainer.report()


def test_on_a_gpu_a_step_counts_if_the_host_waited_for_it_and_for_it_alone():
    """A chunk without a token is not waited for, and the next step waits for both."""
    outputs = [
        output_of([(0, 8)], sampled=0, forward=1.0),
        output_of([(8, 8)], sampled=0, forward=2.0),
        output_of([(16, 4)], forward=3.0),
        output_of([(20, 1)], forward=4.0),
        output_of([(0, 5), (21, 1)], sampled=2, forward=5.0),
    ]
    counted_ms = {}
    for is_cuda in (True, False):
        explainer = Explainer(None, SimpleNamespace(pool=SimpleNamespace(is_cuda=is_cuda)), None)
        for output in outputs:
            explainer(output)
        counted_ms[is_cuda] = [step.measured_ms for step in explainer.steps]
    assert counted_ms == {True: [4.0, 5.0], False: [1.0, 2.0, 3.0, 4.0, 5.0]}


def test_of_steps_planned_ahead_those_count_that_launch_one_like_themselves(tiny_gpt):
    """The first has the work of two steps, the last has none, and prompts have that of a decode."""
    model = tiny_gpt()
    llm = LLM(model, num_blocks=24, block_size=4, plan_ahead=True)
    explainer = explain_to(llm.engine, model)
    llm.engine.add_request([7, 3, 9], greedy(7))
    for _ in range(2):
        llm.engine.step()
    llm.engine.add_request([5, 5], greedy(3))
    run_all(llm.engine)
    # The first text has 3, 4, .. 9 context tokens; the other prompt of 2 comes beside its 6.
    one, two = [(1, 1, n, n, True) for n in (4, 5)], [(2, 2, n, n, True) for n in (7 + 3, 8 + 4)]
    assert counts(explainer) == one + two
    explainer.steps.clear()
    llm.generate([[7, 3, 9], [5, 5]], greedy(3, repetition_penalty=1.5))  # cannot be planned ahead
    assert counts(explainer) == [(5, 2, 5, 9, False), (2, 2, 7, 7, True), (2, 2, 9, 9, True)]


def test_the_first_call_of_an_engine_that_plans_ahead_has_the_forward_of_two_steps(tiny_gpt):
    llm = LLM(tiny_gpt(), num_blocks=24, block_size=4, plan_ahead=True)
    forward = llm.engine.forward
    llm.engine.forward = lambda batch: time.sleep(0.03) or forward(batch)
    llm.engine.add_request([7, 3, 9], greedy(7))
    assert llm.engine.step().timings.forward >= 60


def test_the_median_step_of_a_kind_is_one_that_was_run_and_the_first_warms_up(tiny_gpt):
    _, explainer = explained_engine(tiny_gpt())
    decodes = [counted(measured_ms=ms) for ms in (900.0, 5.0, 3.0, 8.0, 9.0)]
    prefills = [counted(4, is_decode=False, measured_ms=ms) for ms in (70.0, 30.0, 20.0, 40.0)]
    explainer.steps = [prefills[0], *decodes, *prefills[1:]]
    medians = explainer.median_steps()
    assert list(medians) == ["decode", "prefill"]
    assert medians["decode"] == (5, decodes[1])  # the lower one of 5 and 8
    assert medians["prefill"] == (4, prefills[1])
    explainer.steps = prefills[:1]  # alone it stands for itself
    assert explainer.median_steps() == {"prefill": (1, prefills[0])}


# ---- the verdict and the table -------------------------------------------------------------------
CEILINGS = Ceilings(bytes_per_ms=20e6, operations_per_ms=100e6, launch_ms=0.001)


def explained(work, kind="decode", num_steps=57, step=None, ceilings=CEILINGS):
    step = counted(measured_ms=50.0) if step is None else step
    return Explained(kind, num_steps, step, work, floors_ms(work, ceilings))


# Work, and what is said of a step of 50 ms: up to twice its floor also what would help.
VERDICTS = {
    "weights": (Work(500_000_000, 480_000_000, 10**9), "weight-bound, at 1.02 times"),
    "KV": (Work(100_000_000, 400_000_000, 10**9), "KV-bound, at 2.00 times"),
    "operations": (Work(500_000_000, 0, 4 * 10**9), "compute-bound, at 1.25 times"),
    "launches": (Work(20_000_000, 0, 10**6, 4000, 0.5), "launch-bound, at 12.50 times"),
    "host": (Work(20_000_000, 0, 10**6, 4000, 25.0), "host-bound, at 2.00 times"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_names_the_largest_floor_and_what_follows(name):
    work, words = VERDICTS[name]
    start, _, consequence = explained(work).verdict.partition(" its floor: ")
    assert start == f"a decode step is {words}"
    hardly = "less than half of the time is explained"
    assert consequence == (hardly if name == "launches" else explain.VERDICTS[name][1])
    alone = explained(work, "prefill", 1).verdict
    assert alone.startswith("a prefill step is ") and "its time includes the warm-up" in alone


TABLE = """\
                                    decode, 57 steps           prefill, 1 step
the median of them                  work    floor ms          work    floor ms
tokens computed                       12                       512
context tokens read                6,000                       512
weights read                    494.6 MB      24.730      497.7 MB      24.885
keys and values read            442.4 MB      22.120       37.7 MB       1.885
both, through one memory        937.0 MB      46.850      535.4 MB      26.770
operations                        3.10 G      31.000       92.00 G     920.000
launches of the forward              150       0.150             -           -
host's own time                                8.500                    10.000
measured                                      58.500                 1,200.000
measured / largest floor                        1.25                      1.30"""


def two_kinds(ceilings=CEILINGS):
    decode = counted(12, 12, 6000, 6000, True, 58.5, 8.5)
    prefill = counted(512, 1, 512, 131_328, False, 1200.0, 10.0)
    a_decodes = Work(494_600_000, 442_400_000, 3_100_000_000, 150, 8.5)
    a_prefills = Work(497_700_000, 37_700_000, 92 * 10**9, None, 10.0)
    return [
        explained(a_decodes, "decode", 57, decode, ceilings),
        explained(a_prefills, "prefill", 1, prefill, ceilings),
    ]


def test_the_table_shows_work_floors_and_what_was_measured():
    lines = TABLE.splitlines()
    assert table(two_kinds()) == lines
    assert table(two_kinds()[:1]) == [line[:52].rstrip() for line in lines]
    without_launches = two_kinds(CEILINGS._replace(launch_ms=None))
    assert table(without_launches) == [li for li in lines if not li.startswith("launches")]


def test_a_report_is_the_ceilings_the_table_and_a_verdict_for_each_kind(tiny_gpt, monkeypatch):
    asked = []

    def ceilings(*arguments):
        asked.append(arguments)
        return CEILINGS._replace(launch_ms=None)

    monkeypatch.setattr(explain, "measure_ceilings", ceilings)
    model = tiny_gpt()
    engine, explainer = explained_engine(model)
    for prompt in ([7, 3, 9, 1, 4], [5, 5]):
        engine.add_request(prompt, greedy(3))
    run_all(engine)
    explainer.steps = explainer.steps[:2]  # one of each kind
    lines = explainer.report()
    kinds = [
        Explained(kind, 1, step, explainer.work(step), floors_ms(explainer.work(step), CEILINGS))
        for kind, step in (("decode", explainer.steps[1]), ("prefill", explainer.steps[0]))
    ]
    assert lines[1:] == [*table(kinds), *(kind.verdict for kind in kinds)]
    # The bytes of the decode step: 2 rows, 6 + 3 tokens of 1,024 bytes.
    decode_bytes = weight_bytes(model, 2, 2) + 9 * 1024
    assert asked == [(torch.device("cpu"), torch.float32, decode_bytes)]
    assert lines[0] == (
        "at most, on this cpu with 1 thread: 20.0 GB/s read, 100 GFLOP/s multiplied in float32"
    )


# ---- on a GPU ------------------------------------------------------------------------------------
def test_a_rehearsal_touches_no_block_but_the_scratch_block(tiny_gpt):
    """It runs after the work, to count launches; requests that still hold blocks keep them."""
    engine, explainer = explained_engine(tiny_gpt())
    engine.add_request(list(range(10)), greedy(9))
    engine.step()
    before = engine.cache.pool.clone()
    batch = explainer.rehearsal(counted(3, 3, context=31))
    assert batch.context_lens.tolist() == [10, 10, 10]
    assert batch.query_start_locs.tolist() == [0, 1, 2, 3]
    assert batch.sample_rows.tolist() == [0, 1, 2]
    assert batch.max_query_len == 1
    with torch.inference_mode():
        assert engine.forward(batch).shape == (3, 97)
    assert torch.equal(engine.cache.pool[:, :-1], before[:, :-1])
    assert not torch.equal(engine.cache.pool[:, -1], before[:, -1])  # it did write


@needs_gpu
def test_on_a_gpu_the_launches_of_a_decode_step_are_counted(tiny_gpt):
    model = copy.deepcopy(tiny_gpt()).cuda()
    llm = LLM(model, num_blocks=64)
    explainer = explain_to(llm.engine, model)
    llm.generate([1, 2, 3], greedy(5))
    # At least the 4 products of each of 2 layers and the logits; at most a few dozen a layer.
    assert 9 <= explainer.work(explainer.steps[-1]).launches <= 100
    assert any(line.startswith("launches") for line in explainer.report())


# ---- the command line ----------------------------------------------------------------------------
def run_main(*args):
    """What main printed to (stdout, stderr)."""
    small = ["--num-blocks", "64", "--max-tokens", "6", "--temperature", "0", "--ignore-eos"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        generate.main([*args, *small, "--device", "cpu"])
    return out.getvalue(), err.getvalue()


def test_generate_explains_its_steps_after_the_summary_and_writes_the_same_text(tmp_path):
    prompts, path = ["Once upon a time there was", "The fox"], tmp_path / "steps.jsonl"
    out, err = run_main(*prompts, "--explain", "--record", str(path))
    assert out == run_main(*prompts)[0]
    _, _, report = err.rpartition("tokens computed again\n\n")
    lines = report.splitlines()
    assert lines[0].startswith("at most, on this cpu with 1 thread: ")
    assert lines[1].split() == "decode, 5 steps prefill, 1 step".split()
    read_mb = weight_bytes(LLM(num_blocks=8, device="cpu").model, 2, 2) / 1e6
    assert lines[3].split()[2] == "2"  # two sequences, a row each
    assert lines[5].split()[2:4] == [f"{read_mb:,.1f}", "MB"]
    for line, kind in zip(lines[-2:], ("decode", "prefill"), strict=True):
        assert re.fullmatch(rf"a {kind} step is \w+-bound, at [\d.,]+ times its floor: .*", line)
    assert len(read_recording(path)[1]) == 6


def test_generate_explains_and_records_steps_that_are_planned_ahead(tmp_path):
    prompts, path = ["Once upon a time there was", "The fox"], tmp_path / "steps.jsonl"
    out, err = run_main(*prompts, "--plan-ahead", "--explain", "--record", str(path))
    assert out == run_main(*prompts)[0]
    _, _, report = err.rpartition("tokens computed again\n\n")
    assert report.splitlines()[1].split() == "decode, 4 steps".split()
    assert len(read_recording(path)[1]) == 6
