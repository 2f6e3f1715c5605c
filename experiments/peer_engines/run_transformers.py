"""transformers in a process of its own. Needs `transformers` and `torch`.

A loop around its model and its DynamicCache, without `generate()` around it: the fastest form.
"""

from collections.abc import Callable

from protocol import Task, Unsupported, serve


class Transformers:
    """Its model and its cache; a step is one forward and one arg max."""

    def __init__(self, task: Task):
        import torch
        import transformers

        if task.dtype == "int8":
            raise Unsupported("transformers alone has no int8 on a CPU")
        torch.set_num_threads(task.threads)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            task.model, dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
        ).eval()
        self.version = transformers.__version__
        self.settings = f"DynamicCache, sdpa, logits_to_keep=1, torch {torch.__version__}"

    def prepare(self, prompts: list[list[int]]) -> None:
        """Nothing: the model serves all batch sizes."""

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""
        import torch
        from transformers import DynamicCache

        cache, ids, columns = DynamicCache(config=self.model.config), torch.tensor(prompts), []
        with torch.inference_mode():
            for _ in range(new_tokens):
                output = self.model(ids, past_key_values=cache, logits_to_keep=1)
                ids = output.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
                columns.append(ids)
                for number in range(len(prompts)):
                    on_token(number)
        return torch.cat(columns, 1).tolist()


if __name__ == "__main__":
    serve(Transformers)
