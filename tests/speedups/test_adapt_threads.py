"""adapt_threads.py: fewer threads while others take the cores, and never another text."""

import pytest
import torch

from kernels.linear_cpu import can_use_panels
from kernels.packed_linear import pack
from kv_cache import Row, make_batch
from llm import LLM, SamplingParams
from model import GPT, GPTConfig
from sampling import draw_tokens
from speedups import adapt_threads as module
from speedups.adapt_threads import Step, ThreadChoice, adapt_threads, has_own_products

needs_panels = pytest.mark.skipif(
    not can_use_panels(torch.float32), reason="panels need numba, OpenMP, and AVX-512 or AVX2"
)


def step(seconds, cores, num_tokens=8):
    return Step(num_tokens, seconds, seconds * cores)


def run(choice, times, num_steps, num_threads=2):
    """The numbers of threads of so many steps; times[n] is (seconds, cores) of one on n threads."""
    used = []
    for _ in range(num_steps):
        used.append(choice.choose(num_threads))
        choice.observe(num_threads, step(*times[used[-1]]))
    return used


IDLE = {2: (1.0, 1.8), 1: (1.5, 1.0)}
BUSY = {2: (4.0, 1.5), 1: (1.5, 1.0)}


# ---- the choice ----------------------------------------------------------------------------------
def test_an_idle_machine_always_uses_all_threads():
    assert run(ThreadChoice(), IDLE, 200) == [2] * 200


def test_one_step_that_misses_a_core_changes_nothing():
    choice = ThreadChoice()
    for times in (IDLE, BUSY, IDLE, IDLE, BUSY, IDLE):
        assert run(choice, times, 1) == [2]


def test_with_a_neighbour_one_step_in_32_then_64_then_128_tries_all_threads():
    used = run(ThreadChoice(), BUSY, 300)
    # A trial counts as one step of 1 thread, and the pause begins behind it.
    assert [i for i, n in enumerate(used) if n == 2] == [0, 1, 35, 101, 231]
    assert set(used) == {1, 2}


def test_when_the_neighbour_has_gone_all_threads_come_back_and_pauses_are_short_again():
    choice = ThreadChoice()
    run(choice, BUSY, 130)
    assert run(choice, IDLE, 140)[-30:] == [2] * 30
    used = run(choice, BUSY, 40)
    assert [i for i, n in enumerate(used) if n == 2] == [0, 1, 35]


def test_short_steps_of_few_cores_are_no_neighbour():
    """With weights in eight bits a step of 4 sequences used 1.56 cores of an idle machine."""
    assert run(ThreadChoice(), {2: (1.0, 1.56), 1: (1.1, 1.0)}, 100) == [2] * 100


def test_fewer_threads_that_are_slower_cost_one_step():
    """Threads that sleep use no CPU time either: a trial shows that nobody took their cores."""
    used = run(ThreadChoice(), {2: (1.0, 1.5), 1: (1.3, 1.0)}, 100)
    assert [i for i, n in enumerate(used) if n == 1] == [2, 35]


def test_a_step_on_all_threads_that_was_lucky_does_not_end_the_choice():
    used = run(ThreadChoice(), {2: (1.0, 1.5), 1: (1.1, 1.0)}, 19)
    assert used == [2, 2] + [1] * 17


@pytest.mark.parametrize(
    "cores, want", [(7.8, 8), (7.5, 7), (6.5, 6), (5.9, 6), (1.0, 1), (0.3, 1)]
)
def test_as_many_threads_as_had_a_core(cores, want):
    choice = ThreadChoice()
    choice.observe(8, step(1.0, cores))
    choice.observe(8, step(1.0, cores))
    assert choice.choose(8) == want


def test_steps_of_other_sizes_are_not_compared():
    choice = ThreadChoice()
    choice.observe(2, step(1.0, 1.5))
    choice.observe(2, step(1.0, 1.5, num_tokens=300))
    assert choice.choose(2) == 1
    choice.observe(2, step(0.1, 1.0, num_tokens=8))  # faster, but it had less to do
    assert choice.choose(2) == 2
    choice.observe(2, step(0.4, 1.5))  # no pause: this one is compared with the next
    assert choice.choose(2) == 1


def test_never_more_threads_than_the_user_allows():
    choice = ThreadChoice()
    choice.observe(8, step(1.0, 6.5))
    choice.observe(8, step(1.0, 6.5))
    assert [choice.choose(n) for n in (8, 6, 4, 1)] == [6, 6, 4, 1]


# ---- the forward ---------------------------------------------------------------------------------
class Clocks:
    """Stands in for `time`: both clocks advance only when a forward says so."""

    def __init__(self):
        self.seconds = self.cpu_seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def process_time(self):
        return self.cpu_seconds


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(module, "time", clocks)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return clocks


BATCH = make_batch([Row([1, 2, 3], 2, 1, [0], 1)], 4, 9)


