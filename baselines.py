"""What paging replaces: no cache, and one contiguous slab per sequence.

Without a cache the 1,000th token of a text costs 1,000 rows through all layers, and the whole text
1 + 2 + .. + 1,000 = 500,500. A cache makes that 1,000 rows. The plain kind gives each sequence one
slab of adjacent memory, which a library's attention reads as it is. But a slab cannot grow, so its
size is a promise made before the first token: 37.7 MB for 1,024 tokens of the 124M GPT-2.

    no cache                                             every step computes all tokens again
    contiguous  |AAAAAA..........|BBB.............|      one row a step, a slab of max_seq_len each
    buddies     |AAAAAA..|BBB.|  ..                      a slab of the size that was reserved
    paged       |AAAA|BBB.|AA..|    |    |    |    |     one row a step, a block when one is full

Both are plugs for the model's socket here, and the second comes twice. `ContiguousCache` is a small
engine of its own, as fast as the library allows. `BuddyAllocator` and the three `reserve_*` put the
same idea under the paged engine's roof: one scheduler, one kernel, only the memory is planned as
before paging. What a production engine does beyond this: keeps slabs adjacent in virtual memory
only, and lets the GPU's own page tables do the paging (vAttention, arXiv:2405.04437).

Yu et al. 2022, "Orca", OSDI; Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section
6.1 (the three reservations); Knowlton 1965, "A fast storage allocator", CACM 8(10) (buddies).
Run: python baselines.py
Try: in the demo, move C to the end of the line (the hole of 2 blocks closes, and E runs), or take
`max(fitting)` in `allocate` and see in the tests how large regions go to pieces.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from block_allocator import BlockAllocator, NoFreeBlocks, draw_pool
from model import GPT, Attend, GPTConfig, attend_one_sequence

# plug(starts, counts): the socket's function for a step that computes positions
# [start, start + count) of each sequence.
Plug = Callable[[list[int], list[int]], Attend]


# ---- no cache ------------------------------------------------------------------------------------
def attend_without_cache(starts: list[int], counts: list[int]) -> Attend:
    """The plug that keeps nothing: whole sequences end to end, each attends to its own tokens."""
    assert not any(starts), "what lies before a start is not kept: start at 0"

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
        return torch.cat([attend_one_sequence(layer, *qkv) for qkv in sequences])

    return attend


@torch.inference_mode()
def next_logits(model: GPT, plug: Plug, sequences: list[list[int]], starts: list[int]) -> Tensor:
    """Scores of each sequence's next token, (B, V), computing its tokens from its start on."""
    device = model.wte.weight.device
    spans = [(ids, start, len(ids)) for ids, start in zip(sequences, starts, strict=True)]
    input_ids = [token_id for ids, start, end in spans for token_id in ids[start:end]]
    positions = [position for _, start, end in spans for position in range(start, end)]
    counts = [end - start for _, start, end in spans]
    flat = (torch.tensor(numbers, device=device) for numbers in (input_ids, positions))  # (N,) each
    last_rows = torch.tensor([end - 1 for end in accumulate(counts)], device=device)  # (B,)
    return model.logits(model(*flat, plug(starts, counts), last_rows))


def generate_no_cache(
    model: GPT, prompts: list[list[int]], max_tokens: int, eos_token_id: int | None = None
) -> list[list[int]]:
    """Greedy continuations of all prompts, every token computed again in every step.

    Each ends after `max_tokens` tokens, with `eos_token_id` (which it keeps), or where prompt and
    continuation together reach the model's `max_seq_len`. A static batch: it ends with its longest
    member, and who ended before is computed along until then. Raises ValueError for a prompt
    without tokens, or without room for one more.
    """

    def from_the_start(sequences: list[list[int]], starts: list[int]) -> Tensor:
        return next_logits(model, attend_without_cache, sequences, [0] * len(starts))

    return _generate(from_the_start, prompts, max_tokens, model.config.max_seq_len, eos_token_id)


