"""The draw of sampling.py on a GPU: one launch for all rows, no sort, and the host does not wait.

To keep the 50 most likely of 50,257 tokens, `sampling.py` sorts all of them. Of the result it uses
one number: the weight of the 50th. A search finds that number without a sort. How many tokens have
a weight of at least 0.5? Too few. At least 0.25? And so on. Positive floats have the same order as
their bits, and a weight in [0, 1] has 30 bits, so the search ends after 30 such questions. The
kernel asks eight questions in each walk over the row and so finds three bits a walk:

    key of a token  |weight: 30 bits......|vocab_size - 1 - id: 16 bits |  no two keys are equal
    after walk 1    |111..................|.............................|  the highest level of 8
    after walk 2    |111101...............|.............................|  that k keys reach, then
    after walk 6    |111101110011001100...|.............................|  of the next 8, until
                    `-------- level ------------> the id only breaks ties  exactly k reach it

The cut of top_p is the same search with the weights of those tokens summed instead of counted. The
draw then divides the line of weights into 64 segments, finds from their sums the segment that u
lies in, and in it the token.

One program works on one row and reads it in tiles of fixed size and order, so a row draws the same
token in any batch. u has the bits that it has in sampling.py, and sums have 64 bits as there. The
exponentials differ in their last bits, which moves a token's end on the line by less than 2^-19 of
the line's length.

How it is checked: against sampling.py on the CPU (tests/kernels/test_triton_sampling.py). Where the
tokens differ, the test proves that the last bits of an exponential can decide between them. A
production engine runs several programs a row while a batch is small.

Alabi et al. 2012, "Fast k-Selection Algorithms for Graphics Processing Units", JEA 17 (radix
select: the k-th largest, a few bits at a time, without a sort).
Run: python -m kernels.triton_sampling
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported, below

from kernels.device_memory import copy_to_host, split_drawn
from kernels.triton_prefill import INTERPRETED, can_launch, check_launch, tl, triton
from kv_cache import to_device
from sampling import (
    GREEDY_BELOW,
    SampleRow,
    SampleRows,
    SamplingParams,
    as_rows,
    draw_tokens,
    draw_weights,
    edit_logits,
)

# A kernel may read a global only if it is a constexpr.
TILE = tl.constexpr(2048)  # tokens of a row that are read at a time, 4 for each of 512 threads
NUM_SEGMENTS = tl.constexpr(64)  # segments of the line
SEGMENT_STEP = tl.constexpr(32)  # tokens of each segment that are read at a time
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

# What carries out each field of SamplingParams when this file draws. The kernel ignores all fields
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
    """`mix32` of sampling.py: x is an int64 below 2^32, so its product with 31 bits fits."""
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
# `row` below is a tuple: a pointer to the row's logits, their number V, the row's peak, its
# temperature and its min_p.
@triton.jit
def find_peak(logits, vocab_size):
    """The largest logit of a row in 32 bits, and its id; of several equal ones the lowest id.

    NaN counts as +inf, so the peak of a row with a NaN or +inf is not finite.
    """
    lane = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)  # of each lane
    best = lane  # the id of each lane's peak
    for start in range(0, vocab_size, TILE):
        ids = start + lane
        x = tl.load(logits + ids, ids < vocab_size, other=0.0).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        # A lane reads its ids in rising order, so only a strictly higher logit replaces its peak.
        higher = (x > peaks) & (ids < vocab_size)
        peaks = tl.where(higher, x, peaks)
        best = tl.where(higher, ids, best)
    peak = tl.max(peaks, 0)
    return peak, tl.min(tl.where(peaks == peak, best, vocab_size), 0)


@triton.jit
def weigh(row, ids, ID_BITS: tl.constexpr):
    """The weights (fp32) and the keys (int64) of these tokens; both have the shape of `ids`.

    The weights are those of `draw_weights` in sampling.py, up to and including min_p. A key is the
    weight's bits followed by vocab_size - 1 - id: of equal weights the lower id has the higher key.
    """
    logits, vocab_size, peak, temperature, min_p = row
    x = tl.load(logits + ids, ids < vocab_size, other=0.0).to(tl.float32)
    x = tl.where(ids < vocab_size, x, float("-inf"))
    # div_rn rounds to nearest as a CPU does; `/` may not. Equal weights there must be equal here.
    weights = tl.exp(tl.div_rn(x - peak, temperature))
    weights = tl.where(weights < min_p, 0.0, weights)
    bits = weights.to(tl.int32, bitcast=True).to(tl.int64)
    # For ids >= vocab_size the bits are 0 and the key is negative, below every level.
    return weights, (bits << ID_BITS) + (vocab_size - 1 - ids)


# ---- The cut -------------------------------------------------------------------------------------
@triton.jit
def narrow(
    row,
    level, shift,  # int64: the level's bits above `shift` + 2 are known; this walk finds three more
    goal,  # what the tokens at or above the level must reach: int32 tokens, or float64 weight
    BY_MASS: tl.constexpr,  # True: sum their weights, False: count them
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """One walk over a row: the level with three more bits, and the count or weight that reaches it.

    Of the eight candidates for the three bits it takes the highest level that reaches the goal.
    """
    digit = tl.arange(0, 8)
    levels = level + (digit.to(tl.int64) << shift)
    sums = tl.zeros([8, TILE], goal.dtype)  # added up after the loop: one barrier a walk
    for start in range(0, row[1], TILE):
        weights, keys = weigh(row, start + tl.arange(0, TILE), ID_BITS)
        reached = keys[None, :] >= levels[:, None]  # (8, TILE)
        if BY_MASS:
            sums += tl.where(reached, weights.to(goal.dtype)[None, :], 0.0)
        else:
            sums += reached.to(goal.dtype)
    measures = tl.sum(sums, 1)  # (8,), falling: a higher level is reached by fewer tokens
    # Digit 0 is the level of the walk before, which did reach the goal. Only where p is nearly 1
    # may rounding say otherwise: then the maximum keeps digit 0.
    found = tl.maximum(tl.sum((measures >= goal).to(tl.int32), 0) - 1, 0)
    measure = tl.sum(tl.where(digit == found, measures, 0), 0)
    return level + (found.to(tl.int64) << shift), measure


@triton.jit
def find_cut(row, goal, BY_MASS: tl.constexpr, ID_BITS: tl.constexpr):
    """The level whose tokens reach the goal, and would not without the last one of them."""
    level = tl.full([], 0, tl.int64)
    shift = (29 + ID_BITS) // 3 * 3  # a key has 30 + ID_BITS bits, found three at a time
    too_many = True
    # Most searches end early: once no token is left that could be dropped, further bits of the
    # level change nothing.
    while (shift >= 0) & too_many:
        level, measure = narrow(row, level, shift, goal, BY_MASS, ID_BITS)
        if BY_MASS:
            # The lightest token at or above the level weighs at least `least`. It can be dropped
            # only if the others still reach the goal.
            least = (level >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
            too_many = measure - least.to(tl.float64) >= goal
        else:
            too_many = measure > goal
        shift -= 3
    return level


@triton.jit
def segment_sums(row, level, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """The weight in each segment of the row, of tokens at or above the level: float64."""
    first = tl.arange(0, NUM_SEGMENTS)[:, None] * SEGMENT_LEN
    sums = tl.zeros([NUM_SEGMENTS, SEGMENT_STEP], tl.float64)
    for start in range(0, SEGMENT_LEN, SEGMENT_STEP):
        ids = first + start + tl.arange(0, SEGMENT_STEP)[None, :]
        weights, keys = weigh(row, ids, ID_BITS)
        sums += tl.where(keys >= level, weights, 0.0).to(tl.float64)
    return tl.sum(sums, 1)  # (NUM_SEGMENTS,)


@triton.jit
def cut_tail(row, top_k, top_p, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """`_cut_tail` of sampling.py: a level that exactly the tokens inside top_k and top_p reach.

    The level need not be the key of a token. top_p is float64, as all sums are.
    """
    level = tl.full([], 0, tl.int64)  # every token reaches it
    if (top_k > 0) & (top_k < row[1]):
        level = find_cut(row, top_k, False, ID_BITS)
    if top_p < 1:
        sums = segment_sums(row, level, ID_BITS, SEGMENT_LEN)
        # The goal is p of the weight that top_k has left. The search may look at all tokens, since
        # those outside top_k have the lowest keys.
        goal = top_p * tl.sum(sums, 0)
        level = tl.maximum(level, find_cut(row, goal, True, ID_BITS))
    return level


# ---- The draw ------------------------------------------------------------------------------------
@triton.jit
def draw(row, level, u, best, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr):
    """`_draw` of sampling.py: the first id whose cumulated weight exceeds u times the total."""
    sums = segment_sums(row, level, ID_BITS, SEGMENT_LEN)
    ends = tl.cumsum(sums, 0)  # (NUM_SEGMENTS,) where each segment ends on the line
    target = u.to(tl.float64) * tl.sum(sums, 0)
    passed = ends <= target
    segment = tl.sum(passed.to(tl.int32), 0)  # the first segment that ends after the target
    before = tl.max(tl.where(passed, ends, 0.0), 0)  # where it begins

    ids = segment * SEGMENT_LEN + tl.arange(0, SEGMENT_LEN)
    weights, keys = weigh(row, ids, ID_BITS)
    weights = tl.where(keys >= level, weights, 0.0)
    ends = before + tl.cumsum(weights.to(tl.float64), 0)
    token = tl.min(tl.where((ends > target) & (weights > 0), ids, row[1]), 0)
    # A segment's sum is computed in two orders. Rounding may leave its last token's end short of
    # the target, so that no token is found. Then it is the most likely one, as in sampling.py.
    return tl.where(token < row[1], token, best)


@triton.jit
def cut_and_draw(
    row, best, seed, position, top_k, top_p, ID_BITS: tl.constexpr, SEGMENT_LEN: tl.constexpr
):
    """The token of a row that is not greedy; `best` is its most likely token."""
    level = cut_tail(row, top_k, top_p, ID_BITS, SEGMENT_LEN)
    return draw(row, level, random_u(seed, position), best, ID_BITS, SEGMENT_LEN)


# vocab_size bounds the loops. As a compile-time constant it would make Triton unroll them.
@triton.jit(do_not_specialize=["vocab_size"])
def sample_kernel(
    logits,  # (B, V)
    seeds, positions, temperatures, top_ks, top_ps, min_ps,  # ROW_INPUTS, (B,) each
    out, peaks,  # ROW_OUTPUTS, (B,) both; peaks may be None
    stride_row,  # elements from row to row of the logits
    vocab_size, ID_BITS: tl.constexpr,  # V, and the bits of the largest id
    SEGMENT_LEN: tl.constexpr,  # tokens a segment, a power of two; the last segments may be empty
    GREEDY_BELOW: tl.constexpr,
):  # fmt: skip
    """One program: the token of one row."""
    i = tl.program_id(0).to(tl.int64)  # 50,000 rows of logits have more than 2^31 elements
    row_logits = logits + i * stride_row
    peak, token = find_peak(row_logits, vocab_size)
    if peaks is not None:
        tl.store(peaks + i, peak)
    temperature = tl.load(temperatures + i)
    if (temperature >= GREEDY_BELOW) & (tl.abs(peak) < float("inf")):
        row = (row_logits, vocab_size, peak, temperature, tl.load(min_ps + i))
        seed = tl.load(seeds + i)
        position = tl.load(positions + i)
        top_k = tl.load(top_ks + i)
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
    """The kernel's arguments that follow from V: 50,257 tokens -> 16 bits, segments of 1,024."""
    SEGMENT_LEN = triton.next_power_of_2(triton.cdiv(vocab_size, NUM_SEGMENTS.value))
    SEGMENT_LEN = max(SEGMENT_STEP.value, SEGMENT_LEN)
    ID_BITS = (vocab_size - 1).bit_length()
    return {"vocab_size": vocab_size, "ID_BITS": ID_BITS, "SEGMENT_LEN": SEGMENT_LEN}


