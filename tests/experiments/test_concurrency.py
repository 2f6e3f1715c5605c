"""Equal memory, equal work, eight plans: bounds worked out by hand, books that add up to the pool.

What the experiment says is held against numbers that a reader can check, and against the real
engine: for each contender the schedule, and what lies where in each step, is that of a simulation.
"""

import argparse
from array import array
from types import SimpleNamespace

import pytest

from experiments import concurrency
from experiments.results import append, read
from experiments.simulate import Arrival, Run, Served, Step
from experiments.trace import CONTENDERS, Machine, draw_chats, draw_short, fit_context
from sequence import RUNNING, Request, Sequence

RESERVING = [name for name in CONTENDERS if name not in ("paged", "static batches")]


def parse(words):
    parser = argparse.ArgumentParser()
    concurrency.add_arguments(parser)
    return parser.parse_args(words.split())


def at_once(requests):
    return [request._replace(arrival_s=0.0) for request in requests]


@pytest.fixture(scope="module")
def chats():
    """300 drawn conversations that fit 1,024 tokens."""
    return at_once(fit_context(draw_chats(1000, seed=0), 1024, "filter")[0])[:300]


@pytest.fixture(scope="module")
def rounds(chats):
    """What all contenders make of them, in 1,024 blocks of 16: room for 16 of the longest."""
    machine = Machine(parse("--simulate --blocks 1024"), 1024)
    watch = lambda name: concurrency.watcher(name, chats)  # noqa: E731
    found = machine.in_turn(list(CONTENDERS), chats, concurrency.figures_of, watch)
    return {name: figures for name, (figures,) in found}


# ---- the bound -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, request_of, max_seq_len, tokens",
    [
        # 3, 4, 5, 6, 7 tokens in blocks of 4: 1, 1, 2, 2, 2 blocks
        ("paged", (3, 5), 32, 6.4),
        ("oracle, perfect fit", (3, 5), 32, 8),
        ("power of two, perfect fit", (3, 5), 32, 8),
        ("maximum, perfect fit", (3, 5), 32, 32),
        ("oracle, buddies", (3, 5), 32, 8),
        ("power of two, buddies", (3, 5), 32, 16),  # 3 + 8 = 11 tokens, 3 blocks, a region of 4
        ("maximum, buddies", (3, 5), 32, 32),
        ("oracle, perfect fit", (30, 5), 64, 35),
        ("oracle, buddies", (30, 5), 64, 64),  # 9 blocks, a region of 16
        ("power of two, perfect fit", (30, 5), 48, 48),  # 30 + 8, but slabs of 32 + 16
    ],
)
def test_the_tokens_that_a_request_holds_in_blocks_of_4(name, request_of, max_seq_len, tokens):
    request = Arrival(0.0, *request_of)
    assert concurrency.tokens_held(name, request, max_seq_len, 4) == tokens


def test_a_request_weighs_as_much_as_it_has_steps():
    requests = [Arrival(0.0, 4, 1), Arrival(0.0, 4, 3)]
    # Paged: 4 tokens, one step; 4, 5, 6 tokens: 4, 8, 8. Together 24 in 4 steps.
    most = concurrency.bounds(["maximum, buddies", "oracle, perfect fit"], requests, 16, 4)
    assert most == {
        "maximum, buddies": (1 * 16 + 3 * 16) / 24,
        "oracle, perfect fit": (1 * 5 + 3 * 7) / 24,
    }


def test_the_bounds_of_azures_conversations_that_fit_1024(data_folder):
    words = f"--simulate --trace {data_folder}/traces/AzureLLMInferenceTrace_conv_2023.csv"
    workload = concurrency.make_workload(parse(words))
    most = concurrency.bounds(RESERVING, workload.requests, 1024, 16)
    assert {name: round(bound, 2) for name, bound in most.items()} == {
        "oracle, perfect fit": 1.15,
        "power of two, perfect fit": 1.57,
        "maximum, perfect fit": 2.57,
        "oracle, buddies": 1.57,
        "power of two, buddies": 1.93,
        "maximum, buddies": 2.57,
    }


# ---- where the memory went -----------------------------------------------------------------------
def sequence(arrival, prompt, now, computed, table):
    request = Request(str(arrival), [], arrival)
    seq = Sequence(request, 0, [0] * now, prompt, 99, num_computed_tokens=computed)
    seq.block_table, seq.status = table, RUNNING
    return seq


def seen(name, requests, sequences, num_blocks=16):
    allocator = SimpleNamespace(num_blocks=num_blocks, block_size=4)
    scheduler = SimpleNamespace(running=sequences, num_waiting=5, allocator=allocator)
    return concurrency.watcher(name, requests)(scheduler)


