"""The draw of sampling.py on a GPU: one launch for all rows, no sort, and the host does not wait.

To keep the 50 most likely of 50,257 tokens, `sampling.py` sorts all of them. One program of this
kernel draws the token of one row, and it reads most rows only twice. The first walk over the row
finds the peak, its largest logit. On the way it finds the largest logit of each of 2,048 lanes:
lane 7 holds tokens 7, 2,055, 4,103 and so on. Let x be the 50th largest of these 2,048 logits. Then
at least 50 tokens have a logit of at least x, and seldom many more, because few lanes hold two of
the most likely tokens. The second walk lists the tokens with at least x: about 51. The program cuts
and draws from this list in registers, without reading the row again.

    key of a token  |weight: 30 bits......|vocab_size - 1 - id: 20 bits |  no two keys are equal
    `search`        |1111001              |                             |  the highest level that 50
    bit by bit      |11110010110001101    |                             |  keys reach; the id only
                    `------ level ----->                                   breaks ties

Positive floats have the same order as their bits, so a search of the keys needs no floats. The cut
of top_p is the same search, but it sums the weights of the keys instead of counting the keys, in a
list of about a thousand tokens if there is no top_k. If a list is too short for the cut, further
walks over the row find the level: each narrows the range of levels to an eighth, until the tokens
in the range fit into a list. If nothing is cut, the second walk sums the weights of 64 segments of
the row. The draw finds the segment in which u times the total lies, and in it the token.

Weights are added up as whole numbers of 2^-40, so the sums are exact: a row draws the same token in
any batch. u has the bits that it has in sampling.py. The exponentials differ in their last bits,
which moves a token's end on the line by less than 2^-19 of the line's length.

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
TILE = tl.constexpr(2048)  # tokens of a row that are read at a time, 8 for each of 256 threads
NARROW_TILE = tl.constexpr(256)  # the same in `narrow`, which compares each with eight levels
NARROW_LIST = tl.constexpr(1024)  # most tokens in the list that `search_row` makes after its walks
MAX_VOCAB = tl.constexpr(2**20)
ID_BITS = tl.constexpr(20)  # bits of a key for the id: 2**20 ids
KEY_BITS = tl.constexpr(50)  # 30 bits of the weight, then ID_BITS
UNITS = tl.constexpr(2.0**40)  # units in a weight of 1
NUM_SEGMENTS = tl.constexpr(64)  # segments of a row
SEGMENT_STEP = tl.constexpr(32)  # tokens of each segment that are read at a time
# The kernel reads one number a row from each of these tensors (M,), in this order. Where several
# dtypes are allowed, `row_tensors` makes the first.
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

# Which code applies each field of SamplingParams when this file draws. The kernel reads only its
# own fields, so a new field needs a line here: a test compares the keys with the dataclass.
HANDLED_BY = {
    "temperature": "kernel: temperatures",
    "top_k": "kernel: top_ks",
    "top_p": "kernel: top_ps",
    "min_p": "kernel: min_ps",
    "seed": "kernel: seeds",
    "logit_bias": "edit_logits, before the launch",
    "allowed_token_ids": "edit_logits, before the launch",
    "bad_words": "edit_logits, before the launch",
    "min_tokens": "edit_logits, before the launch",
    "stop_token_ids": "edit_logits, before the launch",
    "presence_penalty": "edit_logits, before the launch",
    "frequency_penalty": "edit_logits, before the launch",
    "repetition_penalty": "edit_logits, before the launch",
    "logprobs": "collect_logprobs, after the draw",
    "prompt_logprobs": "the engine",
    "n": "the engine",
    "best_of": "the engine, and collect_logprobs after the draw",
    "max_tokens": "the scheduler",
    "ignore_eos": "the scheduler",
    "stop": "the output processor",
    "include_stop_str_in_output": "the output processor",
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
# temperature, its min_p, and the constexpr GROUP of `load_logits`.
@triton.jit
def load_logits(logits, vocab_size, ids, GROUP: tl.constexpr):
    """Logits in 32 bits; -inf for ids >= vocab_size.

    If each row begins at a multiple of 16 bytes, GROUP is the number of logits in 16 bytes, else 1.
    The mask is the same for all logits of a group, so one instruction can load the whole group.
    """
    x = tl.load(logits + ids, ids // GROUP * GROUP < vocab_size, other=0.0).to(tl.float32)
    return tl.where(ids < vocab_size, x, float("-inf"))


@triton.jit
def find_peak(logits, vocab_size, GROUP: tl.constexpr):
    """The row's largest logit and its id, then the largest of each lane and their ids: (TILE,).

    A lane holds each TILE-th token. Of several equal logits the one with the lowest id is taken.
    NaN counts as +inf, so the peak of a row with a NaN or +inf is not finite.
    """
    lane = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)  # of each lane
    best = lane  # the id of each lane's peak
    for start in range(0, vocab_size, TILE):
        x = load_logits(logits, vocab_size, start + lane, GROUP)
        x = tl.where(x == x, x, float("inf"))
        higher = x > peaks  # ids rise, so only a strictly higher logit replaces a lane's peak
        peaks = tl.where(higher, x, peaks)
        best = tl.where(higher, start + lane, best)
    peak = tl.max(peaks, 0)
    return peak, tl.min(tl.where(peaks == peak, best, vocab_size), 0), peaks, best


@triton.jit
def make_keys(row, x, ids):
    """The keys (int64) of tokens with logits x; both have the shape of ids.

    A key is the bits of the token's weight, which is that of `draw_weights` in sampling.py up to
    and including min_p, and then vocab_size - 1 - id: of equal weights the lower id has the higher
    key.
    """
    _, vocab_size, peak, temperature, min_p, _ = row
    # div_rn rounds to nearest as a CPU does; `/` may not. Equal weights there must be equal here.
    weights = tl.exp(tl.div_rn(x - peak, temperature))
    weights = tl.where(weights < min_p, 0.0, weights)
    bits = weights.to(tl.int32, bitcast=True).to(tl.int64)
    # For ids >= vocab_size the bits are 0 and the key is negative, below every level.
    return (bits << ID_BITS) + (vocab_size - 1 - ids)


@triton.jit
def read_keys(row, ids):
    """The keys of the tokens with these ids."""
    logits, vocab_size, _, _, _, GROUP = row
    return make_keys(row, load_logits(logits, vocab_size, ids, GROUP), ids)


@triton.jit
def weights_of(keys):
    """The weights (fp32) in these keys. A negative key gives a finite number without meaning."""
    return ((keys >> ID_BITS).to(tl.int32) & 0x3FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def units_at(keys, level):
    """The weights in units of 2^-40 (int64), 0 for keys below the level, which is at least 0.

    Sums of whole numbers are exact, so they do not depend on the order of the terms. Weights are
    rounded up, so a token of a tiny weight keeps one unit and can be drawn.
    """
    return tl.where(keys >= level, tl.ceil(weights_of(keys) * UNITS).to(tl.int64), 0)


# ---- The list ------------------------------------------------------------------------------------
@triton.jit
def collect(row, low, high, found):
    """Write the keys in [low, high) to `found`, by rising ids, but no more than TILE of them.

    One walk. Returns how many are in the range (int32; more than TILE if some were not written),
    and the weight of the whole row in units.
    """
    count = tl.full([], 0, tl.int32)
    units = tl.zeros([TILE], tl.int64)
    for start in range(0, row[1], TILE):
        keys = read_keys(row, start + tl.arange(0, TILE))
        units += units_at(keys, 0)
        is_in = (keys >= low) & (keys < high)
        slots = count + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(found + slots, keys, is_in & (slots < TILE))
        count += tl.sum(is_in.to(tl.int32), 0)
    tl.debug_barrier()  # other threads will read what this one has written
    return count, tl.sum(units, 0)


@triton.jit
def load_list(found, count, SIZE: tl.constexpr):
    """The keys in a list of `count`, then zeros: (SIZE,)."""
    at = tl.arange(0, SIZE)
    return tl.load(found + at, at < count, other=0)


@triton.jit
def search(keys, amounts, goal, level):
    """The highest level such that the amounts of the keys at or above it reach the goal.

    It may return a lower level that has the same keys at or above it. `keys` and `amounts` are
    (SIZE,) int64. The amounts at or above the given `level` must reach the goal. The search adds
    bits to that level, from the highest bit down, without a walk.
    Example: keys 9, 7, 4, an amount of 1 each, goal 2, level 0 -> 4 -> 6, which 9 and 7 reach.
    """
    step = tl.full([], 1, tl.int64) << (KEY_BITS - 1)
    reached = tl.sum(tl.where(keys >= level, amounts, 0), 0)
    while (step > 0) & (reached > goal):  # if they are equal, no key may be dropped
        above = tl.sum(tl.where(keys >= level + step, amounts, 0), 0)
        level += tl.where(above >= goal, step, 0)
        reached = tl.where(above >= goal, above, reached)
        step >>= 1
    return level


@triton.jit
def list_likely(row, peaks, best, top_k, found):
    """List the top_k most likely tokens and a few more, with `collect`.

    The list has all tokens at or above the highest level that the peaks of k lanes reach, so it has
    at least k. k is top_k, but 1,024 if top_k is 0 or larger than that. `peaks` and `best` are
    those of `find_peak`. Returns the level, and what `collect` returns.
    """
    k = tl.where(top_k > 0, tl.minimum(top_k, TILE // 2), TILE // 2)
    zero = tl.full([], 0, tl.int64)
    low = search(make_keys(row, peaks, best), tl.full([TILE], 1, tl.int64), k, zero)
    count, total = collect(row, low, tl.full([], 1, tl.int64) << KEY_BITS, found)
    return low, count, total


# ---- The cut -------------------------------------------------------------------------------------
@triton.jit
def share_of(top_p, total):
    """The least number of units that is at least top_p (float64) of the total (int64)."""
    # If p is nearly 1 the product may be rounded to more than the total: take the total then.
    return tl.minimum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), total)


@triton.jit
def narrow(
    row,
    low, high,  # int64: the level is in [low, high), or below it
    above, num_above,  # int64, int32: the amount and the tokens at or above `high`
    goal,  # int64: the amount that the level must reach
    BY_MASS: tl.constexpr,  # an amount is a number of units if True, of tokens if False
):  # fmt: skip
    """One walk: the eighth of [low, high) in which the level is; [0, low) if it is below the range.

    Returns the new low and high, the amount and the number of tokens at or above the new high, and
    the number of tokens between the two.
    """
    digit = tl.arange(0, 8)
    step = (high - low + 7) >> 3
    starts = low + digit * step  # of the eighths
    counts = tl.zeros([8, NARROW_TILE], tl.int32)
    units = tl.zeros([8, NARROW_TILE], tl.int64)
    for start in range(0, row[1], NARROW_TILE):
        keys = read_keys(row, start + tl.arange(0, NARROW_TILE))[None, :]
        is_above = keys >= starts[:, None]  # (8, NARROW_TILE)
        counts += is_above.to(tl.int32)
        if BY_MASS:
            units += tl.where(is_above, units_at(keys, 0), 0)
    num_tokens = tl.sum(counts, 1)  # (8,) tokens at or above each start; it falls as starts rise
    amounts = tl.sum(units, 1) if BY_MASS else num_tokens.to(tl.int64)
    num_reached = tl.sum((amounts >= goal).to(tl.int32), 0)  # starts 0 to num_reached - 1 reach it
    if num_reached < 8:  # the first start that does not reach the goal is the new high
        high = low + num_reached * step
        above = tl.sum(tl.where(digit == num_reached, amounts, 0), 0)
        num_above = tl.sum(tl.where(digit == num_reached, num_tokens, 0), 0)
    if num_reached > 0:
        low += (num_reached - 1) * step
        count = tl.sum(tl.where(digit == num_reached - 1, num_tokens, 0), 0)
    else:
        low = low * 0
        count = row[1]
    return low, high, above, num_above, count - num_above


@triton.jit
def search_row(row, goal, found, BY_MASS: tl.constexpr):
    """`search` among all tokens: walks narrow the range until its tokens fit into a list."""
    low = tl.full([], 111 << 23, tl.int64) << ID_BITS  # a weight of 2^-16: few cuts are lower
    high = tl.full([], (127 << 23) + 1, tl.int64) << ID_BITS  # above a weight of 1
    above = tl.full([], 0, tl.int64)
    num_above = tl.full([], 0, tl.int32)
    count = tl.full([], TILE, tl.int32)  # one walk at least: the level may be lower than `low`
    while count > NARROW_LIST:
        low, high, above, num_above, count = narrow(row, low, high, above, num_above, goal, BY_MASS)
    count, _ = collect(row, low, high, found)
    keys = load_list(found, count, NARROW_LIST)
    amounts = (tl.arange(0, NARROW_LIST) < count).to(tl.int64)
    if BY_MASS:
        amounts = units_at(keys, 0)
    return search(keys, amounts, goal - above, low)


@triton.jit
def segment_sums(row, level, SEGMENT_LEN: tl.constexpr):
    """One walk: the units in each segment of the row, of tokens at or above the level: int64."""
    first = tl.arange(0, NUM_SEGMENTS)[:, None] * SEGMENT_LEN
    sums = tl.zeros([NUM_SEGMENTS, SEGMENT_STEP], tl.int64)
    for start in range(0, SEGMENT_LEN, SEGMENT_STEP):
        keys = read_keys(row, first + start + tl.arange(0, SEGMENT_STEP)[None, :])
        sums += units_at(keys, level)
    return tl.sum(sums, 1)  # (NUM_SEGMENTS,)


@triton.jit
def cut_row(row, found, total, top_k, top_p, SEGMENT_LEN: tl.constexpr):
    """`_cut_tail` of sampling.py, with walks: a level that exactly the kept tokens reach.

    `total` is the weight of the row in units; a top_k of 0 keeps all.
    """
    level = tl.full([], 0, tl.int64)
    if top_k > 0:
        level = search_row(row, top_k, found, False)
    if top_p < 1:
        if top_k > 0:
            total = tl.sum(segment_sums(row, level, SEGMENT_LEN), 0)
        # The search may look at all tokens: those outside top_k have the lowest keys.
        level = tl.maximum(level, search_row(row, share_of(top_p, total), found, True))
    return level


# ---- The draw ------------------------------------------------------------------------------------
@triton.jit
def place_of(u, total):
    """u times the total, rounded down: a whole number is above both or above neither."""
    return (u.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def first_beyond(units, ids, before, place):
    """The first id at which `before` plus the units up to it exceed the place; the ids rise."""
    ends = before + tl.cumsum(units, 0)
    return tl.min(tl.where(ends > place, ids, MAX_VOCAB), 0)


@triton.jit
def sample_list(row, level, found, count, total, top_k, top_p, u):
    """`_cut_tail` and `_draw` of sampling.py, from a list of all `count` tokens from a level up.

    `total` is the weight of the row in units; a top_k of 0 keeps all. Returns a level that exactly
    the kept tokens reach, the token, and whether both are right: whether the list holds all tokens
    that are kept.
    """
    keys = load_list(found, count, TILE)
    is_known = (top_k <= count) & (count <= TILE)  # if count > TILE, some were not written
    if top_k > 0:
        level = search(keys, (tl.arange(0, TILE) < count).to(tl.int64), top_k, level)
        total = tl.sum(units_at(keys, level), 0)
    if top_p < 1:
        goal = share_of(top_p, total)
        units = units_at(keys, level)
        is_known &= tl.sum(units, 0) >= goal
        level = search(keys, units, goal, level)
    units = units_at(keys, level)
    ids = row[1] - 1 - (keys & (MAX_VOCAB - 1)).to(tl.int32)
    return level, first_beyond(units, ids, 0, place_of(u, tl.sum(units, 0))), is_known


@triton.jit
def draw_from_row(row, level, u, SEGMENT_LEN: tl.constexpr):
    """The first id whose cumulated weight exceeds u times the total.

    One walk over the row, then the segment with that token is read a second time.
    """
    sums = segment_sums(row, level, SEGMENT_LEN)
    ends = tl.cumsum(sums, 0)  # (NUM_SEGMENTS,) where each segment ends on the line
    place = place_of(u, tl.sum(sums, 0))
    segment = tl.sum((ends <= place).to(tl.int32), 0)  # the first that ends after the place
    before = tl.max(tl.where(ends <= place, ends, 0), 0)  # where it begins
    ids = segment * SEGMENT_LEN + tl.arange(0, SEGMENT_LEN)
    return first_beyond(units_at(read_keys(row, ids), level), ids, before, place)


@triton.jit
def cut_and_draw(row, peaks, best, found, top_k, top_p, u, SEGMENT_LEN: tl.constexpr):
    """The level of the cut and the token of a row that is not greedy."""
    level = tl.full([], 0, tl.int64)  # every token reaches it
    token = tl.full([], 0, tl.int32)
    is_drawn = False
    top_k = tl.where(top_k < row[1], tl.maximum(top_k, 0), 0)
    if (top_k > 0) | (top_p < 1):
        level, count, total = list_likely(row, peaks, best, top_k, found)
        level, token, is_drawn = sample_list(row, level, found, count, total, top_k, top_p, u)
        if is_drawn == 0:
            level = cut_row(row, found, total, top_k, top_p, SEGMENT_LEN)
    if is_drawn == 0:
        token = draw_from_row(row, level, u, SEGMENT_LEN)
    return level, token


# vocab_size bounds the loops. As a compile-time constant it would make Triton unroll them.
@triton.jit(do_not_specialize=["vocab_size"])
def sample_kernel(
    logits,  # (B, V)
    seeds, positions, temperatures, top_ks, top_ps, min_ps,  # ROW_INPUTS, (B,) each
    out, peaks,  # ROW_OUTPUTS, (B,) both; peaks may be None
    lists,  # (B, TILE) int64, working memory
    stride_row,  # elements from row to row of the logits
    vocab_size, GROUP: tl.constexpr,  # V, and the constexpr of `load_logits`
    SEGMENT_LEN: tl.constexpr,  # tokens a segment, a power of two; the last segments may be empty
    GREEDY_BELOW: tl.constexpr,
):  # fmt: skip
    """One program: the token of one row."""
    i = tl.program_id(0).to(tl.int64)  # 50,000 rows of logits have more than 2^31 elements
    row_logits = logits + i * stride_row
    peak, token, lane_peaks, best = find_peak(row_logits, vocab_size, GROUP)
    if peaks is not None:
        tl.store(peaks + i, peak)
    temperature = tl.load(temperatures + i)
    if (temperature >= GREEDY_BELOW) & (tl.abs(peak) < float("inf")):
        row = (row_logits, vocab_size, peak, temperature, tl.load(min_ps + i), GROUP)
        u = random_u(tl.load(seeds + i), tl.load(positions + i))
        top_k = tl.load(top_ks + i)
        top_p = tl.load(top_ps + i).to(tl.float64)
        found = lists + i * TILE
        _, token = cut_and_draw(row, lane_peaks, best, found, top_k, top_p, u, SEGMENT_LEN)
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
    """The kernel's arguments that follow from V: 50,257 tokens -> segments of 1,024."""
    SEGMENT_LEN = triton.next_power_of_2(triton.cdiv(vocab_size, NUM_SEGMENTS.value))
    SEGMENT_LEN = max(SEGMENT_STEP.value, SEGMENT_LEN)
    return {"vocab_size": vocab_size, "SEGMENT_LEN": SEGMENT_LEN}


