"""A recording: one line a step, written from outside; cut anywhere, it loses no finished line."""

import contextlib
import io
import json

import pytest
import torch

import generate
from block_allocator import BlockAllocator
from engine import InferenceEngine
from kv_cache import KVCache
from prefix_cache import PrefixCache
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import Continuation
from speedups.plan_ahead import AheadEngine
from watch.recorder import STEP_FIELDS, Describer, Recorder, holders, read_recording, strips

FIVE = [(6, 9), (10, 12), (3, 4), (5, 6), (8, 5)]  # prompt and written tokens: the pool runs dry


def always_zero(batch):
    return torch.zeros(len(batch.sample_rows), 2)


def stand_in(kind=InferenceEngine, forward=always_zero, max_num_batched_tokens=16, allocator=None):
    """An engine over 8 blocks of 4 with the real scheduler; its model always says token 0."""
    allocator = allocator or BlockAllocator(8, 4)
    cache = KVCache(1, allocator.num_blocks, 4, num_kv_heads=1, head_dim=1)
    scheduler = Scheduler(allocator, 4, max_num_batched_tokens, max_seq_len=64)
    return kind(forward, cache, scheduler, vocab_size=2)


def watched(path, **parts):
    """A stand-in that is recorded."""
    engine = stand_in(**parts)
    engine.watchers.append(Recorder(engine.scheduler, path))
    return engine


def wanting(num_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=num_tokens, **more)


