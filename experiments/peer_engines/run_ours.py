"""PagedGPT in a process of its own, as `benchmark.py engines` runs it. Needs the project only.

Run by `python -m experiments.peer_engines.run_ours TASK` from the project's folder. An engine is
built for each batch size, with a pool and a `max_num_seqs` of that size.
"""

from collections.abc import Callable
from pathlib import Path

from experiments.peer_engines.protocol import Task, Unsupported, serve
from experiments.results import commit
from llm import LLM, SamplingParams

OPTIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
}
BLOCK_SIZE = 16


class Ours:
    """Our engine, stepped until nothing runs."""

    def __init__(self, task: Task):
        if task.dtype not in OPTIONS:
            raise Unsupported(f"it has no {task.dtype}")
        self.task = task
        self.version = commit()
        self.settings = f"block_size={BLOCK_SIZE} options={OPTIONS[task.dtype]}"

    def prepare(self, prompts: list[list[int]]) -> None:
        """Build an engine with room for these prompts in one step."""
        blocks_each = -(-self.task.max_seq_len // BLOCK_SIZE)
        self.llm = LLM(
            Path(self.task.model),
            device="cpu",
            threads=self.task.threads,
            enable_prefix_caching=False,  # each round computes its prompts, as the peers do
            block_size=BLOCK_SIZE,
            num_blocks=len(prompts) * blocks_each,
            max_num_seqs=len(prompts),
            max_num_batched_tokens=len(prompts) * self.task.prompt_tokens,
            **OPTIONS[self.task.dtype],
        )

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""
        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        number_of = {engine.add_request(ids, params): i for i, ids in enumerate(prompts)}
        tokens: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished():
            for delta in engine.step().deltas:
                number = number_of[delta.request_id]
                tokens[number] += delta.token_ids
                for _ in delta.token_ids:
                    on_token(number)
        return tokens


if __name__ == "__main__":
    serve(Ours)