def _generate(
    logits_of: Callable[[list[list[int]], list[int]], Tensor],
    prompts: list[list[int]],
    max_tokens: int,
    max_seq_len: int,
    eos_token_id: int | None,
) -> list[list[int]]:
    """The greedy loop around `logits_of(sequences, starts)` -> (B, V), which every road has."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: it must be at least 1")
    for prompt in prompts:
        if not 0 < len(prompt) < max_seq_len:
            found = f"prompt has {len(prompt)} tokens, max_seq_len is {max_seq_len}"
            raise ValueError(f"{found}: it needs at least 1, and room for one more")
    sequences = [list(prompt) for prompt in prompts]
    most = [min(len(prompt) + max_tokens, max_seq_len) for prompt in prompts]
    running = list(range(len(prompts)))
    starts = [0] * len(prompts)  # nothing of a prompt is computed yet
    while running:
        chosen = logits_of(sequences, starts).argmax(-1).tolist()
        for i in running:
            sequences[i].append(chosen[i])
        unfinished = [i for i in running if len(sequences[i]) < most[i]]
        running = [i for i in unfinished if sequences[i][-1] != eos_token_id]
        starts = [len(token_ids) - 1 for token_ids in sequences]  # from now on only the newest
    return [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)]


# ---- one contiguous slab per sequence ------------------------------------------------------------
class ContiguousCache:
    """`max_num_seqs` slabs of `max_seq_len` tokens, allocated once; sequence i lives in slab i.

    `slabs` is (num_layers, 2, max_num_seqs, H_kv, max_seq_len, D). A layer's K is then
    (max_num_seqs, H_kv, max_seq_len, D), the order that `scaled_dot_product_attention` wants: its
    first B sequences and first tokens are a view, and nothing is copied to be read. And one head's
    keys lie side by side, one stream of memory.
    """

    def __init__(
        self,
        num_layers: int,
        max_num_seqs: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        allocate: Callable[..., Tensor] = torch.empty,
    ):
        self.max_num_seqs, self.max_seq_len = max_num_seqs, max_seq_len
        shape = (num_layers, 2, max_num_seqs, num_kv_heads, max_seq_len, head_dim)
        self.slabs = allocate(shape, dtype=dtype, device=device)
        self._num_clean = 0  # tokens from the start of every slab that are written or zero

    def attend(self, starts: list[int], counts: list[int]) -> Attend:
        """The plug for one step: positions [start, start + count) of the first B sequences.

        One library call a layer for the whole batch, over views of the slabs. Every count is at
        least 1, and what lies before a start has been written by an earlier step.
        """
        spans = list(zip(starts, counts, strict=True))
        B, T, longest = len(spans), max(counts), max(start + count for start, count in spans)
        assert min(counts) > 0 and B <= self.max_num_seqs and longest <= self.max_seq_len
        # A masked score is a weight of 0, but 0 * NaN is NaN, and fresh memory may hold one. So
        # zero what a step reaches for the first time; what older sequences left is harmless.
        self.slabs[..., self._num_clean : longest, :] = 0
        self._num_clean = max(self._num_clean, longest)
        where = [(i, t, spans[i][0] + t) for i in range(B) for t in range(counts[i])]
        sequence, t, position = torch.tensor(where, device=self.slabs.device).unbind(1)  # (N,) each
        # Whole prompts: causal from the first token on, and the padding after a shorter prompt
        # is in nobody's past. One query each, all of one length: it reads all there is. Only
        # the rest needs a mask.
        is_causal = not any(starts)
        reads_all = T == 1 and len(set(starts)) == 1
        mask = None if is_causal or reads_all else self._mask(starts, T, longest)
        options = {"attn_mask": mask, "is_causal": is_causal}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_slabs, v_slabs = self.slabs[layer]
            k_slabs[sequence, :, position] = k
            v_slabs[sequence, :, position] = v
            queries = q[:, None] if T == 1 else q.new_zeros(B, T, *q.shape[1:])  # (B, T, H, D)
            if T > 1:
                queries[sequence, t] = q
            # (B, H, T, D), and twice (B, H_kv, longest, D)
            views = queries.transpose(1, 2), k_slabs[:B, :, :longest], v_slabs[:B, :, :longest]
            grouped = q.shape[1] != k.shape[1]  # several query heads to one of K and V
            out = F.scaled_dot_product_attention(*views, **options, enable_gqa=grouped)
            out = out.transpose(1, 2)  # (B, T, H, D)
            return out[:, 0] if T == 1 else out[sequence, t]  # (N, H, D)

        return attend

    def _mask(self, starts: list[int], T: int, longest: int) -> Tensor:
        """What is added to the scores, (B, 1, T, longest): 0 up to a query's position, then -inf.

        Built as wide as the slab and then cut: on a GPU rows of a mask that do not begin at
        aligned addresses would be copied in every layer.
        """
        device = self.slabs.device
        last = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        ahead = torch.arange(self.max_seq_len, device=device) > last[:, None, :, None]
        return self.slabs.new_zeros(ahead.shape).masked_fill_(ahead, -math.inf)[..., :longest]


def generate_contiguous(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    eos_token_id: int | None = None,
    cache: ContiguousCache | None = None,
) -> list[list[int]]:
    """Greedy continuations of all prompts: one prefill, then one row a sequence and step.

    Ends, errors and the static batch are those of `generate_no_cache`: who ended before computes
    its last token again and again. Give a `cache` to use it again, or to bound its memory: its
    `max_seq_len` then ends a sequence too. Raises ValueError for fewer slabs than prompts.
    """
    shape, weight = model.config, model.wte.weight
    if cache is None:
        sizes = shape.n_layer, len(prompts), shape.max_seq_len, shape.n_head, shape.head_dim
        cache = ContiguousCache(*sizes, weight.dtype, weight.device)
    if len(prompts) > cache.max_num_seqs:
        raise ValueError(f"{len(prompts)} prompts, {cache.max_num_seqs} slabs: raise max_num_seqs")
    max_seq_len = min(shape.max_seq_len, cache.max_seq_len)
    logits_of = partial(next_logits, model, cache.attend)
    return _generate(logits_of, prompts, max_tokens, max_seq_len, eos_token_id)


# ---- the same idea under the paged engine's roof -------------------------------------------------
def reserve_maximum(max_seq_len: int) -> Callable[..., int]:
    """Nobody knows how long a text becomes, so each sequence gets room for the longest."""
    return lambda seq: max_seq_len


def reserve_power_of_two(max_seq_len: int) -> Callable[..., int]:
    """A guess of the output that is right within a factor of two: 25 tokens -> room for 32."""
    return lambda seq: min(seq.num_prompt_tokens + power_of_two(seq.max_tokens), max_seq_len)


def reserve_oracle(max_seq_len: int) -> Callable[..., int]:
    """Exactly what a sequence fills if it writes all its `max_tokens`: no server can know."""
    return lambda seq: min(seq.num_prompt_tokens + seq.max_tokens, max_seq_len)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`, which is at least 1: 5 -> 8, 8 -> 8."""
    return 1 << (n - 1).bit_length()


