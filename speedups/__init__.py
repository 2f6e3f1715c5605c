"""Ways to run the same steps faster: passed into the engine as a forward, a draw or a subclass.

No lesson needs this wing: `llm.py` passes these in. A file imports only files above it.

    cuda_graphs        record a decode step once, then replay it without Python
    plan_ahead         launch the next step before the tokens of the last one are read
    adapt_threads      fewer threads while other processes take the cores
    ranks              processes that step together: messages, sums, and a common end
    tensor_parallel    cut one model over several devices, each with a part of every layer
    quantized_kv       a pool in eight bits: twice the sequences in the same memory
    quantized_weights  linear layers in eight bits: a quarter of the bytes in each step
"""
