"""Which replica gets a request: four routers, each a function of a few lines.

A replica is a copy of the whole engine, with a pool of blocks of its own. A conversation's next
turn begins with all that was said before. One replica has those blocks; any other one computes them
again. A random router between 16 replicas finds them once in 16 times.

    the prompt's keys    k1 k2 k3 k4
    replica 0 holds      k1 k2         found 1/2, 3 requests
    replica 1 holds      k1 k2 k3      found 3/4, 9 requests    <- the longest prefix, unless it is
    replica 2 holds      k1            found 1/4, 0 requests       overloaded: then replica 0

A prefix of less than half of the prompt does not count. All requests of a service may begin with
the same instructions: the first replica that has them would get everything until it is overloaded.
(Without this rule the recorded trace of docs/scale.md waits longer than behind a random router.)

A key stands for all tokens up to its block's end (see prefix_cache.py), so a replica's report is a
set of keys, and a prefix is as long as the prompt's first keys that are all in the set.
`replicas.py` asks these functions for real replicas, `experiments/scale.py` for simulated ones. No
function has a state or a clock. The state of a router is one `Known` a replica.

SGLang's router and Ray's `PrefixCacheAffinityRouter` keep a tree of the texts that they have sent;
NVIDIA's Dynamo listens to an event for every block. Mirrokni et al. 2016, "Consistent Hashing with
Bounded Loads", arXiv:1608.01350 (a replica may have some times the mean load, and no more).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from random import Random

from prefix_cache import PrefixCache

KEY_BYTES = 8  # of a report; two of a million keys are equal with a probability of 3e-8
BUSY = 8  # requests that never make a replica overloaded
LEAST_SHARE = 0.5  # of a prompt: a shorter prefix is not worth a queue
TIMES_MEAN = 2.0  # a replica with so many times the mean number of requests is overloaded


def block_keys(
    token_ids: list[int], block_size: int, salt: bytes, cache_salt: str | None = None
) -> list[bytes]:
    """The keys of a prompt's full blocks, as `reported_keys` of a cache with this salt has them.

    The last token is always computed, so a block that it completes is not looked for.
    """
    cache = PrefixCache(1, block_size, salt)
    return [key[:KEY_BYTES] for key in cache.keys_of(token_ids[:-1], cache_salt)]


def reported_keys(cache: PrefixCache) -> bytes:
    """The keys of all cached blocks, `KEY_BYTES` each, end to end. Any thread may call it."""
    return b"".join(key[:KEY_BYTES] for key in cache.cached_keys)


def split_keys(report: bytes) -> list[bytes]:
    """The keys of a report."""
    return [report[start : start + KEY_BYTES] for start in range(0, len(report), KEY_BYTES)]


class Known:
    """What a router knows of one replica's cache: its last report, and what was sent there since.

    Between two reports a router that knew only the report would send a burst of equal prompts to
    many replicas. So the keys of a request count from the moment when it is sent. A sent request is
    believed for `remember_s` seconds: it may be refused, and its blocks may be evicted.
    """

    def __init__(self, remember_s: float = 10.0):
        self.remember_s = remember_s
        self._sent: list[tuple[float, Sequence[bytes]]] = []  # (second, keys), oldest first
        self._keys: set[bytes] = set()

    def report(self, keys: Iterable[bytes], now_s: float) -> None:
        """Take a replica's report."""
        self._sent = [(at, sent) for at, sent in self._sent if at > now_s - self.remember_s]
        self._keys = set(keys).union(*(sent for _, sent in self._sent))

    def send(self, keys: Sequence[bytes], now_s: float) -> None:
        """Note that a request is on its way to the replica."""
        self._sent.append((now_s, keys))
        self._keys.update(keys)

    def share(self, keys: Sequence[bytes]) -> float:
        """Which share of a prompt the replica has, from its start, as far as is known: 0 to 1."""
        num_found = sum(1 for _ in takewhile(self._keys.__contains__, keys))
        return num_found / max(len(keys), 1)


# ---- the routers ---------------------------------------------------------------------------------
# route(loads, found, number, draw): the replicas' indices, the best first. loads[i] requests are at
# replica i, which has the share found[i] of the prompt; this is request `number` of the router.
Route = Callable[[Sequence[int], Sequence[float], int, Random], list[int]]


def at_random(loads: Sequence[int], found: Sequence[float], number: int, draw: Random) -> list[int]:
    """Any replica."""
    return draw.sample(range(len(loads)), len(loads))


def round_robin(
    loads: Sequence[int], found: Sequence[float], number: int, draw: Random
) -> list[int]:
    """One after the other. Of 3 replicas request 4 gets [1, 2, 0]."""
    return [(number + i) % len(loads) for i in range(len(loads))]


def least_loaded(
    loads: Sequence[int], found: Sequence[float], number: int, draw: Random
) -> list[int]:
    """The replica with the fewest requests; of equal ones any."""
    # `sorted` keeps the order of equal keys: a random one.
    return sorted(at_random(loads, found, number, draw), key=loads.__getitem__)


def by_prefix(loads: Sequence[int], found: Sequence[float], number: int, draw: Random) -> list[int]:
    """The longest cached prefix first, overloaded replicas last; of equal ones the least loaded."""
    limit = overload(loads)

    def rank(i: int) -> tuple[bool, float]:
        return loads[i] >= limit, -found[i] if found[i] >= LEAST_SHARE else 0.0

    return sorted(least_loaded(loads, found, number, draw), key=rank)


def overload(loads: Sequence[int]) -> int:
    """With so many requests a replica is overloaded. Loads 20, 0, 4, 0: the mean is 6, so 12."""
    return max(BUSY, math.ceil(TIMES_MEAN * sum(loads) / len(loads)))


ROUTERS: dict[str, Route] = {
    "random": at_random,
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "prefix": by_prefix,
}