def group_len(logits: Tensor) -> int:
    """The constexpr GROUP of `load_logits`: the logits in 16 bytes if rows are aligned, else 1."""
    group = 16 // logits.element_size()
    is_aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % group == 0
    return group if is_aligned and logits.stride(0) >= logits.shape[1] else 1


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
    fits = logits.ndim == 2 and 0 < logits.shape[1] <= MAX_VOCAB.value
    if not fits or logits.dtype == torch.float64:
        found = f"logits are {logits.dtype} {tuple(logits.shape)}"
        most = f"at most {MAX_VOCAB.value:,} tokens"
        raise ValueError(f"{found}: they must be (rows, tokens) in 16 or 32 bits, {most}")
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
        lists=torch.empty(B, TILE.value, dtype=torch.int64, device=logits.device),
        stride_row=logits.stride(0),
        **row_sizes(V),
        GROUP=group_len(logits),
        GREEDY_BELOW=GREEDY_BELOW,
        num_warps=8,
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
@triton.jit(do_not_specialize=["vocab_size", "top_k"])
def list_kernel(
    logits,  # (1, V)
    lists, counts,  # (1, TILE) int64, (1,) int32
    vocab_size, top_k,
):  # fmt: skip
    """For the demo: the list for top_k at temperature 1, and how long it is."""
    peak, _, peaks, best = find_peak(logits, vocab_size, 1)
    row = (logits, vocab_size, peak, 1.0, 0.0, 1)
    _, count, _ = list_likely(row, peaks, best, top_k, lists)
    tl.store(counts, count)


def demo():
    """Four lists of the most likely tokens; then seven settings, beside sampling.py."""
    if not can_launch():
        return
    V = 50_257
    device = torch.device("cpu" if INTERPRETED else "cuda")
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, V)).to(device)
    print(f"{V:,} random logits: how many are listed for top_k, and down to which\n")
    print("top_k   listed   the lowest listed   the lowest of the k")
    lists = torch.zeros(1, TILE.value, dtype=torch.int64, device=device)
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    for top_k in (1, 50, 300, 1000):
        list_kernel[(1,)](logits, lists, counts, V, top_k, num_warps=8)
        count = counts.item()
        listed = V - 1 - (lists[0, :count] & MAX_VOCAB.value - 1)
        ids = logits[0].sort(descending=True, stable=True).indices[:top_k]
        lowest = logits[0, listed].min()
        print(f"{top_k:5}   {count:6,}   {lowest:17.4f}   {logits[0, ids[-1]]:19.4f}")
        assert set(ids.tolist()) <= set(listed.tolist()) and count < 1.5 * top_k

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
    assert drawn == on_cpu
    print("ok: the same tokens, from lists of the most likely instead of a sort")


if __name__ == "__main__":
    demo()