@pytest.mark.parametrize(
    "name, lengths, now, computed, num_blocks, expected",
    [
        # used, tail, later, never, free behind running, waiting and held.
        # 6 of 9 tokens in 2 blocks: 2 slots of the second are unfilled.
        ("paged", (4, 5), 6, 6, 2, (1, 5, 8, 6, 2, 0, 0, 56)),
        # 6 of 13 tokens in 6 blocks, which buddies make 8: 2 of tail, 5 later, the other 19 never.
        ("oracle, buddies", (4, 9), 6, 6, 6, (1, 5, 24, 6, 2, 5, 19, 32)),
        # A prompt of which 5 tokens are computed fills its blocks later.
        ("paged", (12, 5), 12, 5, 3, (1, 5, 12, 5, 3, 4, 0, 52)),
    ],
)
def test_each_slot_of_the_pool_is_used_tail_later_never_or_free(
    name, lengths, now, computed, num_blocks, expected
):
    found = seen(
        name,
        [Arrival(0.0, *lengths)],
        [sequence(0, lengths[0], now, computed, list(range(num_blocks)))],
    )
    assert found == expected
    assert found._fields[3:] == ("used", "tail", "later", "never", "free")


def test_who_is_complete_and_pads_a_static_batch_does_not_run_and_uses_nothing():
    requests = [Arrival(0.0, 4, 2), Arrival(0.0, 4, 9)]
    both = [sequence(0, 4, 8, 8, [0, 1, 2, 3]), sequence(1, 4, 8, 8, [4, 5, 6, 7])]
    found = seen("static batches", requests, both)
    assert found == (1, 5, 32, 8, 0, 5, 19, 32)
    # In the step that computes its last token it runs for the last time.
    both[0] = sequence(0, 4, 5, 5, [0, 1, 2, 3])
    assert seen("static batches", requests, both).running == 2
    both[0] = sequence(0, 4, 6, 6, [0, 1, 2, 3])
    assert seen("static batches", requests, both).running == 1


def test_the_steps_that_count_are_those_in_which_somebody_waits():
    def step(queued, waiting, running):
        return Step(1.0, 1.0, 1, 1, 0, queued, concurrency.Memory(running, waiting, *[0] * 6))

    steps = [step(0, 3, 10), step(2, 0, 20), step(0, 0, 30)]
    assert [each.running for each in concurrency.saturated(Run([], steps))] == [10, 20]
    assert [each.running for each in concurrency.saturated(Run([], steps[2:]))] == [30]


def test_in_each_step_the_shares_are_the_whole_pool(chats):
    machine = Machine(parse("--simulate --blocks 256"), 1024)
    for name in CONTENDERS:
        run = machine.serve(name, chats[:60], concurrency.watcher(name, chats[:60]))
        for step in run.steps:
            assert sum(step.seen[3:]) == 256 * 16 and min(step.seen) >= 0
            assert step.seen.used + step.seen.tail <= step.seen.held


def test_the_figures_of_a_run_worked_out_by_hand():
    # Two steps of a pool of 40 tokens, somebody waits in both; one request of 5 tokens and 2 more.
    books = [(1, 1, 16, 6, 2, 4, 4, 24), (3, 1, 24, 12, 2, 6, 4, 16)]
    steps = [
        Step(end_s, 500.0, new_tokens, 9, 0, 0, concurrency.Memory(*book))
        for end_s, new_tokens, book in zip((0.5, 1.0), (5, 4), books, strict=True)
    ]
    one = Served(Arrival(0.0, 5, 2), array("d", [0.5, 1.0]), num_preemptions=1)
    figures = concurrency.figures_of(Run([one], steps))
    assert {f"{metric}, {unit}": value for (metric, unit), value in figures.items()} == {
        "running at once, mean, requests": 2,
        "running at once, peak, requests": 3,
        "generated tokens, tokens/s": 2,
        "served, requests/s": 1,
        "work done, tokens": 2,
        "share of the blocks held that is used, %": 45,  # 9 of 20, on the average
        "share of the pool: used, %": 22.5,
        "share of the pool: tail, %": 5,
        "share of the pool: later, %": 12.5,
        "share of the pool: never, %": 10,
        "share of the pool: free, %": 50,
        "preempted, times": 1,
        "computed beyond one time each, %": 50,  # 9 tokens, of which 6 are needed
    }


def test_only_paged_preempts_and_only_static_batches_pad(rounds):
    again = {name: found["computed beyond one time each", "%"] for name, found in rounds.items()}
    assert {name for name, found in rounds.items() if found["preempted", "times"]} == {"paged"}
    assert {name for name, share in again.items() if share} == {"paged", "static batches"}
    assert again["static batches"] > again["paged"]


