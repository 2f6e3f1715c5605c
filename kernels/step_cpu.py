"""A whole step on a CPU in one compiled call, with no Python between its layers.

`layer_cpu.py` makes two compiled calls a layer, and the pool needs three more. For GPT-2 the Python
around these 60 calls takes 1.1 ms a step, while one sequence's weights in bfloat16 are read in 3.4.
Here all layers, the writes to the pool, attention and the output head are one function:

    x ─> [ ln_1 ─> c_attn ─> write K and V ─> attention ─> c_proj ─> .. ─> + ] x n_layer ─> logits

It calls the compiled functions that `layer_cpu.py` and `attention_cpu.py` call from Python. The
model's socket serves one layer. So this is no function for the socket but a `forward` for the
engine, as `fused_forward` is on a GPU. It takes every batch, prompts too, so a sequence has the
same bits in each of them. A step of one sequence takes 4.0 in place of 5.1 ms, one of four 5.8 in
place of 7.1 (AMD EPYC, bfloat16, two threads).

A compiled function cannot index a list of layers, each of them a dozen arrays. But all layers have
the same shapes. So it takes the arrays of the first one, and a table of the addresses of all.

Checked by tests/kernels/test_step_cpu.py, against `eager_forward` in float64.
"""

import numpy as np
import torch
from torch import Tensor

from engine import Forward
from kernels.attention_cpu import (
    LOG2_E,
    MANY_QUERIES,
    attend_on_openmp,
    count_head_groups,
    prepare,
)
from kernels.layer_cpu import (
    arrays_of,
    can_compile_layer,
    finish_layer,
    normalize_and_multiply,
    numbers_of,
    scratch,
    scratch_widths,
)
from kernels.numba_tools import (
    arrays_at,
    as_numpy,
    compiled,
    compiled_parallel,
    flat_memory,
    narrow,
    prange,
    use_openmp_threads,
)
from kernels.prefill_cpu import quantize_k_and_v, write_k_and_v
from kernels.prompt_cpu import attend_panels
from kv_cache import Batch, KVCache
from model import GPT


@compiled
def attend(qkv, k, v, layout, batch, max_query_len, num_threads, scale, out):
    """Write a layer's new K and V to the pool, then attend: out (N, H, D) in float32.

    qkv (N, 3 * H * D or more) are the results of c_attn. k and v are the flat pool from this
    layer's K and V on, `layout` as in `attention_cpu.walk_chunk`.
    """
    slots, tables, locs, context_lens, context_starts = batch
    _, H, D = out.shape
    block_size, cache_strides = layout[1], layout[2:]
    q, strides = qkv.reshape(-1), (qkv.shape[1], D, 1)
    new_k, new_v = q[H * D :], q[2 * H * D :]
    write = (
        new_k, strides, k, cache_strides, new_v, strides, v, cache_strides, block_size, slots, H, D
    )  # fmt: skip
    if k.itemsize == 1:
        quantize_k_and_v(*write)
    else:
        write_k_and_v(*write)
    queries = np.empty(out.shape, np.float32)
    chunks, chunk_locs, m, l, acc = prepare(
        q, strides, scale, queries, locs, context_lens, context_starts, out
    )
    num_groups = count_head_groups(num_threads, len(chunks), H, k.itemsize)
    attend_on_openmp(
        num_groups, chunks, chunk_locs, locs,
        queries, k, v, layout, tables, context_lens, m, l, acc, out,
    )  # fmt: skip
    if max_query_len >= MANY_QUERIES:
        attend_panels(
            num_threads, MANY_QUERIES, queries, k, v, layout,
            tables, locs, context_lens, context_starts, out,
        )  # fmt: skip


@compiled_parallel
def store_rows(rows, out):
    """out = rows (N, C): float32 to float32 or bfloat16."""
    for row in prange(len(rows)):
        for j in range(rows.shape[1]):
            out[row, j] = narrow(rows[row, j], out)


