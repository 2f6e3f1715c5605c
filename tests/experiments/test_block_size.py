"""The sweep over block sizes: what is counted can be counted by hand, what is timed is the same."""

import itertools

import pytest
from rows import pick, run

import benchmark
from experiments import block_size, speed

SPEED = "--batch 2 --prompt-tokens 9 --new-tokens 3 --rounds 2"
BOOKS = "--requests 12 --max-seq-len 64"


def arguments(words):
    return benchmark.parse_args(["block-size", *words.split()])


def pool(size, num_blocks):
    return block_size.make_scheduler(size, num_blocks, 64)


# ---- memory --------------------------------------------------------------------------------------
def test_one_sequence_fills_its_blocks_as_it_grows():
    # 3 tokens, then 4, 5, 6 in the cache: 1 block of 4, 1, 2 and 2. The last token is not computed.
    tally = block_size.play(pool(4, 8), [(3, 4)])
    assert (tally.steps, tally.tokens, tally.held) == (4, 18, 4 + 4 + 8 + 8)
    assert (tally.scheduled, tally.preempted, tally.copied) == (4, 0, 0)


def test_a_pool_that_is_too_small_preempts_and_all_is_computed_again():
    # Two sequences of 6 + 8 tokens want 4 blocks of 4 each; there are 6.
    tally = block_size.play(pool(4, 6), [(6, 8), (6, 8)])
    # Both hold 3 blocks at 12 tokens; one more, and the second gives up its 12.
    assert (tally.preempted, tally.recomputed) == (1, 12)
    assert block_size.play(pool(4, 8), [(6, 8), (6, 8)]).preempted == 0


def test_pools_of_all_block_sizes_hold_the_same_tokens(tmp_path):
    sizes = "--block-sizes 1 16 32"
    rows = run(tmp_path, f"block-size --batch 0 {sizes} {BOOKS} --pool-percent 60")
    for name in ("ShareGPT", "Alpaca"):
        found = [row for row in rows if row["workload"].startswith(f"memory {name} ")]
        (workload,) = {row["workload"] for row in found}
        lengths = block_size.draw_lengths(name, arguments(BOOKS))
        wanted = sum(prompt + new - 1 for prompt, new in lengths)
        tokens = max(wanted * 60 // 100, 64 + 32)
        assert workload == f"memory {name} requests=12 pool_tokens={tokens}"
        filled = [row["median"] for row in pick(found, metric="share of held memory filled")]
        assert filled[0] == 100 and filled == sorted(filled, reverse=True)
        for row in pick(found, metric="preempted"):
            size = int(row["contender"].removeprefix("block_size="))
            again = block_size.play(pool(size, tokens // size), lengths)
            assert row["median"] == again.preempted
        steps = [row["median"] for row in pick(found, metric="steps")]
        assert steps[0] <= steps[-1]  # as fewer run at once, it takes longer


def test_lengths_have_the_means_of_the_data_sets_and_fit():
    args = arguments("--requests 4000 --max-seq-len 100000")
    for name, (prompt_mean, new_mean) in block_size.MEANS.items():
        prompts, new = zip(*block_size.draw_lengths(name, args), strict=True)
        assert sum(prompts) / 4000 == pytest.approx(prompt_mean, rel=0.05)
        assert sum(new) / 4000 == pytest.approx(new_mean, rel=0.05)
        cut = block_size.draw_lengths(name, arguments("--requests 200 --max-seq-len 64"))
        assert all(1 <= tokens <= 32 for both in cut for tokens in both)
    assert block_size.draw_lengths("Alpaca", args) == block_size.draw_lengths("Alpaca", args)


# ---- copies --------------------------------------------------------------------------------------
# 6 tokens in blocks of 4: the second is not full. Three of four texts copy it, the last owns it.
@pytest.mark.parametrize(
    ("size", "copied"), [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 0), (8, 3)]
)
def test_a_tail_that_is_full_is_not_copied(size, copied):
    assert block_size.play(pool(size, 64), [(6, 4)], forks=4).copied == copied


def test_bytes_copied_are_whole_blocks_of_gpt2(tmp_path):
    rows = run(tmp_path, f"block-size --batch 0 --block-sizes 4 8 {BOOKS}")
    for row in pick(rows, metric="blocks copied"):
        what = {"contender": row["contender"], "workload": row["workload"]}
        (num_bytes,) = pick(rows, unit="bytes copied", **what)
        size = int(row["contender"].removeprefix("block_size="))
        assert num_bytes["median"] == row["median"] * size * 36_864 > 0


# ---- speed ---------------------------------------------------------------------------------------
def test_speed_runs_each_block_size_and_compares_with_the_first(tmp_path):
    rows = run(tmp_path, f"block-size --block-sizes 4 1 16 {SPEED} --requests 0")
    assert {row["workload"] for row in rows} == {"speed batch=2 prompt=9 new=3"}
    assert {row["backend"] for row in rows} <= {"numba", "torch", "triton"}
    steps = pick(rows, metric="time a step")
    names = [f"block_size={size}" for size in (4, 1, 16)]
    assert [(row["contender"], row["repeats"]) for row in steps] == [(name, 2) for name in names]
    held = [row["median"] for row in pick(rows, unit="bytes")]
    # 9 + 3 tokens without the newest are 11: 12, 11 and 16 places, 12,288 bytes a token.
    assert held == [2 * 12 * 12_288, 2 * 11 * 12_288, 2 * 16 * 12_288]
    ratios = pick(rows, metric="speed against block_size=4")
    assert [row["contender"] for row in ratios] == ["block_size=1", "block_size=16"]
    assert ratios[0]["median"] == pytest.approx(steps[0]["median"] / steps[1]["median"])


def test_a_block_size_that_writes_other_tokens_fails_the_run(tmp_path, monkeypatch):
    trial_of = speed.time_trial
    offsets = itertools.count()  # each trial writes other tokens than the one before

    def spoiled(*arguments):
        trial, offset = trial_of(*arguments), next(offsets)
        trial.token_ids = [[token_id + offset for token_id in ids] for ids in trial.token_ids]
        return trial

    monkeypatch.setattr(speed, "time_trial", spoiled)
    with pytest.raises(SystemExit, match="wrote 0% as the first way did"):
        run(tmp_path, f"block-size --block-sizes 8 4 {SPEED} --requests 0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--block-sizes 16 0", "block_size is 0"),
        ("--max-seq-len 1", "max_seq_len is 1"),
        ("--new-tokens 1", "new_tokens is 1"),
        ("--prompt-tokens 1020", "1020 prompt tokens and 32 new ones"),
    ],
)
def test_sizes_of_which_no_run_can_be_made_are_refused(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, f"block-size {words}")
