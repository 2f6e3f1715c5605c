"""What the host's work is measured on: every step decodes all sequences, and no text is cut."""

import pytest
from rows import pick, run

from experiments import bookkeeping


def test_scheduler_engines_and_a_whole_run_are_timed(tmp_path):
    words = "--repeats 2 --steps 3 --running 1 4 --waiting 0 9 --requests 3"
    rows = run(tmp_path, f"bookkeeping {words}")
    engines = ["the plain engine", "one step ahead"]
    assert [(row["contender"], row["workload"]) for row in rows] == [
        ("schedule() + update()", "running=4 waiting=0"),
        ("schedule() + update()", "running=4 waiting=9"),
        *((name, "running=1") for name in engines),
        *((name, "running=4") for name in engines),
        *((name, "3 requests, 64 to 512 tokens in and out") for name in engines),
    ]
    assert {row["repeats"] for row in rows} == {2} and min(row["min"] for row in rows) > 0
    assert [row["unit"] for row in pick(rows, contender=engines[0])] == ["ms", "ms", "tokens/s"]


@pytest.mark.parametrize("kind", bookkeeping.ENGINES.values(), ids=bookkeeping.ENGINES)
def test_in_each_timed_step_every_sequence_writes_one_token(kind):
    engine = bookkeeping.decoding_engine(kind, running=5)
    for _ in range(40):
        output = engine.step()
        assert [(s.num_new_tokens, len(d.token_ids)) for s, d in both(output)] == [(1, 1)] * 5
        assert not output.finished and output.blocks.freed == 0


def both(output):
    return zip(output.plan.scheduled, output.deltas, strict=True)


def test_a_run_whose_texts_are_cut_is_refused(monkeypatch):
    monkeypatch.setattr(bookkeeping, "MAX_SEQ_LEN", 300)
    with pytest.raises((AssertionError, ValueError)):
        bookkeeping.time_run(bookkeeping.InferenceEngine, 8)


def test_more_steps_than_the_context_holds_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="1 to 924 in all are needed"):
        run(tmp_path, "bookkeeping --repeats 20 --steps 50")
