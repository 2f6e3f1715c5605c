"""What a scheduler moves about: plain values, and two sums over them."""

from sequence import FINISHED, RUNNING, WAITING, Continuation, Plan, Request, Scheduled, Sequence


def sequence(num_prompt_tokens=3, num_generated=0, **fields):
    request = Request("0", list(range(num_prompt_tokens)), arrival=0)
    token_ids = list(range(num_prompt_tokens + num_generated))
    seq = Sequence(request, 0, token_ids, num_prompt_tokens, max_tokens=8, **fields)
    request.sequences.append(seq)
    return seq


def test_what_was_generated_is_what_lies_behind_the_prompt():
    seq = sequence(num_prompt_tokens=12)
    assert seq.num_generated == 0
    seq.token_ids += [99, 42]
    assert seq.num_generated == 2
    assert seq.request.prompt_token_ids == list(range(12))


def test_a_new_sequence_waits_and_holds_nothing():
    seq = sequence()
    assert (WAITING, RUNNING, FINISHED) == ("waiting", "running", "finished")
    assert (seq.status, seq.finish_reason, seq.stop_reason) == ("waiting", None, None)
    assert (seq.num_computed_tokens, seq.block_table, seq.logprobs) == (0, [], [])
    assert (seq.min_tokens, seq.stop_token_ids, seq.num_preemptions) == (0, frozenset(), 0)


def test_no_two_sequences_share_a_list():
    one, two = sequence(), sequence()
    one.block_table.append(1)
    one.logprobs.append(-0.5)
    one.request.sequences.append("another")
    assert (two.block_table, two.logprobs, two.request.sequences) == ([], [], [two])


def test_two_sequences_of_equal_tokens_are_two_sequences():
    one, two = sequence(), sequence()
    assert one != two and one == one
    assert len({one, two}) == 2  # they are keys of dicts, by who they are
    assert one.request != two.request and len({one.request, two.request}) == 2


def test_a_plan_counts_the_tokens_that_it_computes():
    plan = Plan()
    assert plan.num_tokens == 0
    decode, prompt = sequence(5, 1), sequence(30)
    plan.scheduled += [Scheduled(decode, 5, 1), Scheduled(prompt, 16, 14)]
    assert plan.num_tokens == 15


def test_an_empty_plan_does_nothing_and_shares_nothing():
    one, two = Plan(), Plan()
    lists = ["scheduled", "sampled", "preempted", "swap_out", "swap_in", "copies"]
    assert [getattr(one, name) for name in lists] == [[]] * 6
    one.copies.append((1, 2))
    assert two.copies == []


def test_a_scheduled_sequence_computes_a_half_open_range():
    seq = sequence(30)
    scheduled = Scheduled(seq, start=16, num_new_tokens=14)
    assert scheduled == (seq, 16, 14)
    assert seq.token_ids[16 : 16 + 14] == [*range(16, 30)]


def test_a_continuation_is_a_parent_and_what_follows():
    seq = sequence()
    assert Continuation(seq, [7]) == (seq, [7], None, None)
    assert Continuation(seq, [7, 8], [-0.1, -0.2], seed=5) == (seq, [7, 8], [-0.1, -0.2], 5)
