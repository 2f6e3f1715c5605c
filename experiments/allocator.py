"""The cost of the allocator: blocks allocated and freed, and whether a block is ever lost.

The allocator runs beside every forward, so it must cost little. And a server runs for weeks:
one block lost an hour is an empty pool in the end. `allocator` makes three trials:

    cycles  500 x 16 sequences x 8 blocks, allocated and freed; a block counts once for both
    storm   1,000,000 random operations: allocate, grow, fork, free, and calls that must be refused
    full    a pool taken to its last block, one block more asked for, all given back

In the storm sequences hold blocks of their own and blocks that they share, more is asked for than
there is, and blocks are freed that no sequence holds. A refused call must change nothing: every
10,000 operations `check_integrity()` compares each reference count with the tables. At the end of a
trial everything is freed, and the blocks that are missing then are counted. Cycles and storm run on
`BuddyAllocator` too, which must look for adjacent blocks. Paging needs no such search.

Each is repeated, because the machine may be busy. The best repeat is the row's max for rates and
its min for times; a goal is compared with the best.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from block_allocator import BlockAllocator, NoFreeBlocks
from experiments.reservations import BuddyAllocator
from experiments.results import Measurement, device_name

CONTENDERS = {"free list": BlockAllocator, "buddies": BuddyAllocator}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `allocator`."""
    add = parser.add_argument
    add("--repeats", type=int, default=7, help="of the cycles, all contenders in turn")
    add("--cycles", type=int, default=500, help="times that all sequences come and go")
    add("--sequences", type=int, default=16, help="sequences in a cycle")
    add("--blocks", type=int, default=8, help="blocks of a sequence in a cycle")
    add("--num-blocks", type=int, default=1024, help="blocks of the pool")
    add("--operations", type=int, default=1_000_000, help="of the storm")
    add("--check-every", type=int, default=10_000, help="operations between two checks")
    add("--seed", type=int, default=0, help="of the storm")


# ---- cycles --------------------------------------------------------------------------------------
def time_cycles(
    allocator: BlockAllocator, cycles: int = 500, sequences: int = 16, blocks: int = 8
) -> float:
    """Blocks per second, each counted once for its allocation and its release."""
    free = allocator.num_free
    started = time.perf_counter()
    for _ in range(cycles):
        for table in [allocator.allocate(blocks) for _ in range(sequences)]:
            allocator.free(table)
    taken = time.perf_counter() - started
    allocator.check_integrity([])
    assert allocator.num_free == free, "a block leaked"
    return cycles * sequences * blocks / taken


# ---- storm ---------------------------------------------------------------------------------------
@dataclass
class Storm:
    """Random operations on an allocator, and the block tables of those who hold its blocks."""

    allocator: BlockAllocator
    random: random.Random
    tables: list[list[list[int]]] = field(default_factory=list)  # the allocations of each sequence
    refused: int = 0  # allocations that the empty pool refused
    mistakes: int = 0  # double frees that were refused

    def held(self) -> list[list[int]]:
        """The block table of each sequence: its allocations end to end."""
        return [sum(allocations, []) for allocations in self.tables]

    def allocate(self) -> None:
        """A new sequence allocates blocks, or an existing one grows."""
        n = self.random.randint(1, 8)
        try:
            block_ids = self.allocator.allocate(n)
        except NoFreeBlocks:
            self.refused += 1
            return
        if self.tables and n < 4:
            self.random.choice(self.tables).append(block_ids)
        else:
            self.tables.append([block_ids])

    def fork(self) -> None:
        """A second sequence shares all blocks of a first."""
        if self.tables:
            allocations = self.random.choice(self.tables)
            self.allocator.fork(sum(allocations, []))
            self.tables.append(list(allocations))

    def free(self) -> None:
        """A sequence frees its blocks. Sometimes it frees them twice, which must be refused."""
        if not self.tables:
            return
        at = self.random.randrange(len(self.tables))
        self.tables[at], self.tables[-1] = self.tables[-1], self.tables[at]
        table = sum(self.tables.pop(), [])
        self.allocator.free(table)
        if self.random.random() < 0.1 and not any(map(self.allocator.ref_count, table)):
            try:
                self.allocator.free(table)
            except ValueError:
                self.mistakes += 1

    def step(self) -> None:
        """One operation. Allocations are more frequent than frees, so the pool is often full."""
        self.random.choices((self.allocate, self.fork, self.free), (50, 10, 40))[0]()

    def end(self) -> None:
        """Free all blocks."""
        while self.tables:
            self.allocator.free(sum(self.tables.pop(), []))


