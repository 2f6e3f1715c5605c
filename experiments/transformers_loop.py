"""transformers' GPT-2 with our weights in a bare loop: the other side of every comparison.

Its fastest honest form: no `generate()` around it, logits of the last position only
(`logits_to_keep=1`, as `generate()` asks for), an arg max. Needs transformers; peers.py and those
that compare as it does drive it.
"""

import importlib.util

import torch
from torch import Tensor

from checkpoints.load import CONV1D
from model import GPT


def require_transformers() -> None:
    """Raise ValueError where the other side is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install transformers")


def as_transformers(model: GPT) -> torch.nn.Module:
    """The same weights in transformers' GPT-2, on the same device, in the same dtype."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner}
    sizes |= {"vocab_size": c.vocab_size, "n_positions": c.max_seq_len}
    options = {"activation_function": c.activation_function, "attn_implementation": "sdpa"}
    options |= {"layer_norm_epsilon": c.layer_norm_epsilon, "bos_token_id": 0, "eos_token_id": 0}
    options |= {"scale_attn_weights": c.scale_attn_weights}
    options |= {"scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx}
    options |= {"tie_word_embeddings": c.tie_word_embeddings}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **options)).to(model.wte.weight)
    for name, weight in model.state_dict().items():
        target = theirs.get_parameter(name if name == "lm_head.weight" else f"transformer.{name}")
        # Their Conv1D has (in, out).
        target.data.copy_(weight.t() if name.endswith(CONV1D) else weight)
    return theirs.requires_grad_(False).eval()


class Theirs:
    """A bare loop: prompts in, then a token a sequence and step.

    Its cache is a DynamicCache or, where a `length` is given, a StaticCache of so many tokens.
    """

    def __init__(self, model: torch.nn.Module, length: int | None = None):
        self.model, self.length = model, length
        self.copied: tuple = None, None, None  # prompts, each layer's K and V, the next token ids

    def take_over(self, ours, prompts: Tensor) -> None:
        """Let `start` begin with a copy of the K and V that our engine computes for these prompts.

        Both then decode behind the same numbers, and nobody waits where PyTorch is slow at prompts,
        as it is with bfloat16 on a processor that has no products for it.
        """
        ours.start(prompts)
        engine, T, layers = ours.llm.engine, prompts.shape[1], []
        running = list(engine.scheduler.running)
        for layer in range(self.model.config.n_layer):
            pairs = [engine.cache.gather(layer, seq.block_table, T) for seq in running]
            layers.append([torch.stack(all_of).transpose(1, 2) for all_of in zip(*pairs)])
        next_ids = torch.tensor([seq.token_ids[T:] for seq in running], device=prompts.device)
        self.copied = prompts, layers, next_ids
        for seq in running:
            engine.abort(seq.request.request_id)

    def begin(self) -> None:
        """An empty cache."""
        from transformers import DynamicCache, StaticCache

        if self.length is None:
            self.cache = DynamicCache(config=self.model.config)
        else:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores (B, V) of each sequence's next token; what K and V they have is kept."""
        output = self.model(input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def start(self, prompts: Tensor) -> None:
        """Compute the prompts (B, T) and the first token of each, or begin with a copy of ours."""
        self.begin()
        for_whom, layers, next_ids = self.copied
        if prompts is not for_whom:
            self.next_ids = self.logits(prompts).argmax(-1, keepdim=True)
            return
        for layer, (k, v) in enumerate(layers):
            self.cache.update(k, v, layer)
        self.next_ids = next_ids

    def step(self) -> None:
        """One more token for each. The ids stay on the device, as in `generate()`."""
        self.next_ids = self.logits(self.next_ids).argmax(-1, keepdim=True)

    def finish(self) -> None:
        """Forget the sequences."""
        del self.cache, self.next_ids
