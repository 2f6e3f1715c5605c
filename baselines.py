"""What paging replaces: no cache, and one contiguous slab per sequence.

A model without a cache computes the keys and values of all earlier tokens again for each new token.
A text of 1,000 tokens then costs 1 + 2 + .. + 1,000 = 500,500 rows through all layers. A cache
brings that down to 1,000 rows. The plain cache gives each sequence one slab of adjacent memory,
which the library's attention reads without a block table:

    no cache                                             every step computes all tokens again
    contiguous  |AAAAAA..........|BBB.............|      one row a step, a slab of max_seq_len each
    paged       |AAAA|BBB.|AA..|    |    |    |    |     one row a step, a block when one is full

The slab is what costs memory. It cannot grow, so each sequence gets room for the longest possible
text before its first token: 37.7 MB for 1,024 tokens of the 124M GPT-2 in 16 bits, for a text of 10
tokens too. Both baselines are functions for the model's `attend` socket, and both run a static
batch: all prompts start together, and the batch ends with its longest text. A way between slabs and
blocks is vAttention (arXiv:2405.04437): its slabs are adjacent in virtual memory only, and the
GPU's own page tables give them physical memory as they grow.

Yu et al. 2022, "Orca", OSDI, section 3 (static batches); Kwon et al. 2023, "PagedAttention", SOSP,
arXiv:2309.06180, section 3.1 (what slabs waste).
Run: python baselines.py
Try: MAX_TOKENS = 40 in the demo: the rows without a cache grow with its square, the rows with slabs
in proportion. Or SLAB_LEN = 16: the prompt of 14 tokens then ends after 2 more, so the assert "the
same tokens" fails.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

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


# --------------------------------------------------------------------------------------------------
MAX_TOKENS = 20  # new tokens of each text in the demo
SLAB_LEN = 64  # tokens that a slab has room for


def demo():
    """Three prompts, with and without a cache: the same tokens, different work and memory."""
    config = GPTConfig(97, 64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2).double().eval()
    num_rows: list[int] = []  # rows that each call of the model computed
    model.register_forward_pre_hook(lambda _, inputs: num_rows.append(len(inputs[0])))
    prompts = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]

    without_cache = generate_no_cache(model, prompts, MAX_TOKENS)
    rows_without = sum(num_rows)
    num_rows.clear()
    cache = ContiguousCache(2, len(prompts), SLAB_LEN, 2, 16, torch.float64)
    contiguous = generate_contiguous(model, prompts, MAX_TOKENS, cache=cache)
    rows_contiguous = sum(num_rows)
    assert without_cache == contiguous, "the same tokens"

    print(f"prompts of 5, 14 and 2 tokens, {MAX_TOKENS} more each     rows computed  KV bytes held")
    print(f"no cache    all tokens in every step            {rows_without:13} {0:14,}")
    print(f"contiguous  3 slabs for {SLAB_LEN} tokens               {rows_contiguous:13}", end="")
    print(f" {cache.slabs.nbytes:14,}\n")
    # The newest token's K and V are never written: with 20 more tokens, 24 + 33 + 21 = 78 are.
    filled = sum(len(ids) + MAX_TOKENS - 1 for ids in prompts)
    room = len(prompts) * SLAB_LEN
    print(f"at the end {filled} of the slabs' {room} tokens are filled: {filled / room:.0%}")
    assert rows_contiguous == filled < rows_without
    print("ok: the same tokens with and without a cache, and the slabs are mostly empty")


if __name__ == "__main__":
    demo()
