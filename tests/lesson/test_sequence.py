"""What a scheduler moves about: plain values, and two sums over them."""

from sequence import Plan, Request, Scheduled, Sequence


def sequence(num_prompt_tokens=3, num_generated=0, **fields):
    request = Request("0", list(range(num_prompt_tokens)), arrival=0)
    token_ids = list(range(num_prompt_tokens + num_generated))
    seq = Sequence(request, 0, token_ids, num_prompt_tokens, max_tokens=8, **fields)
    request.sequences.append(seq)
    return seq


def test_the_tokens_after_the_prompt_were_generated():
    seq = sequence(num_prompt_tokens=12)
    assert seq.num_generated == 0
    seq.token_ids += [99, 42]
    assert seq.num_generated == 2
    assert seq.request.prompt_token_ids == list(range(12))


def test_a_new_sequence_waits_and_holds_nothing():
    seq = sequence()
    assert (seq.status, seq.finish_reason, seq.stop_reason) == ("waiting", None, None)
    assert (seq.num_computed_tokens, seq.block_table, seq.logprobs) == (0, [], [])
    assert (seq.min_tokens, seq.stop_token_ids, seq.num_preemptions) == (0, frozenset(), 0)


def test_no_two_sequences_share_a_list():
    one, two = sequence(), sequence()
    one.block_table.append(1)
    one.logprobs.append(-0.5)
    one.request.sequences.append("another")
    assert (two.block_table, two.logprobs, two.request.sequences) == ([], [], [two])
    plan = Plan()
    plan.copies.append((1, 2))
    assert Plan().copies == []


def test_two_sequences_of_equal_tokens_are_two_sequences():
    one, two = sequence(), sequence()
    assert one != two and one == one
    assert len({one, two}) == 2  # they are keys of dicts, by identity
    assert one.request != two.request and len({one.request, two.request}) == 2


def test_a_plan_counts_the_tokens_that_it_computes():
    plan = Plan()
    assert plan.num_tokens == 0
    decode, prompt = sequence(5, 1), sequence(30)
    plan.scheduled += [Scheduled(decode, 5, 1), Scheduled(prompt, 16, 14)]
    assert plan.num_tokens == 15
