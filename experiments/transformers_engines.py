"""transformers' own ways to decode, with our weights: the engines that ours is compared with.

    Theirs      a loop around the model and its DynamicCache, or a StaticCache of a given length
    Generate    its own loop, `generate()`, as a user calls it
    Compiled    the same loop over a StaticCache, its decode step compiled and recorded by PyTorch
    Continuous  transformers' continuous batching, which is a paged engine like ours

A comparison is fair only against the fastest form of the other side. So `Theirs` is a loop without
`generate()` around it, computes logits of the last position only (`logits_to_keep=1`, as
`generate()` does too), and takes an arg max on the device.

`Continuous` keeps one manager for all rounds. `model.generate_batch()` would start a thread and end
it each time, which takes longer than a small workload. The manager is warmed up before the first
round, and the sizes of its pool and step are given to it: by itself it would take most of the
machine's memory. Its times are its own timestamps, one for each token. Requests are added while it
is paused, so that all of them start in one step, as in our engine.

All need transformers, `Continuous` 5.17 or newer. How they are checked: peers.py compares the
logits or the tokens of each of them before it times them.
"""

import importlib.util
import time
from contextlib import nullcontext
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import CONV1D
from model import GPT

WAIT_S = 600.0  # for one request; a manager whose thread has died gives no other sign


def require_transformers() -> None:
    """Raise ValueError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install transformers")


def as_transformers(model: GPT) -> torch.nn.Module:
    """transformers' GPT-2 with the same weights, on the same device, in the same dtype."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_inner=c.n_inner,
        vocab_size=c.vocab_size,
        n_positions=c.max_seq_len,
        activation_function=c.activation_function,
        attn_implementation="sdpa",
        layer_norm_epsilon=c.layer_norm_epsilon,
        bos_token_id=0,
        eos_token_id=0,
        scale_attn_weights=c.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    theirs = GPT2LMHeadModel(config).to(model.wte.weight)
    for name, weight in model.state_dict().items():
        target = theirs.get_parameter(name if name == "lm_head.weight" else f"transformer.{name}")
        # Their Conv1D holds (in, out), our linear layers (out, in).
        target.data.copy_(weight.t() if name.endswith(CONV1D) else weight)
    return theirs.requires_grad_(False).eval()


# ---- a loop around the model ---------------------------------------------------------------------
class Theirs:
    """A loop around transformers' model: `start` computes prompts, `step` adds a token to each.

    The cache is a DynamicCache, or a StaticCache of `length` tokens if a length is given.
    """

    def __init__(self, model: torch.nn.Module, length: int | None = None):
        self.model, self.length = model, length
        # What `take_over` copied: the prompts, K and V of each layer, and the next token ids.
        self.copied: tuple[Any, Any, Any] = (None, None, None)

    def take_over(self, ours: Any, prompts: Tensor) -> None:
        """Let `start` begin with a copy of K and V that our engine computes for the prompts (B, T).

        Both sides then decode from the same numbers. It also saves time where PyTorch is slow at
        prompts, as in bfloat16 on a processor without instructions for it.
        """
        ours.start(prompts)
        engine, T = ours.llm.engine, prompts.shape[1]
        running = list(engine.scheduler.running)
        layers = []
        for layer in range(self.model.config.n_layer):
            pairs = [engine.cache.gather(layer, seq.block_table, T) for seq in running]
            # (T, H, D) of each sequence -> (B, H, T, D)
            layers.append([torch.stack(same_kind).transpose(1, 2) for same_kind in zip(*pairs)])
        next_ids = torch.tensor([seq.token_ids[T:] for seq in running], device=prompts.device)
        self.copied = prompts, layers, next_ids
        for seq in running:
            engine.abort(seq.request.request_id)
        engine.step()  # computes nothing, and frees their blocks

    def begin(self) -> None:
        """Make an empty cache."""
        from transformers import DynamicCache, StaticCache

        if self.length is None:
            self.cache = DynamicCache(config=self.model.config)
        else:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, V) of each sequence's next token. K and V of `input_ids` are cached."""
        output = self.model(input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def start(self, prompts: Tensor) -> None:
        """Compute the prompts (B, T) and a first token of each, or begin with the copy of ours."""
        self.begin()
        copied_prompts, layers, next_ids = self.copied
        if prompts is not copied_prompts:
            self.next_ids = self.logits(prompts).argmax(-1, keepdim=True)
            return
        for layer, (k, v) in enumerate(layers):
            self.cache.update(k, v, layer)
        self.next_ids = next_ids

    def step(self) -> None:
        """One more token for each sequence. The ids stay on the device, as in `generate()`."""
        self.next_ids = self.logits(self.next_ids).argmax(-1, keepdim=True)

    def finish(self) -> None:
        """Drop the sequences."""
        del self.cache, self.next_ids


class Generate(Theirs):
    """transformers' own loop, with all that `generate()` does around each step."""

    def ms_a_token(self, prompts: Tensor, steps: int) -> float:
        """Milliseconds of 1 + steps tokens for prompts (B, T), less those of 1, over the steps."""
        whole_ms, first_ms = (self._time_ms(prompts, n) for n in (1 + steps, 1))
        return (whole_ms - first_ms) / steps

    def _time_ms(self, prompts: Tensor, new_tokens: int) -> float:
        from transformers import GenerationConfig

        # No token ends a text: -1 is none.
        sizes = {"max_new_tokens": new_tokens, "eos_token_id": -1, "pad_token_id": 0}
        config = GenerationConfig(do_sample=False, **sizes)
        started = time.perf_counter()
        mask = torch.ones_like(prompts)
        found = self.model.generate(prompts, attention_mask=mask, generation_config=config)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        taken_ms = (time.perf_counter() - started) * 1e3
        assert found.shape[1] == prompts.shape[1] + new_tokens, "generate() stopped early"
        return taken_ms


class Compiled(Theirs):
    """The loop over a StaticCache, with a decode step that PyTorch compiles and records.

    A recording knows the addresses of its cache. So each number of sequences has one cache, which
    is reset instead of made again. Prompts run uncompiled.
    """

    def __init__(self, model: torch.nn.Module, length: int):
        super().__init__(model, length)
        self.compiled = torch.compile(model, mode="reduce-overhead")
        self.caches: dict[int, Any] = {}  # number of sequences -> cache

    def begin(self) -> None:
        """The next logits are of prompts: their number says which cache to take."""
        self.cache = None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, V) of each sequence's next token. K and V of `input_ids` are cached."""
        if self.cache is None:
            self._take_cache(len(input_ids))
            return super().logits(input_ids)
        torch.compiler.cudagraph_mark_step_begin()  # the result of the last step may be overwritten
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.compiled(input_ids, **options).logits[:, -1]

    def _take_cache(self, num_sequences: int) -> None:
        if num_sequences in self.caches:
            self.cache = self.caches[num_sequences]
            self.cache.reset()
        else:
            super().begin()
            self.caches[num_sequences] = self.cache


