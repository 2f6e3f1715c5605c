"""The same draw on the GPU: one launch for all rows, no sort, and nothing waits for the device.

To keep the 50 most likely of 50,257 tokens `sampling.py` sorts them all, and then wants one number
of the whole order: the weight of the 50th. That number can be asked for. How many tokens weigh at
least 0.5? Too few: at least 0.25? Positive floats are ordered as their bits are, and 30 bits hold a
weight in [0, 1], so the questions end. Eight are asked in one walk over the row, for three bits:

    key of a token  |weight: 30 bits......|id: 16 bits, turned round|  no two keys are equal
    after walk 1    |111..................|.........................|  the highest of 8 levels that
    after walk 2    |111101...............|.........................|  k tokens reach, then of the
    after walk 6    |111101110011001100...|.........................|  next 8, until k reach it, no
                    `-------- level -------->  ids decide only ties   more: here 6 walks, at most 16

With the weights of those tokens summed instead of counted, the same search finds the cut of top_p.
Then the line of the weights is cut in 64 segments, whose sums say in which of them u lies. A
program owns a row and walks it in tiles of fixed size and order: a row draws the same in any batch.
u is sampling.py's to the last bit, and sums are of 64 bits here as there. Only exponentials differ,
in their last bits: that moves the ends of the tokens on the line, and the sums that p is held
against, by less than 2**-19 of all. What a production engine does beyond this: several programs a
row while a batch is small; the draw inside the product that makes the logits.

Alabi et al. 2012, "Fast k-Selection Algorithms for Graphics Processing Units", JEA 17 (radix
select: the k-th largest, a few bits at a time, without a sort).
Run: python -m kernels.triton_sampling
Try: in the demo, .bfloat16() behind the logits (why does the search take more walks?), or a top_k
of 1, which needs a sort even less.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, just below

from kernels.triton_prefill import INTERPRETED, can_launch, check_launch, tl, triton
from kv_cache import to_device
from sampling import (
    GREEDY_BELOW,
    SampleRow,
    SamplingParams,
    draw_tokens,
    draw_weights,
    edit_logits,
)

# Kernels read a global only if it says that it never changes.
TILE = tl.constexpr(2048)  # tokens of a row at a time, 4 for each of 512 threads
NUM_SEGMENTS = tl.constexpr(64)  # of the line ..
SEGMENT_STEP = tl.constexpr(32)  # .. and the tokens of each that are read together
# The kernel reads one number a row from each of these tensors (M,), in this order. Of several types
# the first is the one that `row_tensors` makes.
ROW_INPUTS = {
    "seeds": (torch.int64,),
    "positions": (torch.int64,),
    "temperatures": (torch.float32,),
    "top_ks": (torch.int32,),
    "top_ps": (torch.float64, torch.float32),  # float64, as sampling.py computes
    "min_ps": (torch.float32,),
}
# It writes one number a row to these.
ROW_OUTPUTS = {"out": (torch.int64,), "peaks": (torch.float32,)}

# Who carries out each field of SamplingParams when this file draws. The kernel ignores all fields
# but its own, so a new field needs a line here: a test compares the keys with the dataclass.
HANDLED_BY = {
    "temperature": "kernel: temperatures",
    "top_k": "kernel: top_ks",
    "top_p": "kernel: top_ps",
    "min_p": "kernel: min_ps",
    "seed": "kernel: seeds",
    "logit_bias": "edit_logits, before the launch",
    "min_tokens": "edit_logits, before the launch",
    "stop_token_ids": "edit_logits, before the launch",
    "presence_penalty": "edit_logits, before the launch",
    "frequency_penalty": "edit_logits, before the launch",
    "repetition_penalty": "edit_logits, before the launch",
    "logprobs": "collect_logprobs, after the draw",
    "prompt_logprobs": "the engine",
    "n": "the engine",
    "max_tokens": "the scheduler",
    "ignore_eos": "the scheduler",
    "stop": "the output processor",
}


# ---- u -------------------------------------------------------------------------------------------
@triton.jit
def mix(x):
    """`mix32` of sampling.py: 32 bits in an int64, whose product with 31 bits still fits."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


