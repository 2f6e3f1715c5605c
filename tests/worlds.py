"""Random sequences in a poisoned pool, and what attention over them must give.

Every attention kernel is tested in such a world: a pool that is NaN wherever no sequence may read,
that is, in the slots of other blocks, the unfilled tails, the scratch block that padded table
entries name, and the positions before a context's start. Zeros would hide a read past the tail;
NaN, even times zero, does not.

    World([6, 1], [6, 9]).check(paged_attention)    # a prompt of 6 tokens, a decode over 9

This file needs nothing but torch and pytest: the tests of the GPU kernels run on bare machines.
"""

import itertools
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

# Fresh random batches: PAGEDGPT_SEED=7 gives others, the same ones each time.
SEED = int(os.environ.get("PAGEDGPT_SEED", "0"))
# Where Triton's kernels run: compiled where there is a GPU, interpreted on the CPU where not.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def needs_gpu(test):
    """The mark of a test that says nothing about interpreted kernels."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")(test))


def needs_triton(has_triton: bool):
    """The mark of the tests of Triton's kernels."""
    return pytest.mark.skipif(not has_triton, reason="the GPU's kernels need triton (Linux only)")


def some(count: int, *choices) -> list[tuple]:
    """About `count` combinations of the choices: each choice once at least, with what others the
    seed decides. A kernel is interpreted slowly, and compiled anew for almost every combination.
    """
    everything = list(itertools.product(*choices))
    random.Random(SEED).shuffle(everything)
    # First one combination for each choice that none before it has, then whatever comes.
    seen, first, rest = set(), [], []
    for combination in everything:
        new = set(enumerate(combination)) - seen
        (first if new else rest).append(combination)
        seen |= new
    return [*first, *rest[: max(0, count - len(first))]]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, context_len: int, scale: float, start: int = 0
) -> Tensor:
    """The oracle: q (T, H, D) of one sequence, its k, v (context_len, H_kv, D); in float64."""
    T, H, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    position = torch.arange(context_len, device=q.device)
    last = context_len - T + torch.arange(T, device=q.device)[:, None]  # each query's own position
    hidden = (position < start) | (position > last)  # (T, context_len)
    scores = (torch.einsum("thd,phd->htp", q, k) * scale).masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0)  # rows that read nothing: NaN, so 0
    return torch.einsum("htp,phd->thd", weights, v)