# ---- continuous batching -------------------------------------------------------------------------
class Continuous:
    """transformers' continuous batching as a context manager. The model must be its own."""

    def __init__(self, model: torch.nn.Module, num_blocks: int, step_tokens: int, block_size: int):
        """A pool of `num_blocks` blocks, and steps of at most `step_tokens` tokens.

        The pool should have twice the blocks that are needed: if few are free, prompts have to
        wait. Blocks are not shared between rounds: each round computes the prompts again.
        """
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        fields = ContinuousBatchingConfig.__dataclass_fields__
        sizes = {"page_size" if "page_size" in fields else "block_size": block_size}
        sizes |= {"num_blocks": num_blocks, "max_batch_tokens": step_tokens}
        sizes |= {"allow_block_sharing": False}
        if "auto_switch_to_flash" in fields:
            sizes |= {"auto_switch_to_flash": False}  # another library, which it would fetch
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.manager = model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        )
        self.model, self.block_size = model, block_size

    def __enter__(self) -> "Continuous":
        with torch.no_grad():  # not inference mode: its thread writes into tensors made here
            self.manager.warmup()
        self.manager.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.manager.stop(block=True, timeout=30, hard_stop=error is not None)
        self.manager.destroy()

    @property
    def backend(self) -> str:
        """How it is configured: "torch, sdpa, page_size=16, num_blocks=97, ...".

        It decides about CUDA graphs and asynchronous steps by itself.
        """
        config = self.manager.continuous_batching_config
        names = "num_blocks", "max_batch_tokens", "use_cuda_graph", "use_async_batching"
        settings = [f"{name}={getattr(config, name, None)}" for name in names]
        attention = self.model.config._attn_implementation
        return ", ".join(["torch", attention, f"page_size={self.block_size}", *settings])

    def generate(self, prompts: Tensor, new_tokens: int) -> list:
        """Serve the prompts (B, T) to their end; its outputs, in the order of the prompts."""
        return self.serve([(prompt, new_tokens) for prompt in prompts.tolist()])

    def serve(self, requests: list[tuple[list[int], int]]) -> list:
        """Serve (prompt, tokens to write) pairs to their end; the outputs in their order.

        Raises ValueError if the manager fails or gives no result for ten minutes.
        """
        manager = self.manager
        with getattr(manager, "pause", nullcontext)():  # older versions cannot pause
            ids = [
                manager.add_request(prompt, max_new_tokens=n, record_timestamps=True)
                for prompt, n in requests
            ]
        outputs: dict[str, Any] = {}
        deadline = time.monotonic() + WAIT_S
        while len(outputs) < len(ids):
            output = manager.get_result(timeout=1.0)
            if output is not None:
                if output.error is not None:
                    raise ValueError(f"continuous batching failed: {output.error}")
                outputs[output.request_id] = output
            elif not manager.is_running() or time.monotonic() > deadline:
                raise ValueError("continuous batching ended without a result: see its log")
        return [outputs[request_id] for request_id in ids]

    def time_steps(self, prompts: Tensor, steps: int) -> list[float]:
        """Milliseconds of each decode step, from token to token of the sequence that began last."""
        outputs = self.generate(prompts, 1 + steps)
        stamps = max((output.timestamps for output in outputs), key=lambda stamps: stamps[0])
        assert len(stamps) == 1 + steps, f"{len(stamps)} tokens, not {1 + steps}"
        return [(after - before) * 1e3 for before, after in pairwise(stamps)]
