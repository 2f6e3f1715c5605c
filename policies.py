"""Who runs first, who waits, who is preempted: each policy is a function of a few lines.

A scheduler has to answer one question in three places: which waiting sequence comes next, in which
order the running ones get their tokens, and who gives up its blocks when the pool runs dry. One
order of precedence answers all three, and a policy is a function from a sequence to its place in
that order. The smallest key runs first; the largest is preempted first:

    arrival      1   2   3   4   5            pool dry: sequence 3 is preempted, not 1
                [running  ] [waiting]         and returns before 4, because its key is smaller

A key must not change while a sequence waits (the queue is a heap: 100,000 may wait, and a step
costs the same). And it must be a total order in which the first can always finish: that is why
there is never a livelock, two sequences taking blocks from each other for ever. What a production
engine does beyond this: priorities, fair shares between users, deadlines, each with a guard against
starvation.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section 4.5 (first come first served;
the latest arrival is preempted first; a sequence's blocks go all or not at all).
Run: python policies.py
Try: a policy that returns `-seq.request.arrival` (last come first served: who starves?), or one
that puts short prompts first, `(len(seq.token_ids), seq.request.arrival)`.
"""

from types import SimpleNamespace


def first_come_first_served(seq) -> tuple[int, int]:
    """Earlier requests first; the sequences of one request in their order.

    Reads `seq.request.arrival`, a number that rises with every request, and `seq.index`.
    """
    return seq.request.arrival, seq.index


# --------------------------------------------------------------------------------------------------
def demo():
    """Five requests, three of them running: who is preempted, and who comes next."""
    names = {1: "Ada", 2: "Bo", 3: "Cy", 4: "Di", 5: "Ed"}
    running = [SimpleNamespace(request=SimpleNamespace(arrival=a), index=0) for a in (2, 1, 3)]
    waiting = [SimpleNamespace(request=SimpleNamespace(arrival=a), index=0) for a in (5, 4)]

    def show(queue: list) -> str:
        ordered = sorted(queue, key=first_come_first_served)
        return ", ".join(names[seq.request.arrival] for seq in ordered)

    print(f"running, in the order in which they get tokens: {show(running)}")
    print(f"waiting, in the order in which they will start: {show(waiting)}")
    victim = max(running, key=first_come_first_served)
    running.remove(victim)
    waiting.append(victim)
    print(f"\nthe pool is dry: {names[victim.request.arrival]} is preempted")
    print(f"running: {show(running)}")
    print(f"waiting: {show(waiting)}")
    assert show(running) == "Ada, Bo" and show(waiting) == "Cy, Di, Ed"
    print("ok: the newest gave way, and stands before all who came after it")


if __name__ == "__main__":
    demo()