@dataclass
class World:
    """Random sequences in the shuffled blocks of a poisoned pool, and what attention must give.

    The values are drawn on the CPU, so that a seed means the same world on every device.
    """

    query_lens: list[int]
    context_lens: list[int]
    context_starts: list[int] | None = None
    block_size: int = 4
    num_kv_heads: int = 2
    group: int = 1  # query heads for each head of K and V
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    num_padded_rows: int = 0  # rows of q that belong to no sequence
    num_padded_columns: int = 0  # of the tables
    seed: int = 0
    size: float = 1.0  # standard deviation of q, k and v
    device: str = "cpu"
    tables: list[list[int]] = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * self.size
            return values.to(self.dtype).to(self.device)

        H_kv, D, bs = self.num_kv_heads, self.head_dim, self.block_size
        H = H_kv * self.group
        needed = [-(-n // bs) for n in self.context_lens]
        num_blocks = sum(needed) + 3
        self.scratch = num_blocks
        blocks = iter(torch.randperm(num_blocks, generator=generator).tolist())
        self.tables = [[next(blocks) for _ in range(n)] for n in needed]
        shape = (2, num_blocks + 1, 2, H_kv, bs, D)
        self.pool = torch.full(shape, math.nan, dtype=self.dtype, device=self.device)
        self.k_cache, self.v_cache = self.pool[1, :, 0], self.pool[1, :, 1]
        # One draw for all, cut into views (2, context_len, H_kv, D): K and V of each sequence.
        self.kv = normal(2, sum(self.context_lens), H_kv, D).split(self.context_lens, dim=1)
        self.write()
        # q is a slice of a QKV product, as the model hands it over: rows are not adjacent.
        num_rows = sum(self.query_lens) + self.num_padded_rows
        self.qkv = normal(num_rows, (H + 2 * H_kv) * D)
        self.q = self.qkv[:, : H * D].unflatten(1, (H, D))
        self.scale = D**-0.5

    def starts(self) -> list[int]:
        """The first position that each sequence may read."""
        return self.context_starts or [0] * len(self.context_lens)

    def write(self) -> None:
        """Put `kv` where the tables say: what may be read, and nothing else."""
        for (k, v), table, start in zip(self.kv, self.tables, self.starts(), strict=True):
            position = torch.arange(min(start, len(k)), len(k), device=self.device)
            block_ids = torch.tensor(table, dtype=torch.long, device=self.device)
            block_ids = block_ids[position // self.block_size]
            offsets = position % self.block_size
            self.k_cache[block_ids, :, offsets] = k[position]
            self.v_cache[block_ids, :, offsets] = v[position]

    def move_to_the_end_of(self, num_blocks: int) -> None:
        """Move into the last blocks of a pool of one layer and so many blocks.

        Only the blocks in use are touched: on a CPU the others cost no memory. Where a product of
        32 bits wraps around, a GPU reads something else, and a CPU ends the process.
        """
        shape = (num_blocks + 1, *self.pool.shape[2:])
        self.pool = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.k_cache, self.v_cache = self.pool[:, 0], self.pool[:, 1]
        ids = iter(range(num_blocks - 1, 0, -1))
        self.tables = [[next(ids) for _ in table] for table in self.tables]
        self.scratch = num_blocks
        self.pool[sum(self.tables, [num_blocks])] = math.nan
        self.write()

    def expected(self, change: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
        """(N, H, D) in float64: dense attention of each sequence, of its `change(v)`."""
        parts, row = [], 0
        for n, length, (k, v), start in zip(
            self.query_lens, self.context_lens, self.kv, self.starts(), strict=True
        ):
            q = self.q[row : row + n]
            parts.append(dense_attention(q, k, change(v), length, self.scale, start))
            row += n
        padded = (self.num_padded_rows, *self.q.shape[1:])
        return torch.cat([*parts, torch.zeros(padded, dtype=torch.float64, device=self.device)])

    def bound(self, of_result: int = 1, of_weights: int = 0) -> float | Tensor:
        """How far from `expected()` a result may lie, for values of size 1.

        1e-12 in 64 bits and 1e-5 in 32. In 16 bits the oracle attends over the very inputs that
        the kernel gets, already rounded. A kernel that sums in 32 bits adds what 32 bits add, and
        one rounding of its result: half an eps of it. One that truncates instead adds two halves.
        A kernel for tensor cores also rounds each weight w before it multiplies V, which moves
        the sum of w v by at most half an eps of the sum of w |v|. The arguments count the halves.
        """
        if self.dtype == torch.float64:
            return 1e-12
        if self.dtype == torch.float32:
            return 1e-5
        moved = of_result * self.expected().abs() + of_weights * self.expected(torch.abs)
        return 1e-5 + torch.finfo(self.dtype).eps / 2 * moved

    def arguments(self) -> dict:
        """The common signature's arguments for this world."""

        def int32(values) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        width = max(map(len, self.tables), default=0) + self.num_padded_columns
        tables = [table + [self.scratch] * (width - len(table)) for table in self.tables]
        locs = [0, *itertools.accumulate(self.query_lens)]
        return {
            "q": self.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "block_tables": int32(tables).view(len(tables), width),
            "query_start_locs": int32(locs),
            "context_lens": int32(self.context_lens),
            "scale": self.scale,
            "max_query_len": max(self.query_lens, default=0),
            "max_context_len": max(self.context_lens, default=0),
            "context_starts": None if self.context_starts is None else int32(self.context_starts),
        }

    def run(self, function: Callable[..., Tensor], **changes) -> Tensor:
        """Call the function under test; `changes` are arguments that the test wants otherwise."""
        return function(**(self.arguments() | changes))

    def check(
        self, function: Callable[..., Tensor], bound: float | Tensor | None = None, **changes
    ) -> Tensor:
        """Run, and compare each value with the oracle's; a NaN is never within a bound.

        The result goes into memory full of NaN where the test gives no `out`: new memory may hold
        an earlier result, and a row that was never written would look right.
        """
        poisoned = torch.full(self.q.shape, math.nan, dtype=self.dtype, device=self.device)
        result = self.run(function, **({"out": poisoned} | changes))
        assert result.shape == self.q.shape and result.dtype == self.q.dtype
        error = (result.double() - self.expected()).abs()
        wrong = ~(error <= (self.bound() if bound is None else bound))
        rows = wrong.any(2).any(1).nonzero().flatten().tolist()
        assert not rows, f"rows {rows} of {self}: {wrong.sum()} values, error {error.max():.2e}"
        return result


# Batches that every kernel has to get right: fields of a world, by the sentence that they test.
MIXED = {"query_lens": [6, 4, 1, 3, 0, 2], "context_lens": [6, 9, 33, 3, 5, 7]}
SMALL_WORLDS = {
    "a prompt, a chunk, a decode and a sequence without queries": MIXED,
    "starts: within a block, at its first token, at and behind the end": MIXED
    | {"context_starts": [2, 4, 30, 3, 0, 9]},
    "fewer tokens than queries, and no tokens at all": {
        "query_lens": [5, 1, 2],
        "context_lens": [3, 0, 9],
    },
    "rows and table columns of no sequence": MIXED
    | {"num_padded_rows": 3, "num_padded_columns": 2},
    "three query heads for one head of K and V": MIXED | {"group": 3, "num_kv_heads": 2},
    "sizes that are no powers of two": MIXED | {"block_size": 5, "head_dim": 24},
    "blocks of one token, heads of one number": MIXED | {"block_size": 1, "head_dim": 1},
    "more heads than sequences": {"query_lens": [2], "context_lens": [9], "num_kv_heads": 7},
    "nothing to attend": {"query_lens": [0], "context_lens": [3], "num_padded_rows": 2},
    "no sequence": {"query_lens": [], "context_lens": [], "num_padded_rows": 2},
    "no row": {"query_lens": [0, 0], "context_lens": [3, 4]},
}


def random_world(seed: int, longest: int = 40, **fixed) -> World:
    """A ragged batch of decodes, prompts, chunks and rows without anything to read, in any order.

    `fixed` are fields of the world that the test chooses itself.
    """
    choose = random.Random(seed)
    query_lens, context_lens = [], []
    for _ in range(choose.randint(1, 5)):
        kind = choose.choice(["decode", "prompt", "chunk", "no query", "no context", "short"])
        context_len = choose.randint(1, longest)
        several = choose.randint(2, 20)
        query_len = {"decode": 1, "prompt": context_len, "no query": 0}.get(kind, several)
        # "short": fewer tokens than queries, whose first ones then read nothing.
        context_len += query_len if kind == "chunk" else 0
        query_lens.append(query_len)
        context_lens.append(0 if kind == "no context" else context_len)
    starts = [choose.randint(0, longest) if choose.random() < 0.5 else 0 for _ in query_lens]
    fields = {
        "context_starts": choose.choice([None, starts]),
        "block_size": choose.choice([1, 2, 3, 5, 16, 32]),
        "num_kv_heads": choose.choice([1, 2]),
        "group": choose.choice([1, 2, 3]),
        "head_dim": choose.choice([16, 24, 64]),
        "num_padded_rows": choose.choice([0, 0, 3]),
        "num_padded_columns": choose.choice([0, 2]),
    }
    return World(query_lens, context_lens, **(fields | fixed), seed=seed)


# ---- for Triton's kernels ------------------------------------------------------------------------
ON_GPU = DEVICE == "cuda"
ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# 64 bits take longest to compile, and no engine uses them on a GPU: a few tests there.
DTYPES = ALL_DTYPES[ON_GPU:]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCK_SIZES = [1, 3, 16, 32, 256]


def world_of(query_lens, context_lens, context_starts=None, **kwargs) -> World:
    """A world on the device, of one head and head size 16 where the test says nothing else.

    In 64 bits, but for compiled kernels in 32: few tests should need products of 64 bits there.
    """
    dtype = torch.float32 if ON_GPU else torch.float64
    kwargs = {"num_kv_heads": 1, "head_dim": 16, "device": DEVICE, "dtype": dtype} | kwargs
    return World(query_lens, context_lens, context_starts, **kwargs)


def check_on_device(function: Callable[..., Tensor], world: World, **changes) -> Tensor:
    """Compare with the oracle: 16-bit weights are rounded for the tensor cores, so is the result.

    The interpreter computes bf16 in 32 bits, but truncates what it stores.
    """
    interpreted_bf16 = world.dtype == torch.bfloat16 and not ON_GPU
    halves = {"of_result": 2} if interpreted_bf16 else {"of_weights": 1}
    return world.check(function, bound=world.bound(**halves), **changes)