def run_all(engine, path):
    """Step until all is done; the steps that were recorded."""
    while engine.has_unfinished():
        engine.step()
    return read_recording(path)[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "recording.jsonl"


@pytest.fixture
def five(path):
    """A recorded run of five requests, with preemptions: the file."""
    engine = watched(path)
    for prompt, written in FIVE:
        engine.add_request([1] * prompt, wanting(written))
    run_all(engine, path)
    return path


# ---- what is written -----------------------------------------------------------------------------
def test_the_header_names_the_format_and_the_pool_and_replaces_what_stood_there(five):
    Recorder(stand_in().scheduler, five, model="a stand-in", words="for a test")
    header = {"format": "PagedGPT recording", "version": 1, "num_blocks": 8, "block_size": 4}
    assert read_recording(five) == (header | {"model": "a stand-in", "words": "for a test"}, [])


def test_a_request_of_6_tokens_that_writes_2_takes_two_steps_and_two_lines(path):
    engine = watched(path)
    engine.add_request([1] * 6, wanting(2))
    outputs = [engine.step(), engine.step()]
    first, second = read_recording(path)[1]
    nothing = {"blocks_copied": 0, "blocks_hit": 0, "blocks_evicted": 0, "blocks_swapped": 0}
    nothing |= {"aborted": [], "preempted": [], "num_waiting": 0, "copies": [], "cached": []}
    entry = {"request": "0", "index": 0, "phase": "prefill", "new_tokens": 6}
    entry |= {"num_computed_tokens": 6, "finish_reason": None, "block_table": [0, 1]}
    assert first == nothing | {
        "step": 1,
        "milliseconds": round(outputs[0].timings.total, 3),
        "sequences": [entry],
        "added": [["0", 1]],
        "num_free": 6,
        "blocks_taken": 2,
        "blocks_freed": 0,
        "tokens": [["0", 0, 0, ["1"] * 6 + ["0"]]],  # no tokenizer: their ids
    }
    # It has ended, so its blocks are back: the line says what holds between this step and the next.
    entry |= {"phase": "decode", "new_tokens": 1, "num_computed_tokens": 7}
    entry |= {"finish_reason": "length", "block_table": []}
    assert second == nothing | {
        "step": 2,
        "milliseconds": round(outputs[1].timings.total, 3),
        "sequences": [entry],
        "added": [],
        "num_free": 8,
        "blocks_taken": 0,
        "blocks_freed": 2,
        "tokens": [["0", 0, 7, ["0"]]],  # the one that is new
    }


@pytest.mark.parametrize("kind", [InferenceEngine, AheadEngine])
def test_every_line_says_what_the_scheduler_holds_after_its_step(path, kind):
    engine = watched(path, kind=kind)
    for prompt, written in FIVE:
        engine.add_request([1] * prompt, wanting(written))
    live = []
    while engine.has_unfinished():
        engine.step()
        scheduler = engine.scheduler
        tables = {seq.request.request_id: list(seq.block_table) for seq in scheduler.running}
        tokens = {seq.request.request_id: seq.num_computed_tokens for seq in scheduler.running}
        live.append((tables, tokens, scheduler.num_waiting, scheduler.allocator.num_free))
    header, steps = read_recording(path)
    recorded, num_held = [], 0
    for step in steps:
        running = [s for s in step["sequences"] if s["finish_reason"] is None]
        tables = {s["request"]: s["block_table"] for s in running}
        tokens = {s["request"]: s["num_computed_tokens"] for s in running}
        recorded.append((tables, tokens, step["num_waiting"], step["num_free"]))
        num_held += step["blocks_taken"] - step["blocks_freed"]
        assert num_held == 8 - step["num_free"] == len(list(filter(None, holders(header, step))))
    assert recorded == live
    # When the prompt of 6 is read, an engine that plans ahead has planned a token more.
    assert recorded[0][1]["0"] == (7 if kind is AheadEngine else 6)
    assert len(steps) == 21 and scheduler.num_preemptions == 4
    assert sum(len(step["preempted"]) for step in steps) == 4


@pytest.mark.parametrize(
    "num_blocks, expected", [(8, list(range(1, 41))), (1024, [1, 9, 17, 20, 28, 36, 40])]
)
def test_cached_blocks_are_listed_in_each_line_and_of_a_large_pool_in_every_eighth_and_the_last(
    path, num_blocks, expected
):
    engine = watched(path, allocator=PrefixCache(num_blocks, 4))
    unused = []
    for _ in range(2):  # the second finds the blocks of the first
        engine.add_request([1] * 8, wanting(20))
        while engine.has_unfinished():
            engine.step()
            unused.append(engine.scheduler.allocator.unused_cached_blocks)
    steps = read_recording(path)[1]
    assert {i: steps[i - 1]["cached"] for i in expected} == {i: unused[i - 1] for i in expected}
    assert [step["step"] for step in steps if "cached" in step] == expected
    assert len(unused[19]) == 6 and steps[20]["blocks_hit"] == 1  # of 27 tokens in the cache


def test_aborts_of_running_and_waiting_requests_stand_in_the_next_line(path):
    engine = watched(path, max_num_batched_tokens=6)
    for _ in range(3):
        engine.add_request([1] * 6, wanting(6))
    engine.step()
    assert engine.abort("0") and engine.abort("2")
    assert not engine.abort("0") and not engine.abort("unheard of")
    steps = run_all(engine, path)
    assert [step["aborted"] for step in steps[:3]] == [[], ["0", "2"], []]
    assert strips(steps) == {("0", 0): "P      ", ("1", 0): ".Pddddd", ("2", 0): ".      "}


def test_two_sequences_that_share_a_block_both_name_it(path):
    def fork_once(sequences, logits):
        (seq, *others) = sequences
        if len(seq.request.sequences) == 1:
            return [Continuation(seq, [0]), Continuation(seq, [1])]
        return [Continuation(s, [0]) for s in [seq, *others]]

    engine = watched(path)
    engine.add_request([1] * 6, wanting(4), strategy=fork_once)
    steps = run_all(engine, path)
    header = read_recording(path)[0]
    assert holders(header, steps[0]) == [["0", "0"], ["0", "0"], [], [], [], [], [], []]
    # The first to write into the shared tail copies it; the first block stays shared.
    assert holders(header, steps[1])[0] == ["0", "0"] and steps[1]["blocks_copied"] == 1
    assert steps[1]["copies"] == [[1, 2]]
    # The fork is told with all its tokens, then with what is new.
    prompt = ["1"] * 6
    assert steps[0]["tokens"] == [["0", 0, 0, [*prompt, "0"]], ["0", 1, 0, [*prompt, "1"]]]
    assert steps[1]["tokens"] == [["0", 0, 7, ["0"]], ["0", 1, 7, ["0"]]]
    assert [(s["index"], s["phase"]) for s in steps[0]["sequences"]] == [(0, "prefill"), (1, None)]
    assert strips(steps) == {("0", 0): "Pddd", ("0", 1): ".ddd"}


def test_a_sequence_that_its_strategy_drops_ends_as_dropped(path):
    engine = watched(path)

    def fork_and_drop(sequences, logits):
        num_children = 2 if sequences[0].num_generated == 0 else 1
        return [Continuation(sequences[0], [0])] * num_children

    engine.add_request([1] * 6, wanting(3), strategy=fork_and_drop)
    _, second, _ = run_all(engine, path)
    assert [s["finish_reason"] for s in second["sequences"]] == [None, "dropped"]


def test_an_interrupted_step_has_no_line_and_the_next_one_goes_on_from_there(path):
    calls = []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return always_zero(batch)

    engine = watched(path, forward=interrupted)
    engine.add_request([1] * 6, wanting(5))
    with pytest.raises(KeyboardInterrupt):
        run_all(engine, path)
    assert [step["step"] for step in read_recording(path)[1]] == [1, 2]
    steps = run_all(engine, path)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert strips(steps) == {("0", 0): "PdPdd"}  # what was planned is computed again


# ---- reading -------------------------------------------------------------------------------------
def test_a_last_line_cut_at_any_byte_costs_that_line_alone(five):
    text = five.read_text()
    whole = read_recording(five)[1]
    last = text.splitlines()[-1]
    for length in range(1, len(last) + 1):
        five.write_text(text[: -len(last) - 1] + last[:length])
        assert read_recording(five)[1] == whole[:-1]


@pytest.mark.parametrize(
    "line, old, new, words",
    [
        (1, "PagedGPT recording", "diary", "no header"),
        (1, '"version":1', '"version":2', "version 2"),
        (1, '"num_blocks":8', '"num_blocks":0', "num_blocks is 0"),
        (1, '"block_size":4', '"block_size":4.5', "block_size is 4.5"),
        (2, "{", "[", "Expecting"),
        (2, '{"step":1,', '["step"]\n{', "['step'] where an object with"),
        (2, '"num_free":3', '"num_free":-3', "'num_free' is -3: it must be at least 0"),
        (2, '"num_free":3', '"num_free":4', "5 blocks are held and 4 free, the pool has 8"),
        (2, '"milliseconds":', '"milliseconds":NaN,"was":', "'milliseconds' is nan"),
        (2, '"block_table":[0,1]', '"block_table":[0,8]', "block 8 in a table, the pool has 8"),
        (2, '"block_table":[0,1]', '"block_table":[0,true]', "block True in a table"),
        (2, '"phase":"prefill"', '"phase":"warmup"', "'phase' is 'warmup'"),
        (2, '"request":"0"', '"request":0', "'request' is 0"),
        (2, '"new_tokens":6', '"new_tokens":true', "'new_tokens' is True"),
        (2, '["0",1]', '["0"]', "where a request and a number belong"),
        (2, '"aborted":[]', '"aborted":[7]', "where a request and a number belong"),
        (2, '"copies":[]', '"copies":7', "'copies' is 7"),
        (3, '"step":2', '"step":3', "step 3 stands where step 2 belongs"),
    ],
)
def test_a_malformed_line_is_named_with_its_number_and_the_reason(five, line, old, new, words):
    lines = five.read_text().splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    five.write_text("".join(lines))
    with pytest.raises(ValueError) as error:
        read_recording(five)
    assert str(error.value).startswith(f"{five}, line {line}: ") and words in str(error.value)


def test_a_recording_of_before_there_were_tokens_and_copies_is_read(five):
    header, *steps = [json.loads(line) for line in five.read_text().splitlines()]
    for step in steps:
        del step["tokens"], step["copies"], step["cached"]
    five.write_text("".join(json.dumps(line) + "\n" for line in [header, *steps]))
    assert read_recording(five) == (header, steps)


def test_a_line_without_one_of_its_fields_is_malformed(five):
    header, _, second, *_ = five.read_text().splitlines()
    for name in STEP_FIELDS:
        step = json.loads(second) | {"step": 1}
        del step[name]
        five.write_text("\n".join([header, json.dumps(step), ""]))
        with pytest.raises(ValueError, match=f"line 2: there is no '{name}'"):
            read_recording(five)


# ---- what pictures show --------------------------------------------------------------------------
def test_strips_are_lives_in_letters(five):
    steps = read_recording(five)[1]
    # By hand: 16 tokens a step, so A and B (6 + 10) fill the first one, and C and D come second.
    # A's 9th token is sampled in step 9, and in step 21 E's 5th, the last of all.
    assert strips(steps) == {
        ("0", 0): "Pdddddddd            ",
        ("1", 0): "Pddddddx.Pddddd      ",
        ("2", 0): ".Pdx......Pd         ",
        ("3", 0): ".Pdx........PdxPd    ",
        ("4", 0): "...............Pddddd",
    }
    for i, step in enumerate(steps):
        assert step["num_waiting"] == sum(life[i] in ".x" for life in strips(steps).values())


def test_two_texts_for_one_prompt_are_two_lives_and_a_later_request_begins_with_blanks(path):
    engine = watched(path)
    engine.add_request([1] * 5, SamplingParams(max_tokens=4, n=2))
    engine.step()
    engine.step()
    engine.add_request([1] * 5, wanting(2))
    steps = run_all(engine, path)
    assert steps[0]["added"] == [["0", 1]] and steps[2]["added"] == [["1", 1]]
    # The second text is a fork of the first: its prompt is not computed again.
    assert strips(steps) == {("0", 0): "Pddd", ("0", 1): ".ddd", ("1", 0): "  Pd"}


# ---- generate.py --record ------------------------------------------------------------------------
def written_by(*args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        generate.main([*args, "--num-blocks", "16", "--max-tokens", "5", "--temperature", "0"])
    return out.getvalue()


@pytest.mark.parametrize("prompts", [["The wolf"], ["The wolf", "Once upon a time", "The king"]])
def test_generate_records_what_its_engine_did_and_writes_the_same_text(path, prompts):
    text = written_by(*prompts)
    assert written_by(*prompts, "--record", str(path)) == text
    header, steps = read_recording(path)
    assert header["model"] == "tiny-gpt2" and header["num_blocks"] == 16
    assert list(strips(steps).values()) == ["Pdddd"] * len(prompts)


@pytest.mark.parametrize("text", ["", '{"format": "PagedGPT rec'])
def test_a_file_without_a_header_is_no_recording(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1: "):
        read_recording(path)


def test_a_request_that_ran_before_the_recorder_came_is_there_from_its_next_step(path):
    engine = stand_in()
    engine.add_request([1] * 6, wanting(3))
    engine.step()
    engine.watchers.append(Recorder(engine.scheduler, path))
    steps = run_all(engine, path)
    assert [step["added"] for step in steps] == [[], []] and strips(steps) == {("0", 0): "dd"}


def test_when_the_disk_is_full_the_requests_go_on_without_the_recorder(path):
    engine = watched(path)
    (recorder,) = engine.watchers
    engine.add_request([1] * 6, wanting(3))
    engine.step()
    recorder._file = open("/dev/full", "wb", buffering=0)  # a device on which each write fails
    with pytest.warns(UserWarning, match="No space left on device.*no longer watches"):
        engine.step()
    assert engine.watchers == []
    (output,) = engine.step().finished
    assert output.outputs[0].token_ids == [0, 0, 0]
    assert len(read_recording(path)[1]) == 1  # what was written before is whole


def test_without_record_no_code_of_the_recorder_is_called(path, monkeypatch):
    def called(*args, **options):
        raise AssertionError("the recorder was called")

    for kind in (Describer, Recorder):
        monkeypatch.setattr(kind, "__init__", called)
        monkeypatch.setattr(kind, "__call__", called)
    assert written_by("The wolf")
    with pytest.raises(AssertionError, match="the recorder was called"):
        written_by("The wolf", "--record", str(path))
