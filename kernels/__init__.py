"""The lesson's functions again, fast: Numba on a CPU, Triton on a GPU.

No lesson needs this wing. Every kernel has the signature of `paged_attention.py` or of the function
it replaces, and its tests compare it with that function. A file imports only files above it.

    numba_tools          compile a Python loop with Numba, or run it as Python where Numba is absent
    device_memory        huge pages, and how much memory is free
    vector_cpu           a vector register of the CPU as a value
    prefill_cpu          attention with many queries on a CPU, and the KV write
    attention_cpu        attention with one query on a CPU: whole blocks where they lie
    triton_prefill       attention with many queries on a GPU, and the KV write
    triton_decode        attention with one query on a GPU: split, then merge
    triton_fused_decode  KV write, attention and merge in one launch
    triton_small_linear  a matrix product for a few rows
    backends             which of these this machine can run
    triton_sampling      the draws of `sampling.py` on a GPU
    linear_cpu           a linear layer on a CPU that fetches weights ahead
    packed_linear        weights in the order in which a CPU multiplies them
    triton_fused         the small operations around attention, joined
"""