def sample_triton(
    logits: Tensor,  # (B, V) in 16 or 32 bits; its rows need not be adjacent
    seeds: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64, the positions that the drawn tokens will have
    temperatures: Tensor,  # (B,) float32
    top_ks: Tensor,  # (B,) int32
    top_ps: Tensor,  # (B,) float64, or float32: then 0.9 is 0.89999998 and may cut elsewhere
    min_ps: Tensor,  # (B,) float32
    out: Tensor | None = None,  # (B,) int64
    peaks: Tensor | None = None,  # (B,) float32
) -> Tensor:
    """Draw one token for each row of logits: int64 ids (B,), in `out` if given.

    Temperatures below GREEDY_BELOW are greedy. A top_k of 0, -1 or at least V, a top_p of 1 and a
    min_p of 0 cut nothing. `peaks`, if given, receives each row's largest logit. A peak that is not
    finite means that the row holds NaN, +inf or only -inf; its token then means nothing. The caller
    has to check that, because this function reads nothing back from the device.
    Raises ValueError for float64 logits and for tensors of other types, shapes or devices.
    """
    check_launch(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype == torch.float64:
        found = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits are {found}: they must be (rows, tokens) in 16 or 32 bits")
    B, V = logits.shape
    out = torch.empty(B, dtype=torch.int64, device=logits.device) if out is None else out
    rows = {
        "seeds": seeds,
        "positions": positions,
        "temperatures": temperatures,
        "top_ks": top_ks,
        "top_ps": top_ps,
        "min_ps": min_ps,
        "out": out,
        "peaks": peaks,
    }
    check_rows(B, logits.device, **rows)
    if B == 0:
        return out
    sample_kernel[(B,)](
        logits,
        **rows,
        stride_row=logits.stride(0),
        **row_sizes(V),
        GREEDY_BELOW=GREEDY_BELOW,
        num_warps=16,
    )
    return out


def row_tensors(
    rows: SampleRows | list[SampleRow], vocab_size: int, device: torch.device
) -> list[Tensor]:
    """The tensors of ROW_INPUTS for M rows, in that order: six of shape (M,) on the device.

    The first call for some rows makes six small copies from the host to the device, none of which
    waits for the device. Later calls copy the positions only: nothing else changes.
    """
    rows = as_rows(rows)
    if (vocab_size, device) not in rows.kept:
        params = [row.params for row in rows.rows]
        columns = {
            "seeds": rows.seeds.tolist(),
            "temperatures": [p.temperature for p in params],
            # A caller may give any integer; the kernel's is of 32 bits.
            "top_ks": [min(p.top_k, vocab_size) for p in params],
            "top_ps": [p.top_p for p in params],
            "min_ps": [p.min_p for p in params],
        }
        rows.kept[vocab_size, device] = {
            name: to_device(torch.tensor(column, dtype=ROW_INPUTS[name][0]), device)
            for name, column in columns.items()
        }
    positions = to_device(torch.from_numpy(rows.positions()), device)
    tensors = rows.kept[vocab_size, device] | {"positions": positions}
    return [tensors[name] for name in ROW_INPUTS]


def draw_tokens_triton(
    logits: Tensor,  # (M, V)
    rows: SampleRows | list[SampleRow],
) -> tuple[Tensor, Tensor]:
    """`draw_tokens` of sampling.py by the kernel: token ids (M,) and peaks (M,).

    Logits of rows with a bias, min_tokens or penalties are edited before the launch by the code of
    sampling.py. A peak that is not finite means that its row has no token to choose.
    """
    rows = as_rows(rows)
    assert logits.ndim == 2 and len(rows) == logits.shape[0], (logits.shape, len(rows))
    scores = edit_logits(logits, rows)
    token_ids, peaks = split_drawn(
        torch.empty(12 * len(rows), dtype=torch.uint8, device=logits.device)
    )
    tensors = row_tensors(rows, logits.shape[1], logits.device)
    return sample_triton(scores, *tensors, out=token_ids, peaks=peaks), peaks


def draw_on_host(
    logits: Tensor,  # (M, V)
    rows: SampleRows | list[SampleRow],
) -> tuple[Tensor, Tensor]:
    """`draw_tokens_triton` with its results in host memory, brought there by one copy."""
    return copy_to_host(*draw_tokens_triton(logits, rows))


# --------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["vocab_size", "shift", "top_k"])
def narrow_kernel(
    found,  # (2,) int64: the level found so far, and how many tokens reach it
    logits,  # (1, V)
    vocab_size, shift, top_k, ID_BITS: tl.constexpr,
):  # fmt: skip
    """For the demo: one walk of the search for top_k, at temperature 1."""
    peak, _ = find_peak(logits, vocab_size)
    row = (logits, vocab_size, peak, 1.0, 0.0)
    level, count = narrow(row, tl.load(found), shift, top_k, False, ID_BITS)
    tl.store(found, level)
    tl.store(found + 1, count.to(tl.int64))


def demo():
    """The search for the 50th weight, walk by walk; then seven settings, beside sampling.py."""
    if not can_launch():
        return
    V = 50_257  # ids of 16 bits
    top_k = 50
    id_bits = 16
    device = torch.device("cpu" if INTERPRETED else "cuda")
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, V)).to(device)
    print(f"{V:,} random logits: the highest level that {top_k} of them reach\n")
    print("walk   weight at the level   tokens at or above it")
    found = torch.zeros(2, dtype=torch.int64, device=device)
    shift = 45  # the highest three of 30 + 16 bits
    num_walks = 0
    while found[1] != top_k:
        narrow_kernel[(1,)](found, logits, V, shift, top_k, id_bits, num_warps=16)
        shift -= 3
        num_walks += 1
        level = (found[0] >> id_bits).int().view(torch.float32).item()
        print(f"{num_walks:4}   {level:<19.10f}   {found[1]:21,}")

    params = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=50),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.2, top_k=50, top_p=0.9, min_p=0.01),
    ]
    rows = [SampleRow(p, 10, position, [0], 1) for position, p in enumerate(params, start=1)]
    batch = logits.expand(len(rows), V)
    num_left = (draw_weights(batch.cpu(), rows) > 0).sum(1).tolist()
    on_cpu = draw_tokens(batch.cpu(), rows)[0].tolist()
    drawn = draw_tokens_triton(batch, rows)[0].tolist()
    print("\ntemperature  top_k  top_p  min_p   tokens left   sampling.py    here")
    for p, left, want, got in zip(params, num_left, on_cpu, drawn, strict=True):
        setting = f"{p.temperature:11}  {p.top_k:5}  {p.top_p:5}  {p.min_p:5}"
        print(f"{setting}   {1 if p.greedy else left:11,}   {want:11}  {got:6}")
    assert drawn == on_cpu and num_walks <= 16
    print(f"ok: the same tokens, and the {top_k}th weight in {num_walks} walks instead of a sort")


if __name__ == "__main__":
    demo()
