"""OpenVINO GenAI in a process of its own. Needs `openvino-genai` and, once, `optimum-intel`.

`optimum-intel` converts the weights when a model or an eight-bit form is asked for the first time.
The engine is its pipeline with continuous batching, whose attention reads a pool of blocks. The
pool's numbers have the dtype under test: with the default, its pool has eight bits everywhere.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from protocol import Task, serve, written_once

PRECISION = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
    "int8": {"KV_CACHE_PRECISION": "u8"},  # it quantises activations by itself
}


def convert(task: Task, folder: Path) -> None:
    """Write the model in OpenVINO's form."""
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        task.model, export=True, compile=False, load_in_8bit=task.dtype == "int8"
    )
    model.save_pretrained(folder)


class OpenVino:
    """The pipeline with continuous batching, stepped until nothing runs."""

    def __init__(self, task: Task):
        import openvino_genai as genai

        config = genai.SchedulerConfig()
        config.cache_size = 2  # GB
        config.max_num_seqs = task.max_batch
        config.max_num_batched_tokens = task.max_batch * task.max_seq_len
        config.dynamic_split_fuse = False  # whole prompts
        config.enable_prefix_caching = False
        options = {
            "INFERENCE_NUM_THREADS": task.threads,
            "PERFORMANCE_HINT": "LATENCY",
            **PRECISION[task.dtype],
        }
        folder = written_once(Path(task.own_files), partial(convert, task))
        self.pipeline = genai.ContinuousBatchingPipeline(folder, config, "CPU", options)
        self.version = genai.__version__
        self.settings = " ".join(f"{name}={value}" for name, value in options.items())
        self.num_requests = 0

    def prepare(self, prompts: list[list[int]]) -> None:
        """Nothing: one pipeline serves all batch sizes."""

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""
        import numpy as np
        import openvino
        from openvino_genai import GenerationConfig

        config = GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        for ids in prompts:
            self.num_requests += 1
            tensor = openvino.Tensor(np.array([ids]))
            handles.append(self.pipeline.add_request(self.num_requests, tensor, config))
        tokens: list[list[int]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    (output,) = handle.read().values()
                    tokens[number] += output.generated_ids
                    for _ in output.generated_ids:
                        on_token(number)
        return tokens


if __name__ == "__main__":
    serve(OpenVino)