class BuddyAllocator(BlockAllocator):
    """The same interface for contiguous memory: it hands out adjacent blocks only.

    A region is a power of two of blocks and starts at a multiple of its size. One that is too
    large is halved until it fits; the halves are buddies, and merge again when both are free.
    What is asked for is rounded up to a region, and the rest of it is lost until it is freed.

    A holder frees and forks whole allocations only. A forked sequence therefore cannot copy the one
    block it writes into: that takes paging. The books of who holds what are inherited.
    """

    def __init__(self, num_blocks: int, block_size: int = 16):
        super().__init__(num_blocks, block_size)
        self._held: dict[int, int] = {}  # first block of an allocation -> blocks asked for
        self._free: dict[int, int] = {}  # first block of a free region -> its size
        for block_id in range(num_blocks):
            self._release(block_id, 1)  # they merge: 12 blocks are a region of 8 and one of 4

    def blocks_needed(self, num_tokens: int) -> int:
        """Adjacent blocks that hold `num_tokens` tokens: the ceiling of num_tokens / block_size.

        Where no region of this pool is that large, the size of the region that would be needed:
        9 of 12 blocks -> 16, more than the pool, so that whoever compares refuses it at once.
        """
        n = super().blocks_needed(num_tokens)
        return n if power_of_two(max(n, 1)) <= self.num_blocks else power_of_two(n)

    @property
    def num_free(self) -> int:
        """How many blocks one `allocate` could hand out now: the size of the largest free region.

        `num_blocks - num_reserved - num_free` is the external fragmentation: free, but elsewhere.
        """
        return max(self._free.values(), default=0)

    @property
    def num_reserved(self) -> int:
        """Blocks of all regions handed out, with what was lost to rounding."""
        return self.num_blocks - sum(self._free.values())

    def allocate(self, n: int) -> list[int]:
        """Take `n` adjacent blocks, in ascending order. All or nothing: else NoFreeBlocks."""
        if n < 1:
            return []
        wanted = power_of_two(n)
        fitting = [(size, first) for first, size in self._free.items() if size >= wanted]
        if not fitting:
            free = f"{self.num_blocks - self.num_reserved} of {self.num_blocks} are free"
            raise NoFreeBlocks(f"{n} adjacent blocks asked for: {free}, {self.num_free} adjacent")
        size, first = min(fitting)  # the tightest fit leaves large regions whole
        del self._free[first]
        while size > wanted:
            size //= 2
            self._free[first + size] = size  # the upper half stays free
        self._held[first] = n
        self._ref_counts[first : first + n] = [1] * n
        return list(range(first, first + n))

    def fork(self, block_ids: list[int]) -> None:
        """Add one holder to whole allocations. Raises ValueError for anything else."""
        self._allocations(block_ids)
        super().fork(block_ids)

    def free(self, block_ids: list[int]) -> None:
        """Remove one holder from whole allocations; the last holder's leave frees their regions.

        `block_ids` is what `allocate` returned, or several such lists one after another. A part of
        an allocation, or one that has no more holders, raises ValueError, and nothing is changed.
        """
        for first, times in Counter(self._allocations(block_ids)).items():
            if times > self._ref_counts[first]:
                raise ValueError(f"block {first} is freed twice: nobody holds it")
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
        for first in self._held.keys() & set(block_ids):
            if self._ref_counts[first] == 0:
                self._release(first, power_of_two(self._held.pop(first)))

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that the books are right: counts equal tables, and regions tile the pool."""
        named = Counter(block_id for table in block_tables for block_id in table)
        counts = Counter(dict(enumerate(self._ref_counts)))
        over, under = dict(counts - named), dict(named - counts)
        assert not over and not under, f"counted, not named: {over}; named, not counted: {under}"
        held = {i for first, n in self._held.items() for i in range(first, first + n)}
        assert held == set(named), f"allocations and tables disagree on {sorted(held ^ set(named))}"
        end = 0
        regions = [(first, power_of_two(n)) for first, n in self._held.items()]
        for first, size in sorted([*regions, *self._free.items()]):
            assert first == end, f"a region starts at block {first}, the one before ends at {end}"
            assert first % size == 0, f"a region of {size} blocks starts at block {first}"
            end += size
        assert end == self.num_blocks, f"the regions end at block {end}, not {self.num_blocks}"
        apart = [
            first for first, size in self._free.items() if self._free.get(first ^ size) == size
        ]
        assert not apart, f"the free regions at {apart} are buddies and were not merged"

    def _allocations(self, block_ids: list[int]) -> list[int]:
        """The first blocks of the allocations that a list is made of, or ValueError."""
        firsts = [block_id for block_id in block_ids if block_id in self._held]
        if block_ids != [i for first in firsts for i in range(first, first + self._held[first])]:
            raise ValueError(f"blocks {block_ids} are not what allocate returned, or are free")
        return firsts

    def _release(self, first: int, size: int) -> None:
        """Enter a region as free, and join it with its buddy for as long as that is free too."""
        # Buddies differ in one bit of their first block: of size 4, those at 8 and 12.
        while self._free.get(first ^ size) == size:
            del self._free[first ^ size]
            first = min(first, first ^ size)
            size *= 2
        self._free[first] = size


# --------------------------------------------------------------------------------------------------
def compare_roads() -> None:
    """Three prompts on two roads: the same tokens, other work, other memory."""
    config = GPTConfig(97, 64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2).double().eval()
    num_rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: num_rows.append(len(inputs[0])))
    prompts = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]

    no_cache = generate_no_cache(model, prompts, 20)
    rows_no_cache = sum(num_rows)
    cache = ContiguousCache(2, 3, 64, 2, 16, torch.float64)
    contiguous = generate_contiguous(model, prompts, 20, cache=cache)
    rows = sum(num_rows) - rows_no_cache

    print("prompts of 5, 14 and 2 tokens, 20 more each   rows computed   KV bytes held")
    print(f"no cache    all tokens in every step         {rows_no_cache:14} {0:15,}")
    print(f"contiguous  3 slabs of max_seq_len = 64      {rows:14} {cache.slabs.nbytes:15,}")
    # The K and V of each one's newest token are never written: 24, 33 and 21 tokens are.
    print(f"at the end {rows} of 192 places in the slabs are filled, {rows / 192:.0%}\n")
    assert no_cache == contiguous and (rows_no_cache, rows) == (990, 78)


def start_sequences(allocator: BlockAllocator, reserve: Callable[..., int]) -> dict:
    """Start sequences in order until one does not fit: name -> (block_table, tokens it has now)."""
    # name: tokens of the prompt, tokens that it will write, tokens that it has now
    wanted = {"A": (5, 6, 8), "B": (7, 3, 9), "C": (4, 2, 5), "D": (3, 8, 6)}
    wanted |= {"E": (8, 7, 10), "F": (2, 9, 3), "G": (6, 1, 7), "H": (3, 5, 4)}
    owners: dict[str, tuple[list[int], int]] = {}
    for name, (prompt, written, now) in wanted.items():
        seq = SimpleNamespace(num_prompt_tokens=prompt, max_tokens=written, token_ids=[0] * now)
        needed = allocator.blocks_needed(reserve(seq))
        if needed > allocator.num_free:
            break
        owners[name] = (allocator.allocate(needed), now)
    return owners


def compare_memory() -> None:
    """One pool of 16 blocks of 4 under three reservations, and paged: who runs, what is used."""
    used: dict[str, int] = {}

    def show(plan: str, owners: dict, lost: list[int]):
        used[plan] = sum(num_tokens for _, num_tokens in owners.values())
        strip = draw_pool(owners | {"-": (lost, 4 * len(lost))}, 16, 4)
        print(f"{plan:11}{len(owners)} {used[plan] / 64:4.0%} {strip}")

    print("16 blocks of 4 and max_seq_len 32: sequences that run, memory used, who holds it")
    plans = reserve_maximum, reserve_power_of_two, reserve_oracle
    for name, reserve in zip(("maximum", "power of 2", "oracle"), plans, strict=True):
        owners = start_sequences(BuddyAllocator(16, 4), reserve(max_seq_len=32))
        # 3 blocks asked for at 4, a region of 4: block 7 is lost.
        rest = [range(t[-1] + 1, t[0] + power_of_two(len(t))) for t, _ in owners.values()]
        show(name, owners, [block_id for block_ids in rest for block_id in block_ids])
    show("paged", start_sequences(BlockAllocator(16, 4), lambda seq: len(seq.token_ids)), [])
    print("'.' is reserved and not filled, '----' is lost to rounding slabs up to 2, 4, 8 blocks")
    assert used["maximum"] < used["power of 2"] <= used["oracle"] < used["paged"]


def demo():
    """Two roads to the same tokens, then four ways to plan the memory of one pool."""
    compare_roads()
    compare_memory()
    print("ok: the same tokens with and without a cache; only paging fills its memory with them")


if __name__ == "__main__":
    demo()
