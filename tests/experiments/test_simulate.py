"""Time without a model: the plans are the real engine's, the clock is arithmetic.

Traces of a few requests are worked out by hand, with steps that take a second each. That plans are
the real ones is not believed: an engine with a model serves the same requests, and every step of
both must be the same.
"""

import random
import subprocess
import sys

import pytest
from conftest import ROOT

from block_allocator import BlockAllocator
from engine import InferenceEngine, eager_forward
from experiments.reservations import BuddyAllocator, reserve_oracle
from experiments.simulate import (
    Arrival,
    CostModel,
    PoolState,
    SimulatedEngine,
    Step,
    admit_all,
    fit,
    poisson,
    serve,
    static_batches,
)
from kv_cache import KVCache
from sampling import SamplingParams
from scheduler import Scheduler, reserve_now

A_SECOND = CostModel(1000.0, 0.0, 0.0)


def make_scheduler(
    num_blocks=64, block_size=4, budget=64, allocator=BlockAllocator, reserve=reserve_now, seqs=64
):
    return Scheduler(allocator(num_blocks, block_size), seqs, budget, 64, reserve)


def simulated(requests, admit=admit_all, cost=A_SECOND, **sizes):
    return serve(requests, SimulatedEngine(make_scheduler(**sizes), cost), admit)


def times(run):
    return [list(one.token_s) for one in run.served]


# ---- the clock -----------------------------------------------------------------------------------
def test_a_request_arrives_when_it_does_and_runs_from_the_next_step_on():
    requests = [Arrival(0.0, 3, 2), Arrival(0.5, 2, 1), Arrival(10.0, 5, 1)]
    run = simulated(requests)
    # 0 to 1 s: the first alone. 1 to 2 s: both. Then nobody, until 10 s.
    assert times(run) == [[1.0, 2.0], [2.0], [11.0]]
    assert [one.latency_per_token_s for one in run.served] == [2.0 / 2, 1.5, 1.0]
    assert run.steps == [
        Step(1.0, 1000.0, 3, 3, 0, 0, PoolState(running=1, waiting=0, blocks=1)),
        Step(2.0, 1000.0, 3, 6, 0, 0, PoolState(running=2, waiting=0, blocks=2)),
        Step(11.0, 1000.0, 5, 5, 0, 0, PoolState(running=1, waiting=0, blocks=2)),
    ]


def test_a_step_costs_its_base_its_tokens_and_the_contexts_it_reads():
    run = simulated([Arrival(0.0, 3, 2), Arrival(0.0, 5, 1)], cost=CostModel(1.0, 10.0, 100.0))
    assert [step.milliseconds for step in run.steps] == [1 + 80 + 800, 1 + 10 + 400]
    assert [step.end_s for step in run.steps] == pytest.approx([0.881, 1.292])


def test_a_prompt_that_arrives_in_pieces_has_its_first_token_after_the_last():
    run = simulated([Arrival(0.0, 10, 1)], budget=4)
    assert times(run) == [[3.0]]
    assert [(step.new_tokens, step.kv_tokens) for step in run.steps] == [(4, 4), (4, 8), (2, 10)]


def test_who_is_preempted_waits_and_computes_its_tokens_again():
    # 3 blocks of 4. Both start with one; after 4 tokens each wants a second, and there is one.
    run = simulated([Arrival(0.0, 3, 4), Arrival(0.0, 3, 4)], num_blocks=3)
    assert times(run) == [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 5.0, 6.0]]
    assert [one.num_preemptions for one in run.served] == [0, 1]
    assert [step.preempted for step in run.steps] == [0, 0, 1, 0, 0, 0]
    assert [step.seen.running for step in run.steps] == [2, 2, 1, 1, 1, 1]
    assert [step.seen.waiting for step in run.steps] == [0, 0, 1, 1, 0, 0]
    assert [step.new_tokens for step in run.steps] == [6, 2, 1, 1, 5, 1]


# ---- static batches ------------------------------------------------------------------------------
def test_a_static_batch_ends_with_its_longest_member():
    requests = [Arrival(0.0, 2, 1), Arrival(0.0, 2, 3), Arrival(0.0, 2, 1)]
    run = simulated(requests, static_batches(2))
    assert times(run) == [[1.0], [1.0, 2.0, 3.0], [4.0]]  # the first is padded, but not counted
    assert [step.seen.running for step in run.steps] == [2, 2, 2, 1]
    assert [step.queued for step in run.steps] == [1, 1, 1, 0]


def test_a_static_batch_pads_to_the_end_of_the_context_at_most():
    requests = [Arrival(0.0, 60, 1), Arrival(0.0, 2, 9)]
    run = simulated(requests, static_batches(2))
    # 60 tokens have room for 4 more of 64: the first leaves after 4 steps.
    assert [step.seen.running for step in run.steps] == [2] * 4 + [1] * 5


# ---- the plans are the real engine's -------------------------------------------------------------
def plans_of(engine):
    """Every step of an engine: who ran where, who was preempted."""
    while engine.has_unfinished():
        output = engine.step()
        plan = output[0] if isinstance(output, tuple) else output.plan
        ran = [(seq.request.request_id, start, n) for seq, start, n in plan.scheduled]
        yield ran, [seq.request.request_id for seq in plan.preempted]