def adapted_forward(clocks, times):
    """A forward that takes times[n] on n threads, and the list of the threads that it was given."""
    seen = []

    def forward(batch):
        assert batch is BATCH
        seen.append(torch.get_num_threads())
        seconds, cores = times[seen[-1]]
        clocks.seconds += seconds
        clocks.cpu_seconds += seconds * cores
        return torch.ones(1)

    return adapt_threads(forward, draw_tokens)[0], seen


def test_a_forward_runs_on_the_chosen_threads_and_the_user_s_number_is_kept(clocks, set_threads):
    set_threads(2)
    adapted, seen = adapted_forward(clocks, BUSY)
    for _ in range(36):
        assert adapted(BATCH) == 1
        assert torch.get_num_threads() == 2
    assert seen == [2, 2] + [1] * 33 + [2]
    set_threads(1)
    adapted(BATCH)
    assert seen[-1] == torch.get_num_threads() == 1


def test_on_an_idle_machine_a_forward_runs_on_all_threads(clocks, set_threads):
    set_threads(2)
    adapted, seen = adapted_forward(clocks, IDLE)
    for _ in range(20):
        adapted(BATCH)
    assert seen == [2] * 20


def test_the_user_s_number_is_back_after_an_error(clocks, set_threads):
    def forward(batch):
        clocks.seconds += 1
        clocks.cpu_seconds += 1.5
        if torch.get_num_threads() == 1:
            raise KeyboardInterrupt

    set_threads(2)
    adapted, _ = adapt_threads(forward, draw_tokens)
    adapted(BATCH)
    adapted(BATCH)
    with pytest.raises(KeyboardInterrupt):
        adapted(BATCH)
    assert torch.get_num_threads() == 2


def test_with_one_thread_no_clock_is_read(clocks, set_threads, monkeypatch):
    set_threads(1)
    adapted, _ = adapt_threads(lambda batch: torch.get_num_threads(), draw_tokens)
    monkeypatch.setattr(module, "time", None)
    assert adapted(BATCH) == 1


def test_the_draw_uses_the_threads_of_the_next_forward(clocks, set_threads):
    used = []

    def draw(logits, rows):
        used.append(torch.get_num_threads())
        if rows == "fails":
            raise KeyboardInterrupt
        return logits, rows

    def forward(batch):
        clocks.seconds += 1
        clocks.cpu_seconds += 1.5

    set_threads(2)
    adapted_forward, adapted_draw = adapt_threads(forward, draw)
    for _ in range(3):
        adapted_forward(BATCH)
        assert adapted_draw("logits", "rows") == ("logits", "rows")
    with pytest.raises(KeyboardInterrupt):
        adapted_draw("logits", "fails")
    assert used == [2, 1, 1, 1] and torch.get_num_threads() == 2


def test_on_windows_both_are_as_they_were(monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert adapt_threads(len, draw_tokens) == (len, draw_tokens)


# ---- the engine ----------------------------------------------------------------------------------
def wide_gpt():
    """A small model of the smallest width whose products are Numba's."""
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_inner=40)
    return pack(GPT(config).init_weights(std=0.2).eval())


def adapts(llm):
    both = llm.engine.forward, llm.engine.sampler.draw
    found = {function.__module__ == "speedups.adapt_threads" for function in both}
    assert len(found) == 1, "one of the two alone"
    return found == {True}


@needs_panels
def test_it_is_on_only_for_products_of_numba_on_a_cpu(tiny_gpt):
    model = wide_gpt()
    assert adapts(LLM(model, num_blocks=8))
    assert not adapts(LLM(model, num_blocks=8, adapt_threads=False))
    assert not adapts(LLM(model, num_blocks=8, backend="torch"))
    assert not adapts(LLM(tiny_gpt(), num_blocks=8))  # a library's products
    assert has_own_products(model) and not has_own_products(tiny_gpt())


@needs_panels
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}])
def test_a_text_has_the_same_bits_whenever_the_number_of_threads_changes(
    options, set_threads, monkeypatch
):
    model = wide_gpt()
    prompts = [[i * 7 % 97 for i in range(1, n)] for n in (2, 9, 30, 40)]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=20, logprobs=2, ignore_eos=True)

    def generate():
        llm = LLM(model, num_blocks=40, block_size=4, max_num_batched_tokens=50, **options)
        return [
            (text.token_ids, text.logprobs)
            for output in llm.generate(prompts, params)
            for text in output.outputs
        ]

    set_threads(1)
    want = generate()
    assert len({token_id for token_ids, _ in want for token_id in token_ids}) > 20
    set_threads(2)
    assert generate() == want
    used = []

    def alternate(self, num_threads):
        used.append(1 + len(used) % num_threads)
        return used[-1]

    monkeypatch.setattr(ThreadChoice, "choose", alternate)
    assert generate() == want
    assert used[:4] == [1, 2, 1, 2]