def time_storm(allocator: BlockAllocator, args: argparse.Namespace) -> tuple[Storm, float]:
    """The finished storm and operations per second, without the time of the checks."""
    storm = Storm(allocator, random.Random(args.seed))
    seconds = 0.0
    for done in range(0, args.operations, args.check_every):
        started = time.perf_counter()
        for _ in range(min(args.check_every, args.operations - done)):
            storm.step()
        seconds += time.perf_counter() - started
        allocator.check_integrity(storm.held())
    storm.end()
    allocator.check_integrity([])
    return storm, args.operations / seconds


# ---- full ----------------------------------------------------------------------------------------
def exhaust(allocator: BlockAllocator) -> tuple[int, int]:
    """Take all blocks one by one, then ask for more: blocks taken, and refusals.

    It asks for 1 block, for 2, and for more than the pool has. Each refusal must change nothing.
    """
    tables: list[list[int]] = []
    refusals = 0
    while allocator.num_free:
        tables.append(allocator.allocate(1))
    for n in (1, 2, allocator.num_blocks + 1):
        try:
            tables.append(allocator.allocate(n))
        except NoFreeBlocks:
            refusals += 1
        allocator.check_integrity(tables)
    taken = sum(map(len, tables))
    for table in tables:
        allocator.free(table)
    return taken, refusals


# ---- rows ----------------------------------------------------------------------------------------
def lost(allocator: BlockAllocator) -> int:
    """Blocks that are not free although every sequence has freed its blocks."""
    return allocator.num_blocks - allocator.num_free


def counted_columns(experiment: str) -> dict[str, Any]:
    """The columns of rows for which no tensor is touched."""
    no_tensors = {"backend": "none", "dtype": "none", "threads": 1, "device": device_name()}
    return {"experiment": experiment} | no_tensors


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `allocator`."""
    blocks_held = args.sequences * args.blocks
    is_power_of_two = args.num_blocks & (args.num_blocks - 1) == 0
    if not 0 < blocks_held <= args.num_blocks or not is_power_of_two:
        sizes = f"{args.sequences} sequences of {args.blocks} blocks in a pool of {args.num_blocks}"
        raise ValueError(f"{sizes}: the pool must be a power of two that holds them all")
    common = counted_columns("allocator") | {"seed": args.seed}
    pools = {name: make(args.num_blocks) for name, make in CONTENDERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in pools}
    for _ in range(args.repeats):
        for name, allocator in pools.items():
            rates[name].append(time_cycles(allocator, args.cycles, args.sequences, args.blocks))
    cycles = f"{args.cycles} cycles x {args.sequences} sequences x {args.blocks} blocks"
    storm = f"storm operations={args.operations} num_blocks={args.num_blocks}"
    full = f"full num_blocks={args.num_blocks}"

    def row(name: str, workload: str, metric: str, unit: str, *values: float) -> Measurement:
        columns = common | {"contender": name, "workload": workload}
        return Measurement.of(values, metric=metric, unit=unit, **columns)

    for name, allocator in pools.items():
        yield row(name, cycles, "allocated and freed", "blocks/s", *rates[name])
        yield row(name, cycles, "blocks lost", "blocks lost", lost(allocator))
    for name, allocator in pools.items():
        ended, rate = time_storm(allocator, args)
        yield row(name, storm, "operations", "operations/s", rate)
        yield row(name, storm, "refused, the pool was empty", "refused", ended.refused)
        yield row(name, storm, "double frees refused", "double frees refused", ended.mistakes)
        yield row(name, storm, "blocks lost", "blocks lost", lost(allocator))
    for name, allocator in pools.items():
        taken, refusals = exhaust(allocator)
        yield row(name, full, "blocks to be had", "blocks", taken)
        yield row(name, full, "refused of 3 that ask for more", "refused", refusals)
        yield row(name, full, "blocks lost", "blocks lost", lost(allocator))