@compiled
def run_step(
    x, batch, sample_rows, max_query_len, num_threads, pool, layers, head, scratch, logits
):  # fmt: skip
    """logits (M, ..) = the output head of the sample rows behind the last layer.

    x (N, C) are the sums of the embeddings, float32 or uint16 for bfloat16. `pool` is the flat pool
    from layer 0's K and V on, its layout, and the elements of a layer. `layers` are the arrays of
    layer 0, the addresses of all layers' arrays, and the scales of their scores.
    """
    k, v, layout, layer_stride = pool
    first, addresses, scales = layers
    N, C = x.shape
    H = layout[0]
    qkv_bias = first[0][1][-1]
    qkv = np.empty((N, len(qkv_bias)), x.dtype)
    attended = np.empty((N, H, C // H), np.float32)
    inputs, out = np.empty_like(x), np.empty_like(x)
    for i in range(len(addresses)):
        before, after = arrays_at(first, addresses[i])
        normalize_and_multiply(x, before, scratch, qkv)
        own = i * layer_stride
        attend(
            qkv, k[own:], v[own:], layout, batch, max_query_len, num_threads, scales[i], attended
        )
        if i + 1 == len(addresses):  # only the sample rows go on
            attended, x = attended[sample_rows], x[sample_rows]
            inputs, out = inputs[: len(x)], out[: len(x)]
        store_rows(attended.reshape(-1, C), inputs)
        finish_layer(inputs, x, after, scratch, out)
        x, out = out, x
    normalize_and_multiply(x, head, scratch, logits)


# ---- what is called ------------------------------------------------------------------------------
def can_compile_step(model: GPT, cache: KVCache) -> bool:
    """Whether `step_forward` can run a model over a pool: all products are panels of one kind."""
    layers_are_panels = all(can_compile_layer(layer) for layer in model.h)
    head_is_alike = type(model.lm_head) is type(model.h[0].attn.c_attn)
    reads_pool = cache.pool.dtype in (model.wte.weight.dtype, torch.int8)
    return layers_are_panels and head_is_alike and reads_pool and not model.training


def step_forward(model: GPT, cache: KVCache) -> Forward:
    """A forward (see engine.py) in one compiled call. Call it where `can_compile_step`."""
    # The closure keeps this list, and so the arrays whose addresses the compiled function gets.
    all_arrays = [arrays_of(layer) for layer in model.h]
    addresses = np.array([addresses_in(arrays) for arrays in all_arrays])
    scale = model.config.head_dim**-0.5 * LOG2_E
    scales = np.array([scale * layer.attn.q_scale for layer in model.h])
    k_cache, v_cache = cache.layer(0)
    layout = *k_cache.shape[1:3], *k_cache.stride()[:3]
    pool = flat_memory(k_cache), flat_memory(v_cache), layout, cache.pool.stride(0)
    head = numbers_of(model.ln_f), model.lm_head.arrays
    widths = scratch_widths(model.h[0])

    def forward(batch: Batch) -> Tensor:
        num_threads = torch.get_num_threads()
        use_openmp_threads(num_threads)
        x = model.wte(batch.input_ids) + model.wpe(batch.positions)  # (N, C)
        logits = torch.empty(len(batch.sample_rows), len(head[1][-1]), dtype=x.dtype)
        numbers, context_lens = as_numpy(x), batch.context_lens.numpy()
        arrays = (
            batch.slot_mapping.numpy(),
            batch.block_tables.numpy(),
            batch.query_start_locs.numpy(),
            context_lens,
            np.zeros_like(context_lens),
        )
        run_step(
            numbers,
            arrays,
            batch.sample_rows.numpy(),
            batch.max_query_len,
            num_threads,
            pool,
            (all_arrays[0], addresses, scales),
            head,
            scratch.rows(len(x), widths, numbers.dtype),
            as_numpy(logits),
        )
        return logits[:, : model.lm_head.out_features]

    return forward


def addresses_in(arrays: tuple) -> list[int]:
    """The addresses of all arrays in tuples of tuples, in the order in which they stand."""
    if isinstance(arrays, np.ndarray):
        return [arrays.ctypes.data]
    return [at for part in arrays for at in addresses_in(part)] if isinstance(arrays, tuple) else []
