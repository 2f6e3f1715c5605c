"""A recorded trace of block hashes through the prefix cache's allocator: how many blocks it finds.

A request of the trace names its blocks of 512 tokens by numbers, `hash_ids`. Two requests with the
same number at the same place had the same tokens up to the end of that block. So a number takes the
place of a block's tokens here: the cache has blocks of one "token". Each request looks up its
blocks, takes the ones that are missing, publishes them and leaves. No model runs and no two
requests run at once, as in the published analysis of the trace.

    hash_ids  [0 1 2 3]    finds nothing, publishes 0 1 2 3
              [0 1 2 4 5]  finds 0 1 2, publishes 4 5        3 of 9 blocks were found so far

A pool that never evicts finds all that can be found. In a smaller pool the least recently used
blocks are evicted, leaves first. The trace is mooncake_conversation_trace.jsonl (12,031 requests,
github.com/kvcache-ai/Mooncake; Qin et al. 2024, "Mooncake", arXiv:2407.00079, section 4).

Checked in tests/experiments/test_sharing.py with traces whose hits are counted by hand.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.allocator import counted_columns
from experiments.results import Measurement
from prefix_cache import PrefixCache

TRACE_NAME = Path("traces") / "mooncake_conversation_trace.jsonl"
POOLS = [1_000, 3_000, 10_000, 30_000, 100_000]  # blocks


def read_blocks(path: Path) -> list[list[int]]:
    """The `hash_ids` of each request in the order of arrival. Raises ValueError as below."""
    return [hash_ids for _, hash_ids in read_requests(path)]


def read_requests(path: Path) -> list[tuple[float, list[int]]]:
    """Each request in the order of arrival: milliseconds, and its `hash_ids`.

    Raises ValueError with the file, the line and the reason for anything that is not a trace.
    """
    requests: list[tuple[float, list[int]]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            hash_ids = request["hash_ids"]
            if not hash_ids or any(type(i) is not int or not 0 <= i < 2**63 for i in hash_ids):
                raise ValueError(f"hash_ids is {hash_ids!r}: a list of integers is needed")
            requests.append((float(request["timestamp"]), hash_ids))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
    if not requests:
        raise ValueError(f"{path} holds no request")
    return sorted(requests, key=lambda request: request[0])  # equal times keep their order


class Found(NamedTuple):
    """What a pool found over a whole trace."""

    num_hits: int  # blocks
    num_blocks: int  # that all requests have together
    num_evicted: int
    seconds: float

    @property
    def percent(self) -> float:
        """The hit rate."""
        return 100 * self.num_hits / self.num_blocks


def replay(requests: list[list[int]], pool: int) -> Found:
    """One request after the other through a pool of so many blocks."""
    cache = PrefixCache(pool, block_size=1)
    num_hits = 0
    started = time.perf_counter()
    for hash_ids in requests:
        table = cache.match_prefix(hash_ids)
        num_hits += len(table)
        table += cache.allocate(len(hash_ids) - len(table))
        cache.publish(table, hash_ids, len(hash_ids))
        cache.free(table)
    seconds = time.perf_counter() - started
    cache.check_integrity([])
    return Found(num_hits, sum(map(len, requests)), cache.num_evicted, seconds)


def rows_of_trace(path: Path) -> Iterator[Measurement]:
    """A row for each figure of each pool, the pool that never evicts last."""
    requests = read_blocks(path)
    distinct = len({hash_id for hash_ids in requests for hash_id in hash_ids})
    longest = max(map(len, requests))
    workload = f"trace {path.stem} requests={len(requests)} block_size=512"
    common = counted_columns("sharing") | {"workload": workload}
    pools = {f"pool of {n} blocks": n for n in POOLS if longest <= n < distinct}
    for name, num_blocks in (pools | {"pool without end": distinct}).items():
        found = replay(requests, num_blocks)
        columns = common | {"contender": name}
        figures = {
            ("blocks found", "%"): found.percent,
            ("blocks evicted", "blocks"): found.num_evicted,
            ("time a block", "us"): 1e6 * found.seconds / found.num_blocks,
        }
        for (metric, unit), value in figures.items():
            yield Measurement.of([value], metric=metric, unit=unit, **columns)
