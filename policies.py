"""Who runs first, who waits, who is preempted: each policy is a function of a few lines.

A scheduler has three questions. Which waiting sequence starts next? In which order do the running
ones get their tokens? Which of them gives up its blocks when the pool is full? One order of
precedence answers all three. A policy is a function from a sequence to its key in that order. The
smallest key runs first; the largest is preempted first:

    arrival      1   2   3   4   5            the pool is full: sequence 3 is preempted, not 1,
                [running  ] [waiting]         and returns before 4, because its key is smaller

The scheduler asks a policy once for each request, when it is added, and keeps the key. Forks stand
in line behind their parent; of equal keys the earlier arrival comes first. So the running sequence
with the smallest key is never preempted, and it ends. (With keys that change, two sequences could
take blocks from each other for ever, and neither would end.) There is one rule: any two keys must
be comparable. A key is a number, a string, or a tuple of those, and all
keys have the same form, for example (number, string). A request whose key is None, NaN or of
another form than the first one is refused with a ValueError.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section 4.5 (first come first served;
the latest arrival is preempted first; a sequence's blocks go all or not at all).
Run: python policies.py
Try: `return -seq.request.arrival, seq.index` (last come first served): Ada came first, and is
preempted; the assert "the newest gives way" fails. Or `return
len(seq.request.prompt_token_ids), seq.index` (short prompts first, a key that never changes): the
longest prompt is Ada's, and the same assert fails.
"""

from types import SimpleNamespace


def first_come_first_served(seq) -> tuple[int, int]:
    """Earlier requests first; the sequences of one request in their order.

    Reads `seq.request.arrival`, a number that rises with every request, and `seq.index`.
    """
    return seq.request.arrival, seq.index


# --------------------------------------------------------------------------------------------------
POLICY = first_come_first_served
NAMES = {1: "Ada", 2: "Bo", 3: "Cy", 4: "Di", 5: "Ed"}  # by arrival


def demo():
    """Five requests, three of them running: who is preempted, and who comes next."""

    def sequence(arrival: int):
        prompt = [0] * (6 - arrival)  # Ada's prompt has 5 tokens, Ed's has 1
        request = SimpleNamespace(arrival=arrival, prompt_token_ids=prompt)
        return SimpleNamespace(request=request, index=0)

    def names(queue: list) -> str:
        return ", ".join(NAMES[seq.request.arrival] for seq in sorted(queue, key=POLICY))

    running = [sequence(arrival) for arrival in (2, 1, 3)]
    waiting = [sequence(arrival) for arrival in (5, 4)]
    print(f"running, in the order in which they get tokens: {names(running)}")
    print(f"waiting, in the order in which they will start: {names(waiting)}")
    victim = max(running, key=POLICY)
    running.remove(victim)
    waiting.append(victim)
    print(f"\nthe pool is full: {NAMES[victim.request.arrival]} is preempted")
    print(f"running: {names(running)}")
    print(f"waiting: {names(waiting)}")
    assert names(running) == "Ada, Bo" and names(waiting) == "Cy, Di, Ed", "the newest gives way"
    print("ok: the newest gives way, and waits before all who came after it")


if __name__ == "__main__":
    demo()