def test_paged_reaches_93_percent_of_each_bound_and_96_percent_of_its_blocks(rounds, chats):
    most = concurrency.bounds(RESERVING, chats, 1024, 16)
    running = {name: f["running at once, mean", "requests"] for name, f in rounds.items()}
    for name, bound in most.items():
        assert running["paged"] / running[name] >= 0.93 * bound, name
    assert rounds["paged"]["share of the blocks held that is used", "%"] >= 96
    # The pool has 16 slabs of 1,024; the first steps are short of budget, not of memory.
    assert 15.9 < running["maximum, buddies"] <= 16
    assert running["static batches"] < running["maximum, buddies"]


def test_where_memory_is_plenty_paging_gains_nothing_and_that_is_said(monkeypatch, capsys):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)
    args = parse("--simulate --requests 60 --blocks 8192 --budget 512 --loads")
    args.policies = ["maximum, buddies"]
    rows = list(concurrency.run(args))
    assert [r.median for r in rows if r.metric == "as many run at once paged"] == [1.0]
    assert "the budget of a step decides who runs, not memory" in capsys.readouterr().out


# ---- real and simulated --------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONTENDERS)
def test_the_real_engine_does_in_each_step_what_the_simulation_says(name):
    requests = at_once(fit_context(draw_chats(400, seed=3), 1024, "filter")[0])[:10]
    short = [Arrival(0.0, max(1, r[1] // 32), max(1, r[2] // 16)) for r in requests]
    words = "--block-size 4 --blocks 16 --budget 40 --backend torch"
    steps = {}
    for flag in ("", "--simulate"):
        machine = Machine(parse(f"{words} {flag}"), 64)
        run = machine.serve(name, short, concurrency.watcher(name, short))
        steps[flag] = [(step[2:], len(run.served)) for step in run.steps]
    assert steps[""] == steps["--simulate"] and len(steps[""]) > 20


# ---- goodput and rows ----------------------------------------------------------------------------
def test_goodput_counts_who_is_served_within_the_target():
    fast = Served(Arrival(0.0, 1, 2), array("d", [0.010, 0.020]))  # 10 ms a token
    slow = Served(Arrival(4.0, 1, 2), array("d", [4.010, 4.022]))  # 11 ms
    figures = concurrency.goodput_of(10.0)(Run([fast, slow], []))
    assert figures == {
        ("goodput", "requests/s"): 1 / 4.0,
        ("share of the requests in time", "%"): 50.0,
    }


def test_a_load_is_a_part_of_the_rate_that_paging_sustained():
    given = []

    def in_turn(names, requests, figures_of):
        given.append(requests[-1].arrival_s)
        return [(name, ["figures"]) for name in names]

    workload = SimpleNamespace(requests=draw_short(1000, seed=0))
    loads = concurrency.measure_loads(
        ["paged"], workload, SimpleNamespace(in_turn=in_turn), 20.0, parse("--loads 0.5 2")
    )
    assert list(loads) == [
        ("poisson load=0.5 rate=10/s target=50ms", "paged", ["figures"]),
        ("poisson load=2 rate=40/s target=50ms", "paged", ["figures"]),
    ]
    assert given == pytest.approx([100, 25], rel=0.1)  # seconds until the 1,000th came


def test_the_rows_say_who_ran_in_how_many_bytes_and_against_which_bound(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)
    args = parse("--simulate --requests 80 --blocks 384 --loads 0.5")
    list(append(tmp_path / "rows.csv", concurrency.run(args)))
    rows = read(tmp_path / "rows.csv")
    said = capsys.readouterr().out
    assert "drawn from the published lengths: " in said and "maximum, perfect fit" in said
    assert "in the paper's order" in said and "NOT" not in said
    pools = {row["contender"]: row["median"] for row in rows if row["metric"] == "pool"}
    assert pools == dict.fromkeys(CONTENDERS, 384 * 16 * 36_864)

    def figure(name, metric):
        (row,) = [r for r in rows if (r["contender"], r["metric"]) == (name, metric)]
        return row["median"]

    for name in RESERVING:
        many = figure(name, "as many run at once paged")
        mean = "running at once, mean"
        assert many == pytest.approx(figure("paged", mean) / figure(name, mean))
        bound = figure(name, "as many could run at once paged")
        assert figure(name, "share of that bound") == pytest.approx(100 * many / bound)
        assert f"{bound:.2f} x as many run" in said
    assert 0 < figure("paged", "goodput") <= figure("paged", "served")
    loads = {row["workload"] for row in rows if row["metric"] == "goodput"}
    assert len(loads) == 1 and "poisson load=0.5 rate=" in loads.pop()


@pytest.mark.parametrize("words", ["--loads 0.5 0", "--target 0", "--target -3 --loads"])
def test_a_rate_or_a_target_of_nothing_is_refused(words):
    with pytest.raises(ValueError, match="rates and times are above 0"):
        next(concurrency.run(parse(f"--simulate {words}")))
