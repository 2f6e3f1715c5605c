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

# plug(starts, counts) gives the model's `attend` function for one step, in which positions
# [starts[i], starts[i] + counts[i]) of sequence i are computed.
Plug = Callable[[list[int], list[int]], Attend]


# ---- no cache ------------------------------------------------------------------------------------
def attend_without_cache(starts: list[int], counts: list[int]) -> Attend:
    """The plug that keeps nothing: whole sequences end to end, each attends to its own tokens."""
    assert not any(starts), "K and V of earlier positions are not kept: every start must be 0"

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # q (N, H, D), k and v (N, H_kv, D), N = sum(counts): cut into one piece for each sequence.
        pieces = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
        return torch.cat([attend_one_sequence(layer, *piece) for piece in pieces])

    return attend


@torch.inference_mode()
def next_logits(model: GPT, plug: Plug, sequences: list[list[int]], starts: list[int]) -> Tensor:
    """The logits (B, V) of each sequence's next token. Tokens are computed from its start on."""
    device = model.wte.weight.device
    new_ids = [ids[start:] for ids, start in zip(sequences, starts, strict=True)]
    counts = [len(ids) for ids in new_ids]
    flat_ids = [token_id for ids in new_ids for token_id in ids]
    flat_positions = [start + i for start, n in zip(starts, counts) for i in range(n)]
    input_ids = torch.tensor(flat_ids, device=device)  # (N,)
    positions = torch.tensor(flat_positions, device=device)  # (N,)
    # Counts 3, 5, 2 end at rows 3, 8 and 10, so the last rows are 2, 7 and 9.
    last_rows = torch.tensor([end - 1 for end in accumulate(counts)], device=device)  # (B,)
    hidden = model(input_ids, positions, plug(starts, counts), last_rows)  # (B, C)
    return model.logits(hidden)


def generate_no_cache(
    model: GPT, prompts: list[list[int]], max_tokens: int, eos_token_id: int | None = None
) -> list[list[int]]:
    """Greedy continuations of all prompts; every token is computed again in every step.

    A text ends after `max_tokens` tokens, with `eos_token_id` (which it keeps), or when prompt and
    text together reach the model's `max_seq_len`. This is a static batch: it ends with its longest
    text, and texts that have ended are computed along until then. Raises ValueError for an empty
    prompt, or a prompt that leaves no room for one more token.
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
    """The greedy loop of both baselines, around `logits_of(sequences, starts)` -> (B, V)."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: it must be at least 1")
    for prompt in prompts:
        if not 0 < len(prompt) < max_seq_len:
            found = f"prompt has {len(prompt)} tokens, max_seq_len is {max_seq_len}"
            raise ValueError(f"{found}: it needs at least 1, and room for one more")
    sequences = [list(prompt) for prompt in prompts]
    longest = [min(len(prompt) + max_tokens, max_seq_len) for prompt in prompts]
    unfinished = list(range(len(prompts)))
    starts = [0] * len(prompts)  # the first step computes whole prompts
    while unfinished:
        chosen = logits_of(sequences, starts).argmax(-1).tolist()
        for i in unfinished:
            sequences[i].append(chosen[i])
        unfinished = [
            i
            for i in unfinished
            if len(sequences[i]) < longest[i] and sequences[i][-1] != eos_token_id
        ]
        starts = [len(ids) - 1 for ids in sequences]  # every later step computes the newest token
    return [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)]


