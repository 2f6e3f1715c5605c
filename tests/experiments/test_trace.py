"""Which requests come and when, from a file or drawn, and what a run says about its rate.

Traces of two lines are read as literals; a malformed one must name its line and the reason. What a
run says is worked out by hand on steps of a second each.
"""

import argparse
import itertools
import json
from array import array

import pytest

from experiments import trace
from experiments.results import append, percentile, read
from experiments.simulate import Arrival, CostModel, PoolState, Run, Served, Step

TWO = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
TWO += "2023-11-16 18:15:50.9951690,396,109"  # no newline at the end, as in Azure's file


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)


@pytest.fixture
def csv_file(tmp_path):
    """40 requests of 5 to 44 tokens in and 3 to 12 out, one every 2 seconds."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(40):
        lines.append(f"2023-11-16 18:{i // 30:02}:{2 * i % 60:02}.0000000,{5 + i},{3 + i % 10}")
    path = tmp_path / "forty.csv"
    path.write_text("\n".join(lines))
    return path


def parse(words):
    parser = argparse.ArgumentParser()
    trace.add_arguments(parser)
    return parser.parse_args(words.split())


# ---- reading -------------------------------------------------------------------------------------
def test_a_trace_is_read_with_all_its_decimals_and_without_a_last_newline(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text(TWO)
    first, second = trace.read_trace(path)
    assert first == Arrival(0.0, 374, 44) and second[1:] == (396, 109)
    assert second.arrival_s == pytest.approx(4.314579, abs=2e-7)
    path.write_text(TWO.replace("50.9951690", "50.0051690"))
    assert trace.read_trace(path)[1].arrival_s == pytest.approx(3.324579, abs=2e-7)
    header, *both = TWO.split("\n")
    path.write_text("\n".join((header, *reversed(both))))
    assert [request[1:] for request in trace.read_trace(path)] == [first[1:], second[1:]]
    path.write_text(TWO + "\n")
    assert trace.read_trace(path) == [first, second]
    path.write_bytes(TWO.replace("\n", "\r\n").encode())
    assert trace.read_trace(path) == [first, second]


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("ContextTokens,", "", "line 1: the header is "),
        ("374,44", "374", "line 2: 2 cells, 3 are needed"),
        ("396,109", "396,109,1", "line 3: 4 cells, 3 are needed"),
        ("374,44", "374,44\n", "line 3: 0 cells, 3 are needed"),
        ("396", "3.5", "line 3: ContextTokens is '3.5': it must be an integer of at least 1"),
        (",109", ",0", "line 3: GeneratedTokens is '0': it must be an integer of at least 1"),
        (",44", ",-44", "line 2: GeneratedTokens is '-44'"),
        (",44", ",", "line 2: GeneratedTokens is ''"),
        (",44", ",\u0664", "line 2: GeneratedTokens is '\u0664'"),
        ("11-16 18:15:46", "13-16 18:15:46", "line 2: TIMESTAMP is '2023-13-16"),
        ("46.6805900", "46.68x", "line 2: TIMESTAMP is "),
        ("46.6805900", "46.-5", "line 2: TIMESTAMP is "),
        ("46.6805900", "46+01:00", "line 2: TIMESTAMP is "),
        ("374,44", '374,"44', "line 3: "),
        (TWO[TWO.index("\n") :], "", "line 1: there is no request after the header"),
        (TWO, "", "line 1: the header is None"),
    ],
)
def test_a_malformed_trace_names_the_line_and_the_reason(tmp_path, old, new, reason):
    path = tmp_path / "bad.csv"
    path.write_text(TWO.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        trace.read_trace(path)
    assert f"bad.csv, {reason}" in str(raised.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.csv cannot be read: .*No such file"):
        trace.read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(TWO.encode() + b"\n\xff\xfe,1,2")
    with pytest.raises(ValueError, match="bytes.csv, line "):
        trace.read_trace(tmp_path / "bytes.csv")


def test_the_public_trace_is_as_its_description_says(data_folder):
    requests = trace.read_trace(data_folder / trace.TRACE_NAME)
    assert len(requests) == 19_366
    kept, sentence = trace.fit_context(requests, 1024, "filter")
    assert len(kept) == 8_134
    assert sentence == "8,134 of 19,366 requests fit 1,024 tokens, the others are left out"
    assert percentile([r.prompt_tokens for r in requests], 50) == 1020
    assert percentile([r.output_tokens for r in requests], 50) == 129
    assert len(requests) / requests[-1].arrival_s == pytest.approx(trace.DRAWN_PER_S, rel=0.01)


# ---- lengths -------------------------------------------------------------------------------------
THREE = [Arrival(0.0, 900, 124), Arrival(1.0, 1000, 200), Arrival(2.0, 3, 5000)]


def test_longer_requests_are_left_out_or_scaled_both_lengths_by_one_factor():
    assert trace.fit_context(THREE, 1024, "filter")[0] == THREE[:1]
    with pytest.raises(ValueError, match="0 of 3 requests fit 100 tokens"):
        trace.fit_context(THREE, 100, "filter")
    kept, sentence = trace.fit_context(THREE, 600, "scale")
    # 900 and 124 of 1,024 in 600: 527.3 and 72.6; 1,000 and 200 in 600: half of each.
    assert kept == [Arrival(0.0, 527, 72), Arrival(1.0, 500, 100), Arrival(2.0, 1, 599)]
    assert sentence == "0 of 3 requests fit 600 tokens, the others are scaled down to that"
    assert trace.fit_context(THREE, 6000, "scale")[0] == THREE


def test_a_scaled_request_has_a_token_of_each_and_fits():
    for prompt, output, shrink, most in itertools.product(
        (1, 2, 7, 50, 1023), (1, 3, 64, 1000), (1, 2, 3, 100), (2, 3, 341)
    ):
        scaled = trace.scale(Arrival(0.0, prompt, output), 1, shrink, most)
        assert min(scaled[1:]) >= 1 and sum(scaled[1:]) <= most
        if prompt // shrink and output // shrink and (prompt + output) // shrink <= most:
            assert scaled[1:] == (prompt // shrink, output // shrink)


def test_without_a_file_lengths_have_the_published_medians():
    chats = trace.draw_chats(20_000, seed=1)
    assert percentile([r.prompt_tokens for r in chats], 50) == pytest.approx(1020, rel=0.03)
    assert percentile([r.output_tokens for r in chats], 50) == pytest.approx(129, rel=0.03)
    # e ** 0.859 times the median: a deviation above it, so 84.1% are shorter.
    assert sum(r.output_tokens < 129 * 2.361 for r in chats) / 20_000 == pytest.approx(0.841, 0.01)
    assert min(r.prompt_tokens for r in chats) >= 1
    assert chats == trace.draw_chats(20_000, seed=1) != trace.draw_chats(20_000, seed=2)


# ---- which of them -------------------------------------------------------------------------------
def test_a_file_is_named_by_a_flag_or_found_in_the_data_folder(tmp_path, csv_file, monkeypatch):
    found = trace.make_workload(parse(f"--simulate --trace {csv_file}"))
    assert found.name == "forty, filter 1024, requests=40"
    assert found.sentence == (
        "forty: 40 of 40 requests fit 1,024 tokens, the others are left out; 40 are served"
    )
    folder = tmp_path / "traces"
    folder.mkdir()
    csv_file.rename(tmp_path / trace.TRACE_NAME)
    monkeypatch.setenv("PAGEDGPT_DATA", str(tmp_path))
    again = trace.make_workload(parse("--simulate"))
    assert again.requests == found.requests
    assert again.name.startswith("AzureLLMInferenceTrace_conv_2023, ")


def test_the_real_engine_gets_few_requests_of_a_quarter_of_the_length(no_data):
    found = trace.make_workload(parse(""))
    assert (len(found.requests), found.max_seq_len) == (48, 256)
    assert "filter 1024 / 4, " in found.name and "divided by 4; 48 are served" in found.sentence
    assert max(r.prompt_tokens + r.output_tokens for r in found.requests) <= 256


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--max-seq-len 1", "--max-seq-len is 1: it must be at least 2"),
        ("--shrink 0", "--shrink is 0: it must be at least 1"),
        ("--shrink 600", "--shrink 600 leaves 1 tokens of context: lower it"),
        ("--requests 1", "--requests is 1: it must be at least 2"),
        ("--block-size 0", "--block-size is 0: it must be at least 1"),
        ("--factors 0", "--factors has 0.0: a rate is a number above 0"),
        ("--blocks 63", "--blocks 63: one slab alone needs 64, raise it"),
        ("--cost 1 -1 0", "--cost 1.0 -1.0 0.0: none below 0, one above it"),
        ("--cost 0 0 0", "--cost 0.0 0.0 0.0: none below 0, one above it"),
        ("--trace no.csv", "no.csv cannot be read"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_in_one_sentence(no_data, words, reason):
    args = parse(f"--simulate --requests 50 {words}")
    with pytest.raises(ValueError) as raised:
        list(trace.run(args))
    assert reason in str(raised.value) and "\n" not in str(raised.value)


# ---- when they come ------------------------------------------------------------------------------
def test_random_arrivals_have_the_traces_rate_times_the_factor():
    requests = [Arrival(2.0 * i, 1, 1) for i in range(3001)]
    drawn = trace.at_rate(requests, "poisson", 8.0, seed=4)
    assert drawn[-1].arrival_s == pytest.approx(3001 / 4.0, rel=0.05)
    with pytest.raises(ValueError, match="all requests arrive at once"):
        trace.at_rate([Arrival(1.0, 1, 1)] * 3, "poisson", 1.0, seed=0)


# ---- what a run says -----------------------------------------------------------------------------
def hand_made_run():
    """Two requests: one of two tokens from 0 to 2 s, one of three from 1 to 8 s."""
    first = Served(Arrival(0.0, 3, 2), array("d", [1.0, 2.0]))
    second = Served(Arrival(1.0, 2, 3), array("d", [2.0, 4.0, 8.0]), num_preemptions=1)
    ends = [(1.0, 1), (2.0, 2), (4.0, 1), (8.0, 1)]
    steps = [
        Step(end, 1000.0 * width, 1, 1, 0, 0, PoolState(running, 0, 1))
        for (end, running), width in zip(ends, (1, 1, 2, 4), strict=True)
    ]
    return Run([first, second], steps)


def test_the_figures_of_a_run_worked_out_by_hand():
    figures = trace.figures_of(hand_made_run())
    assert figures["normalised latency, mean", "s/token"] == pytest.approx((2 / 2 + 7 / 3) / 2)
    assert [figures[f"time to first token, p{p}", "ms"] for p in (50, 99)] == [1000, 1000]
    gaps = [figures[f"time between tokens, p{p}", "ms"] for p in (50, 90, 99)]
    assert gaps == [2000, 4000, 4000]  # 1, 2 and 4 seconds
    assert figures["generated tokens", "tokens/s"] == 5 / 8
    assert figures["preempted", "times"] == 1
    # Tenths of 0.8 s: in the second, 0.2 s with one and 0.6 s with two.
    tenths = [figures[f"running, mean of tenth {i} of the run", "requests"] for i in range(1, 11)]
    assert tenths == pytest.approx([1, 1.75, 1.5, 1, 1, 1, 1, 1, 1, 1])


# ---- the experiment ------------------------------------------------------------------------------
def test_latency_grows_with_the_rate_and_grows_sooner_where_the_maximum_is_reserved(
    tmp_path, no_data, csv_file, capsys
):
    args = parse(
        f"--simulate --trace {csv_file} --max-seq-len 64 --blocks 16 --factors 1 200 "
        "--cost 10 0.1 0.001"
    )
    args.policies = ["paged", "maximum, buddies"]
    list(append(tmp_path / "rows.csv", trace.run(args)))
    rows = read(tmp_path / "rows.csv")
    assert "40 of 40 requests fit 64 tokens" in capsys.readouterr().out
    latency = [row for row in rows if row["metric"].startswith("normalised")]
    slow, fast = latency[:2], latency[2:]
    assert [row["contender"] for row in slow] == ["paged", "maximum, buddies"]
    assert slow[0]["median"] == pytest.approx(slow[1]["median"])  # nobody waits
    assert fast[0]["median"] > slow[0]["median"]
    assert fast[1]["median"] > 1.5 * fast[0]["median"]
    assert "forty, filter 64, requests=40, poisson factor=1 rate=" in slow[0]["workload"]
    assert "blocks=16 block_size=16 cost=10+0.1+0.001" in slow[0]["workload"]
    assert {row["device"] for row in rows} == {"a simulated clock"}
    assert len(rows) == 4 * (1 + 3 + 3 + 1 + 1 + 10)


def test_the_real_engine_serves_a_trace_on_the_clock_on_the_wall(tmp_path, no_data, csv_file):
    words = f"--trace {csv_file} --requests 8 --shrink 2 --factors 20 --repeats 2 --backend torch"
    rows = list(append(tmp_path / "rows.csv", trace.run(parse(words))))
    figures = {row.metric: row for row in rows}
    assert figures["time to first token, p50"].repeats == 2
    assert 0 < figures["time between tokens, p50"].min
    # 8 requests at 10 a second: no engine is done before the last has come.
    workload = trace.make_workload(parse(words))
    last_s = trace.at_rate(workload.requests, "poisson", 20.0, seed=0)[-1].arrival_s
    tokens = sum(request.output_tokens for request in workload.requests)
    assert 0 < figures["generated tokens"].max < tokens / last_s
    assert {(row.model, row.threads) for row in rows} == {("tiny-gpt2", 1)}


def test_the_cost_is_fitted_to_a_recording_without_its_first_step(tmp_path):
    known, lines = CostModel(2.0, 0.5, 0.01), []
    zeros = dict.fromkeys(("num_waiting", "num_free", "blocks_taken", "blocks_freed"), 0)
    zeros |= {f"blocks_{word}": 0 for word in ("copied", "hit", "evicted", "swapped")}
    for number, work in enumerate([(9, 9), (1, 300), (8, 2400), (64, 900), (5, 5)], 1):
        idle = {"new_tokens": 0, "num_computed_tokens": 999, "phase": None}
        ran = {"new_tokens": work[0], "num_computed_tokens": work[1], "phase": "prefill"}
        names = {"request": "0", "index": 0, "finish_reason": None, "block_table": []}
        line = {"step": number, "sequences": [ran | names, idle | names], **zeros}
        line |= {"added": [], "aborted": [], "preempted": []}
        milliseconds = 5000.0 if number == 1 else known.step_ms(*work)
        lines.append(json.dumps(line | {"milliseconds": milliseconds}))
    header = {"format": "PagedGPT recording", "version": 1, "num_blocks": 8, "block_size": 16}
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join([json.dumps(header), *lines, ""]))
    cost, sentence = trace.cost_model(parse(f"--simulate --cost-from {path}"))
    assert cost == pytest.approx(known)
    assert f"fitted to 4 steps of {path}" in sentence


def test_an_idle_engine_counts_as_nobody_running():
    run = hand_made_run()
    idle = Run(run.served, [run.steps[0], Step(10.0, 1000.0, 1, 1, 0, 0, PoolState(3, 0, 1))])
    assert trace.running_over_time(idle, 10) == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0, 0, 3])


def test_recorded_arrivals_come_a_factor_sooner():
    requests = [Arrival(10.0, 1, 2), Arrival(12.0, 3, 4), Arrival(18.0, 5, 6)]
    twice = trace.at_rate(requests, "recorded", 2.0, seed=0)
    assert twice == [Arrival(0.0, 1, 2), Arrival(1.0, 3, 4), Arrival(4.0, 5, 6)]
