"""What is measured on sharing: hits and the blocks of a fork, counted by hand; equal work."""

import json

import pytest
from rows import pick, run

from experiments import block_trace
from experiments.block_trace import read_blocks, replay


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)


def value(rows, contender, metric, workload):
    (row,) = [
        r for r in pick(rows, contender=contender, metric=metric) if workload in r["workload"]
    ]
    return row["median"]


def test_of_a_common_prefix_whole_blocks_are_not_computed_again(tmp_path):
    rows = run(tmp_path, "sharing --parts prefix --shared 0 40 --rounds 1")
    cached = [value(rows, "prefix cache", "tokens not recomputed", f"={n} ") for n in (0, 40)]
    assert cached == [0, 32]  # 40 tokens have two whole blocks of 16
    computed = [value(rows, "prefix cache", "tokens computed", f"={n} ") for n in (0, 40)]
    assert computed == [20, 60 - 32]
    assert value(rows, "no prefix cache", "tokens computed", "=40 ") == 60


def test_a_turn_of_a_chat_computes_only_what_is_new(tmp_path):
    """Random questions of 30 tokens, answers of 5: histories of 30, 65 and 100 tokens."""
    rows = run(tmp_path, "sharing --parts chat --turns 3 --answer 5 --rounds 1")
    without = [value(rows, "no prefix cache", "tokens computed", f"turn={n} ") for n in (1, 2, 3)]
    assert without == [30 + 4, 65 + 4, 100 + 4]  # the fifth token of an answer is not computed
    found = [value(rows, "prefix cache", "tokens not recomputed", f"turn={n} ") for n in (1, 2, 3)]
    assert found == [0, 32, 64]  # of 34 and 69 tokens known before: whole blocks of 16
    share = value(rows, "prefix cache", "prompt tokens not recomputed", "turns=3")
    assert share == pytest.approx(100 * 96 / 195)


def test_four_texts_compute_their_prompt_once_and_copy_its_last_block_three_times(tmp_path):
    """A prompt of 20 tokens and 4 new ones, in blocks of 16: 1 full block and 4 more."""
    rows = run(tmp_path, "sharing --parts forks --prompt-tokens 20 --new-tokens 4 --rounds 1")
    n4, with_cache, without = (
        "one request, n=4",
        "4 requests, prefix cache",
        "4 requests, no prefix cache",
    )

    def of(metric):
        return [value(rows, name, metric, "forks") for name in (n4, with_cache, without)]

    assert of("blocks held at most") == [1 + 4, 1 + 4, 4 * 2]
    assert of("blocks copied") == [3, 0, 0]
    # Each text's first three tokens are computed, too; the prompt once, or 20 + 3 x 4, or 4 times.
    assert of("tokens computed") == [20 + 12, 20 + 12 + 12, 80 + 12]


def test_blocks_saved_are_those_of_texts_and_beams(tmp_path):
    words = "--lengths Alpaca --requests 2 --widths 1 2 --seed 1"
    rows = run(tmp_path, f"sharing --parts blocks {words}")
    assert len(rows) == 2 * 2 * 3  # two widths, texts and beams, three figures
    for contender in ("texts", "beams"):
        alone, two = (f"blocks Alpaca random requests=2 width={width}" for width in (1, 2))
        assert value(rows, contender, "blocks saved", alone) == 0
        figures = ("blocks held, all steps", "blocks without sharing, all steps")
        held, unshared = (value(rows, contender, figure, two) for figure in figures)
        saved = value(rows, contender, "blocks saved", two)
        assert saved == pytest.approx(100 * (1 - held / unshared)) and 0 < saved < 60


def test_the_throughput_is_of_runs_that_found_the_prefix(tmp_path):
    words = "--large-model assets/tiny-gpt2 --large-requests 3 --large-shared 40 --large-new 2"
    rows = run(tmp_path, f"sharing --parts throughput --large-rounds 1 --budget 64 {words}")
    assert value(rows, "prefix cache", "tokens not recomputed", "shared=40") == 2 * 32
    assert value(rows, "prefix cache", "tokens computed", "shared=40") == 3 * 61 - 64
    assert value(rows, "no prefix cache", "tokens not recomputed", "shared=40") == 0
    assert len(pick(rows, metric="throughput against no prefix cache")) == 1


# ---- the trace of block hashes -------------------------------------------------------------------
def write_trace(path, requests):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"timestamp": t, "hash_ids": ids}) for t, ids in requests]
    path.write_text("\n".join(lines) + "\n")


REQUESTS = [(0, [0, 1, 2, 3]), (5, [0, 1, 2, 4, 5]), (9, [0, 9]), (9, [0, 1, 2, 3])]


def test_a_pool_without_end_finds_each_block_that_came_before():
    found = replay([ids for _, ids in REQUESTS], 7)
    assert (found.num_hits, found.num_blocks, found.num_evicted) == (0 + 3 + 1 + 4, 15, 0)


def test_a_small_pool_evicts_the_least_recently_used_leaf():
    """5 blocks: the second request evicts 3, the third one 5; so 3 is missing at the end."""
    found = replay([ids for _, ids in REQUESTS], 5)
    assert (found.num_hits, found.num_evicted) == (0 + 3 + 1 + 3, 3)


def test_the_same_number_behind_other_blocks_is_not_found():
    assert replay([[0, 7], [1, 7]], 9).num_hits == 0


def test_the_trace_is_read_from_the_data_folder_and_else_skipped(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "one", "sharing --parts prefix trace --shared 0 --rounds 1")
    assert "the part trace is skipped: PAGEDGPT_DATA names no folder" in capsys.readouterr().out

    monkeypatch.setattr(block_trace, "POOLS", [5])
    write_trace(tmp_path / block_trace.TRACE_NAME, REQUESTS[::-1])  # sorted by time
    monkeypatch.setenv("PAGEDGPT_DATA", str(tmp_path))
    rows = run(tmp_path / "two", "sharing --parts trace")
    found = [(row["contender"], row["median"]) for row in pick(rows, metric="blocks found")]
    assert found == [
        ("pool of 5 blocks", pytest.approx(100 * 7 / 15)),
        ("pool without end", pytest.approx(100 * 8 / 15)),
    ]


@pytest.mark.parametrize("line", ["{", '{"hash_ids": [1]}', '{"timestamp": 0, "hash_ids": ["1"]}'])
def test_a_spoiled_line_of_a_trace_is_named(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n' + line)
    with pytest.raises(ValueError, match=r"trace.jsonl, line 2: "):
        read_blocks(path)


def test_a_number_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--turns is 0: it must be at least 1"):
        run(tmp_path, "sharing --turns 0")