@triton.jit
def random_u(seed, position):
    """`uniform` of sampling.py to the last bit: two int64 of one shape -> fp32 in [0, 1)."""
    low_key = mix((seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    high_key = mix((seed >> 32) ^ low_key)
    mixed = mix((position & 0xFFFFFFFF) ^ high_key)
    bits = mix(mixed ^ (position >> 32) ^ low_key)
    return (bits >> 8).to(tl.float32) * 2.0**-24


# ---- A row ---------------------------------------------------------------------------------------
@triton.jit
def find_peak(logits, vocab_size):
    """The largest logit of a row, in 32 bits, and its id, of several the lowest.

    NaN counts as +inf, so that a row with either has a peak that is not finite.
    """
    lane = tl.arange(0, TILE)
    peaks, best = tl.full([TILE], float("-inf"), tl.float32), lane
    for start in range(0, vocab_size, TILE):
        ids = start + lane
        x = tl.load(logits + ids, ids < vocab_size, other=0.0).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        # A lane meets its ids in rising order: only what is higher may replace what it has.
        higher = (x > peaks) & (ids < vocab_size)
        peaks, best = tl.where(higher, x, peaks), tl.where(higher, ids, best)
    peak = tl.max(peaks, 0)
    return peak, tl.min(tl.where(peaks == peak, best, vocab_size), 0)


@triton.jit
def weigh(row, ids, ID_BITS: tl.constexpr):
    """The weights of these tokens, fp32, and their keys, int64: both in the shape of `ids`.

    The weights are those of `draw_weights` in sampling.py up to min_p. A key is the weight's bits,
    then the id's, turned round: of equal weights the lower id has the higher key.
    """
    logits, vocab_size, peak, temperature, min_p = row
    x = tl.load(logits + ids, ids < vocab_size, other=0.0).to(tl.float32)
    x = tl.where(ids < vocab_size, x, float("-inf"))
    # div_rn rounds as a CPU does, `/` doesn't: what is a tie there has to be one here.
    weights = tl.exp(tl.div_rn(x - peak, temperature))
    weights = tl.where(weights < min_p, 0.0, weights)
    bits = weights.to(tl.int32, bitcast=True).to(tl.int64)
    # Behind the row's end the bits are 0 and the key is negative: below every level.
    return weights, (bits << ID_BITS) + (vocab_size - 1 - ids)


# ---- The cut -------------------------------------------------------------------------------------
@triton.jit
def narrow(
    row,  # pointer to its logits and their number, then its peak, temperature and min_p
    level, shift,  # int64, known above the bit `shift`; this walk finds the next three bits
    goal,  # what the tokens at or above the level have to reach: int32 tokens or float64 weight
    BY_MASS: tl.constexpr,  # sum their weights, don't count them
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """One walk over a row: the level with three more bits, and what the tokens from it on reach."""
    digit = tl.arange(0, 8)
    levels = level + (digit.to(tl.int64) << shift)
    sums = tl.zeros([8, TILE], goal.dtype)  # added up at the end: threads meet once a walk
    for start in range(0, row[1], TILE):
        weights, keys = weigh(row, start + tl.arange(0, TILE), ID_BITS)
        reached = keys[None, :] >= levels[:, None]
        if BY_MASS:
            sums += tl.where(reached, weights.to(goal.dtype)[None, :], 0.0)
        else:
            sums += reached.to(goal.dtype)
    measures = tl.sum(sums, 1)  # (8,), falling
    # Digit 0 is the level that was reached before; at least, but for rounding where p is nearly 1.
    found = tl.maximum(tl.sum((measures >= goal).to(tl.int32), 0) - 1, 0)
    measure = tl.sum(tl.where(digit == found, measures, 0), 0)
    return level + (found.to(tl.int64) << shift), measure


@triton.jit
def find_cut(row, goal, BY_MASS: tl.constexpr, ID_BITS: tl.constexpr):
    """The level whose tokens reach the goal, and without the least of them would not."""
    level, shift, too_many = tl.full([], 0, tl.int64), (29 + ID_BITS) // 3 * 3, True
    # Most searches end half-way: where only as many are left as are wanted, more bits cut no more.
    while (shift >= 0) & too_many:
        level, measure = narrow(row, level, shift, goal, BY_MASS, ID_BITS)
        if BY_MASS:
            # The least of the tokens weighs this, or more: then a later walk ends it.
            least = (level >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
            too_many = measure - least.to(tl.float64) >= goal
        else:
            too_many = measure > goal
        shift -= 3
    return level


@triton.jit
def segment_sums(row, level, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """The weight of the tokens at or above the level in each segment of the row, float64."""
    first = tl.arange(0, NUM_SEGMENTS)[:, None] * SEGMENT_LEN
    sums = tl.zeros([NUM_SEGMENTS, SEGMENT_STEP], tl.float64)
    for start in range(0, SEGMENT_LEN, SEGMENT_STEP):
        ids = first + start + tl.arange(0, SEGMENT_STEP)[None, :]
        weights, keys = weigh(row, ids, ID_BITS)
        sums += tl.where(keys >= level, weights, 0.0).to(tl.float64)
    return tl.sum(sums, 1)  # (NUM_SEGMENTS,)


@triton.jit
def cut_tail(row, top_k, top_p, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """`_cut_tail` of sampling.py: the key of the last token inside top_k and then top_p, or less.

    A key of no token will do, as long as exactly the tokens inside are at or above it. top_p is
    float64, as all sums are.
    """
    level = tl.full([], 0, tl.int64)  # all
    if (top_k > 0) & (top_k < row[1]):
        level = find_cut(row, top_k, False, ID_BITS)
    if top_p < 1:
        sums = segment_sums(row, level, ID_BITS, SEGMENT_LEN)
        # p of what top_k left. The search may take in all tokens: those outside top_k are the last.
        goal = top_p * tl.sum(sums, 0)
        level = tl.maximum(level, find_cut(row, goal, True, ID_BITS))
    return level


# ---- The draw ------------------------------------------------------------------------------------
@triton.jit
def draw(row, level, u, best, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """`_draw` of sampling.py: the first id whose cumulated weight exceeds u times the total."""
    sums = segment_sums(row, level, ID_BITS, SEGMENT_LEN)
    ends = tl.cumsum(sums, 0)
    target = u.to(tl.float64) * tl.sum(sums, 0)
    passed = ends <= target
    segment = tl.sum(passed.to(tl.int32), 0)
    before = tl.max(tl.where(passed, ends, 0.0), 0)

    ids = segment * SEGMENT_LEN + tl.arange(0, SEGMENT_LEN)
    weights, keys = weigh(row, ids, ID_BITS)
    weights = tl.where(keys >= level, weights, 0.0)
    ends = before + tl.cumsum(weights.to(tl.float64), 0)
    token = tl.min(tl.where((ends > target) & (weights > 0), ids, row[1]), 0)
    # A segment added up in two orders: rounding may leave its last token short of the target. Then
    # it is the most likely token, as there.
    return tl.where(token < row[1], token, best)


@triton.jit
def cut_and_draw(
    row, best, seed, position, top_k, top_p, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr
):
    """The token of a row that is not greedy; `best` is its most likely one."""
    level = cut_tail(row, top_k, top_p, ID_BITS, SEGMENT_LEN)
    return draw(row, level, random_u(seed, position), best, ID_BITS, SEGMENT_LEN)


# The length of a row decides how often a loop runs: known to the compiler it would be unrolled.
@triton.jit(do_not_specialize=["vocab_size"])
def sample_kernel(
    logits, seeds, positions, temperatures, top_ks, top_ps, min_ps, out, peaks,  # `sample_triton`'s
    stride_row,  # in elements
    vocab_size, ID_BITS: tl.constexpr,  # tokens, and the bits of the largest id
    SEGMENT_LEN: tl.constexpr,  # tokens, a power of two: the last segments may be empty
    GREEDY_BELOW: tl.constexpr,
):  # fmt: skip
    """One program: the token of one row."""
    i = tl.program_id(0).to(tl.int64)  # 64 bits: 50,000 rows of logits pass 2^31
    row_logits = logits + i * stride_row
    peak, token = find_peak(row_logits, vocab_size)
    if peaks is not None:
        tl.store(peaks + i, peak)
    temperature = tl.load(temperatures + i)
    if (temperature >= GREEDY_BELOW) & (tl.abs(peak) < float("inf")):
        row = (row_logits, vocab_size, peak, temperature, tl.load(min_ps + i))
        seed, position, top_k = tl.load(seeds + i), tl.load(positions + i), tl.load(top_ks + i)
        top_p = tl.load(top_ps + i).to(tl.float64)
        token = cut_and_draw(row, token, seed, position, top_k, top_p, ID_BITS, SEGMENT_LEN)
    tl.store(out + i, token.to(tl.int64))


# ---- What is called ------------------------------------------------------------------------------
def check_rows(num_rows: int, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor is (num_rows,), contiguous, of its type, on the device.

    The names are those of ROW_INPUTS and ROW_OUTPUTS; None is skipped.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        types = (ROW_INPUTS | ROW_OUTPUTS)[name]
        shape = tuple(tensor.shape)
        is_expected = tensor.dtype in types and shape == (num_rows,)
        if not is_expected or tensor.device != device or not tensor.is_contiguous():
            found = f"{tensor.dtype} {shape} with strides {tensor.stride()} on {tensor.device}"
            wanted = f"{' or '.join(map(str, types))} ({num_rows},), contiguous, on {device}"
            raise ValueError(f"{name} is {found}: it must be {wanted}")


def row_sizes(vocab_size: int) -> dict[str, int]:
    """The length of a row, and what a kernel is compiled for because of it."""
    SEGMENT_LEN = triton.next_power_of_2(triton.cdiv(vocab_size, NUM_SEGMENTS.value))
    SEGMENT_LEN = max(SEGMENT_STEP.value, SEGMENT_LEN)
    ID_BITS = (vocab_size - 1).bit_length()
    return {"vocab_size": vocab_size, "ID_BITS": ID_BITS, "SEGMENT_LEN": SEGMENT_LEN}


def sample_triton(
    # (B, V) in 16 or 32 bits, rows may lie apart; then (B,) int64 both
    logits: Tensor, seeds: Tensor, positions: Tensor,
    # (B,) float32, int32, float64 and float32
    temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor,
    # (B,) int64 and float32
    out: Tensor | None = None, peaks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token for each row of logits, which are only read: int64 ids (B,), in `out` if given.

    `positions` are those that the tokens will have. Temperatures below GREEDY_BELOW are greedy; a
    top_k of 0, -1 or at least V, a top_p of 1 and a min_p of 0 cut nothing. (top_ps may be float32
    as well: then p is 0.89999998 where sampling.py has 0.9.) `peaks`, if given, takes each row's
    largest logit: if it isn't finite, the logits were NaN, +inf or all -inf and the token, the
    first such id, means nothing. Nothing is read back, so it is up to the caller to look.
    Raises ValueError for float64 logits, and for tensors of other types, shapes or devices.
    """
    check_launch(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype == torch.float64:
        what = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits are {what}: they must be (rows, tokens) in 16 or 32 bits")
    B, V = logits.shape
    out = torch.empty(B, dtype=torch.int64, device=logits.device) if out is None else out
    rows = {"seeds": seeds, "positions": positions, "temperatures": temperatures}
    rows |= {"top_ks": top_ks, "top_ps": top_ps, "min_ps": min_ps, "out": out, "peaks": peaks}
    check_rows(B, logits.device, **rows)
    if B == 0:
        return out
    sample_kernel[(B,)](
        logits, **rows, stride_row=logits.stride(0), **row_sizes(V), GREEDY_BELOW=GREEDY_BELOW,
        num_warps=16,
    )  # fmt: skip
    return out


def row_tensors(rows: list[SampleRow], vocab_size: int, device: torch.device) -> list[Tensor]:
    """The tensors of ROW_INPUTS for M rows, in that order: six of shape (M,) on the device.

    Six small copies from the host to the device, none of which waits for the device.
    """
    columns = {
        "seeds": [row.seed for row in rows],
        "positions": [row.position for row in rows],
        "temperatures": [row.params.temperature for row in rows],
        # A caller may give any integer; the kernel's is of 32 bits.
        "top_ks": [min(row.params.top_k, vocab_size) for row in rows],
        "top_ps": [row.params.top_p for row in rows],
        "min_ps": [row.params.min_p for row in rows],
    }
    tensors = [torch.tensor(columns[name], dtype=types[0]) for name, types in ROW_INPUTS.items()]
    return [to_device(tensor, device) for tensor in tensors]


def draw_tokens_triton(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
    """`draw_tokens` of sampling.py by the kernel: token ids (M,) and peaks (M,), of logits (M, V).

    Rows with a bias or penalties are edited as there, before the launch. A peak that is not finite
    says that the row had no answer.
    """
    assert logits.ndim == 2 and len(rows) == logits.shape[0], (logits.shape, len(rows))
    scores = edit_logits(logits, rows)
    peaks = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    tensors = row_tensors(rows, logits.shape[1], logits.device)
    return sample_triton(scores, *tensors, peaks=peaks), peaks


# --------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["vocab_size", "shift", "top_k"])
def narrow_kernel(
    found,  # (2,) int64: the level so far; how many tokens reached it in the last walk
    logits, vocab_size, shift, top_k, ID_BITS: tl.constexpr,
):  # fmt: skip
    """For the demo: one walk of the search for a top_k, at temperature 1."""
    peak, _ = find_peak(logits, vocab_size)
    row = (logits, vocab_size, peak, 1.0, 0.0)
    level, count = narrow(row, tl.load(found), shift, top_k, False, ID_BITS)
    tl.store(found, level)
    tl.store(found + 1, count.to(tl.int64))


def demo():
    """A search for the 50th weight, walk by walk; then seven settings, here and in sampling.py."""
    if not can_launch():
        return
    V, top_k, id_bits = 50_257, 50, 16
    device = torch.device("cpu" if INTERPRETED else "cuda")
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, V)).to(device)
    print(f"{V:,} random logits: the highest level that {top_k} of them reach\n")
    print("walk   weight at the level   tokens at or above it")
    found, shift, walks = torch.zeros(2, dtype=torch.int64, device=device), 45, 0
    while found[1] != top_k:
        narrow_kernel[(1,)](found, logits, V, shift, top_k, id_bits, num_warps=16)
        shift, walks = shift - 3, walks + 1
        level = (found[0] >> id_bits).int().view(torch.float32).item()
        print(f"{walks:4}   {level:<19.10f}   {found[1]:21,}")
    settings = [(0, 0, 1, 0), (1, 0, 1, 0), (0.7, 0, 1, 0), (1, 50, 1, 0), (1, 0, 0.9, 0)]
    settings += [(1, 0, 1, 0.1), (1.2, 50, 0.9, 0.01)]
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in settings]
    rows = [SampleRow(p, 10, position, [0], 1) for position, p in enumerate(params, start=1)]
    batch = logits.expand(len(rows), V)
    kept = (draw_weights(batch.cpu(), rows) > 0).sum(1).tolist()
    there = draw_tokens(batch.cpu(), rows)[0].tolist()
    here = draw_tokens_triton(batch, rows)[0].tolist()
    print("\ntemperature  top_k  top_p  min_p   tokens left   sampling.py    here")
    for (t, k, p, m), left, a, b in zip(settings, kept, there, here, strict=True):
        print(f"{t:11}  {k:5}  {p:5}  {m:5}   {left if t else 1:11,}   {a:11}  {b:6}")
    assert here == there and walks <= 16
    print(f"ok: the same tokens, and the {top_k}th weight in {walks} walks instead of a sort")


if __name__ == "__main__":
    demo()
