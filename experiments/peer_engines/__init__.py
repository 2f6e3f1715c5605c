"""A script for each engine that `benchmark.py engines` compares: what runs in its own process.

An engine needs packages that ours would not bear (another PyTorch, another Numba), so each lives in
a virtual environment of its own, and its script is run by that environment's Python. No package of
ours is there. So a script imports the standard library, `protocol` and its engine, nothing else.
The one exception is `run_ours`, which runs in the project's environment.

    protocol          one line of JSON a run, and the clock
    run_ours          PagedGPT
    run_vllm          vLLM's build for CPUs
    run_openvino      OpenVINO GenAI, its engine with continuous batching
    run_ctranslate2   CTranslate2
    run_llama_cpp     llama.cpp, through its C functions
    run_transformers  transformers: a loop around its model and its DynamicCache
"""
