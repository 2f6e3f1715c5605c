"""The lesson's functions again, fast: Numba on a CPU, Triton on a GPU.

No lesson needs this wing. Every kernel has the signature of `paged_attention.py` or of the function
it replaces, and its tests compare it with that function. A file imports only files above it.

    numba_tools          Numba: compile a loop, widen and store bfloat16, powers of two, prefetch
    device_memory        huge pages for the pool, free memory, one copy of what was drawn
    padded_head          an output head whose rows of logits begin at multiples of 16 bytes
    prefill_cpu          the write of new K and V on a CPU, and a prompt's attention by PyTorch
    prompt_cpu           attention for the prompts of a step on a CPU, 64 queries at a time
    attention_cpu        decode attention on a CPU: the plain loop, then whole blocks, all heads
    triton_prefill       attention with many queries on a GPU, and the KV write
    triton_decode        attention with one query on a GPU: split, then merge
    triton_fused_decode  KV write, attention and merge in one launch
    triton_small_linear  a matrix product for a few rows
    backends             which of these this machine can run
    triton_sampling      the draws of `sampling.py` on a GPU
    linear_cpu           a linear layer on a CPU that prefetches its weights
    int8_linear_cpu      the same with weights and inputs in eight bits
    layer_cpu            a layer on a CPU in two compiled calls around its attention
    step_cpu             a whole step on a CPU in one compiled call
    packed_linear        a model whose weights are in the order in which a CPU multiplies them
    triton_fused         the small operations around attention, joined
"""