@pytest.mark.parametrize(
    "allocator, reserve",
    [(BlockAllocator, reserve_now), (BuddyAllocator, reserve_oracle(64))],
    ids=["paged", "oracle over buddies"],
)
def test_every_step_is_planned_as_in_the_real_engine(tiny_gpt, allocator, reserve):
    draw = random.Random(5)
    lengths = [(draw.randint(1, 30), draw.randint(1, 20)) for _ in range(24)]
    sizes = {"num_blocks": 20, "budget": 24, "allocator": allocator, "reserve": reserve, "seqs": 9}
    model = tiny_gpt()
    cache = KVCache(2, 20, 4, 4, 16)
    real = InferenceEngine(eager_forward(model, cache), cache, make_scheduler(**sizes), 97)
    simulated = SimulatedEngine(make_scheduler(**sizes), A_SECOND)
    for prompt, output in lengths:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        real.add_request([draw.randrange(97) for _ in range(prompt)], params)
        simulated.add(prompt, output)
    plans = list(plans_of(real))
    assert list(plans_of(simulated)) == plans
    assert any(preempted for _, preempted in plans) == (reserve is reserve_now)
    assert len(plans) > 40


# ---- what must always hold -----------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_there_once_and_every_block_is_free_at_the_end(seed):
    draw = random.Random(seed)
    lengths = [Arrival(0.0, draw.randint(1, 40), draw.randint(1, 24)) for _ in range(60)]
    requests = list(poisson(lengths, per_s=draw.choice([0.05, 0.5, 5.0]), seed=seed))
    scheduler = make_scheduler(num_blocks=draw.choice([16, 24, 60]), budget=draw.choice([5, 64]))
    engine = SimulatedEngine(scheduler, CostModel(100.0, 3.0, 0.5))
    run = serve(requests, engine)
    assert [one.request for one in run.served] == requests
    assert [len(one.token_s) for one in run.served] == [r.output_tokens for r in requests]
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
    assert max(step.seen.blocks for step in run.steps) <= scheduler.allocator.num_blocks
    # Of a request all tokens but the last are computed; what was lost is computed again.
    once = sum(r.prompt_tokens + r.output_tokens - 1 for r in requests)
    computed = sum(step.new_tokens for step in run.steps)
    assert computed == once + scheduler.num_recomputed_tokens
    assert sum(step.preempted for step in run.steps) == scheduler.num_preemptions
    assert sum(one.num_preemptions for one in run.served) == scheduler.num_preemptions
    for one in run.served:
        assert list(one.token_s) == sorted(set(one.token_s))
        assert one.first_token_s > one.request.arrival_s


# ---- the cost model ------------------------------------------------------------------------------
def test_no_number_of_the_fit_is_negative_and_the_residual_is_said():
    # The more work, the less time: nothing fits better than the same time for all of them.
    cost, residual_ms = fit([(1, 100, 10.0), (2, 200, 9.0), (3, 300, 8.0)])
    assert cost == pytest.approx((9.0, 0.0, 0.0))
    assert residual_ms == pytest.approx((2 / 3) ** 0.5)


def test_the_fit_is_the_best_of_all_without_negative_numbers():
    draw = random.Random(0)
    for _ in range(20):
        steps = [(draw.randint(1, 9), draw.randint(1, 9), draw.random()) for _ in range(8)]
        cost, residual_ms = fit(steps)
        assert min(cost) >= 0
        for _ in range(200):
            other = CostModel(*(max(0.0, x + draw.gauss(0, 0.05)) for x in cost))
            error = sum((other.step_ms(a, b) - ms) ** 2 for a, b, ms in steps) / len(steps)
            assert error**0.5 >= residual_ms - 1e-12


def test_two_steps_are_too_few_to_fit_three_numbers():
    with pytest.raises(ValueError, match="2 measured steps for three numbers: give at least 3"):
        fit([(1, 2, 3.0), (4, 5, 6.0)])


# ---- random arrivals -----------------------------------------------------------------------------
def test_poisson_arrivals_keep_the_lengths_and_have_the_rate():
    lengths = [Arrival(7.0, i, 2 * i) for i in range(1, 4001)]
    requests = list(poisson(lengths, per_s=5.0, seed=1))
    assert [request[1:] for request in requests] == [request[1:] for request in lengths]
    seconds = [request.arrival_s for request in requests]
    gaps = [b - a for a, b in zip([0.0, *seconds], seconds, strict=False)]
    assert sum(gaps) / 4000 == pytest.approx(0.2, rel=0.05)
    # Exponential: the deviation is the mean, and 1/e of the gaps are longer than it.
    assert (sum(gap**2 for gap in gaps) / 4000 - 0.04) ** 0.5 == pytest.approx(0.2, rel=0.1)
    assert sum(gap > 0.2 for gap in gaps) / 4000 == pytest.approx(0.368, rel=0.05)
    assert requests == list(poisson(lengths, 5.0, seed=1)) != list(poisson(lengths, 5.0, seed=2))


# ---- the file itself -----------------------------------------------------------------------------
def test_a_simulation_needs_no_torch():
    code = "import sys, experiments.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
