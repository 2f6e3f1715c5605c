"""All experiments: each is a pair of functions, `add_arguments` and `run`, that yields rows.

`python benchmark.py NAME` runs them. No lesson needs this wing. A file imports only files above it.

    results               rows with their provenance, appended to a CSV file, shown as tables
    names                 contenders that more than one file has to know
    reservations          contiguous memory under the paged engine: buddies and three reservations
    simulate              the real scheduler and allocator under a simulated clock
    ceilings              what the machine can do at most: read, copy, multiply, launch
    allocator             the cost of the allocator, and whether a block is ever lost
    bookkeeping           the host's work in a step: scheduler and engine without a model
    memory                KV bytes step by step, and how many sequences fit at once
    kernels               all ways to attend over the same bytes, and a GPU kernel's tiles
    transformers_engines  transformers' own ways to decode, with our weights
    peers                 the engine against them, and the parts of a decode step
    engines               the engine against those that a user would pick, a process each
    hf                    transformers' own loop with its caches, and with PagedCache
    speed                 the same tokens: no cache, contiguous, paged, transformers
    block_size            1 to 256 tokens a block: speed, memory filled, copies
    workloads             mixed requests, a prompt that joins, a profile of a GPU's step
    latency               a decode step in each way to run it, beside its floor
    trace                 requests that arrive over time, under eight memory plans
    serve                 a server under load, over HTTP: latency against the rate of requests
    block_trace           a recorded trace of block hashes through the prefix cache's allocator
    sharing               what is gained when prompts, texts and beams share blocks
    ranks                 one model on one process and cut over two: speed, bytes sent, memory
    scale                 many simulated replicas behind each router; what a wire carries
    concurrency           how many requests run at once in equal memory
    quality               what fewer bits cost: loss, logits and tokens, beside the speed
    neighbour             a decode step while another process keeps a core busy
    gpu_tests             a plugin of pytest: which tests come first, an outcome a line
    gpu_summary           the table of a run on a GPU, and the defaults that it recommends
    gpu_check             one command on a machine with a GPU
"""