# ---- one contiguous slab per sequence ------------------------------------------------------------
class ContiguousCache:
    """`max_num_seqs` slabs of `max_seq_len` tokens, allocated once; sequence i has slab i.

    `slabs` is (num_layers, 2, max_num_seqs, H_kv, max_seq_len, D). So a layer's K is a view
    (max_num_seqs, H_kv, max_seq_len, D), the shape that `scaled_dot_product_attention` takes: the
    first tokens of the first B sequences are a slice of it, read without a copy. The keys of one
    head are adjacent in memory.
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
        """`allocate(shape, dtype=, device=)` gives the slabs' memory."""
        self.max_num_seqs = max_num_seqs
        self.max_seq_len = max_seq_len
        shape = (num_layers, 2, max_num_seqs, num_kv_heads, max_seq_len, head_dim)
        self.slabs = allocate(shape, dtype=dtype, device=device)
        self._num_clean = 0  # positions [0, _num_clean) of every slab are written or zero

    def attend(self, starts: list[int], counts: list[int]) -> Attend:
        """The plug for one step: positions [start, start + count) of the first B sequences.

        The library's attention is called once for each layer, for the whole batch, on views of the
        slabs. Every count is at least 1; earlier steps have written all positions before a start.
        """
        B, T = len(starts), max(counts)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        longest = max(ends)
        assert min(counts) > 0 and B <= self.max_num_seqs and longest <= self.max_seq_len
        self._clean(longest)
        sequence, row, position = self._places(starts, counts)  # (N,) each
        # Whole prompts are causal from their first token on: no query of a shorter prompt reads
        # the padding after it. Single queries of equally long sequences read all tokens that are
        # there. Only the other cases need a mask.
        is_causal = not any(starts)
        reads_all = T == 1 and len(set(starts)) == 1
        mask = None if is_causal or reads_all else self._mask(starts, T, longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_slabs, v_slabs = self.slabs[layer]
            k_slabs[sequence, :, position] = k
            v_slabs[sequence, :, position] = v
            if T == 1:
                queries = q[:, None]  # (B, 1, H, D): one query each, nothing to pad
            else:
                queries = q.new_zeros(B, T, *q.shape[1:])  # (B, T, H, D), short ones padded
                queries[sequence, row] = q
            out = F.scaled_dot_product_attention(
                queries.transpose(1, 2),  # (B, H, T, D)
                k_slabs[:B, :, :longest],  # (B, H_kv, longest, D)
                v_slabs[:B, :, :longest],
                attn_mask=mask,
                is_causal=is_causal,
                enable_gqa=q.shape[1] != k.shape[1],  # several query heads share one head of K
            ).transpose(1, 2)  # (B, T, H, D)
            return out[:, 0] if T == 1 else out[sequence, row]  # (N, H, D)

        return attend

    def _clean(self, longest: int) -> None:
        """Zero the positions below `longest` that no step has reached before.

        The weight of a masked score is 0, but 0 * NaN is NaN, and fresh memory may hold one. What
        earlier sequences have left in a slab is finite and does no harm.
        """
        self.slabs[..., self._num_clean : longest, :] = 0
        self._num_clean = max(self._num_clean, longest)

    def _places(self, starts: list[int], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of the N new tokens: its sequence, its row among the T, its position."""
        triples = [
            (i, t, start + t)
            for i, (start, count) in enumerate(zip(starts, counts, strict=True))
            for t in range(count)
        ]
        sequence, row, position = torch.tensor(triples, device=self.slabs.device).unbind(1)
        return sequence, row, position

    def _mask(self, starts: list[int], T: int, longest: int) -> Tensor:
        """What is added to the scores, (B, 1, T, longest): 0 up to a query's position, then -inf.

        It is built as wide as the slab and then cut, so that its rows begin at aligned addresses:
        a mask whose rows do not is copied by the library in every layer, on a GPU.
        """
        device = self.slabs.device
        # The t-th query of a sequence stands at position start + t, and reads that far.
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

    Texts end as in `generate_no_cache`, and the same prompts are refused. The batch is static too.
    Pass a `cache` to use it again or to bound its memory; its `max_seq_len` then ends a text too.
    Raises ValueError if it has fewer slabs than there are prompts.
    """
    config, weight = model.config, model.wte.weight
    if cache is None:
        cache = ContiguousCache(
            config.n_layer,
            len(prompts),
            config.max_seq_len,
            config.n_head,
            config.head_dim,
            weight.dtype,
            weight.device,
        )
    if len(prompts) > cache.max_num_seqs:
        raise ValueError(f"{len(prompts)} prompts, {cache.max_num_seqs} slabs: raise max_num_seqs")
    max_seq_len = min(config.max_seq_len, cache.max_seq_len)
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
