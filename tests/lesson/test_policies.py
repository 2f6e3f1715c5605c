"""A policy is a function from a sequence to its place in the order of precedence."""

from policies import first_come_first_served
from sequence import Request, Sequence


def sequence(arrival, index=0, **fields):
    request = Request(str(arrival), [1, 2, 3], arrival, **fields)
    return Sequence(request, index, [1, 2, 3], 3, max_tokens=4)


def test_first_come_first_served_follows_the_arrival():
    queue = [sequence(5), sequence(2), sequence(9), sequence(4)]
    ordered = sorted(queue, key=first_come_first_served)
    assert [seq.request.arrival for seq in ordered] == [2, 4, 5, 9]


def test_the_sequences_of_one_request_keep_their_order():
    queue = [sequence(2, 1), sequence(1, 2), sequence(2, 0), sequence(1, 0), sequence(1, 1)]
    keys = [first_come_first_served(seq) for seq in queue]
    assert sorted(keys) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_the_place_in_the_order_does_not_change_while_a_sequence_lives():
    seq = sequence(7, 1)
    before = first_come_first_served(seq)
    seq.token_ids.append(4)
    seq.num_computed_tokens, seq.num_preemptions, seq.status = 4, 2, "running"
    assert first_come_first_served(seq) == before == (7, 1)


def test_first_come_first_served_knows_no_rank():
    early = sequence(1, priority=0, user="a", deadline=9.0)
    late = sequence(2, priority=9, user="b", deadline=1.0)
    assert first_come_first_served(early) < first_come_first_served(late)
