"""transformers' own continuous batching as a peer: a paged engine against which ours can be held.

`model.generate_batch()` starts a thread and ends it, which takes longer than small work itself. So
here is a manager that lives through all rounds, warmed before the first, with its pool's and its
step's size given: left alone it would take most of the machine's memory. It is timed by its own
timestamps, one a token, and between two rounds its thread sleeps. Requests are added while it
pauses, so that all of them start in one step, as ours do.

How it was configured in the end (it decides about CUDA graphs and asynchronous steps by itself)
stands in the row, as its backend. Needs transformers 5.17 or newer; peers.py drives it.
"""

import time
from contextlib import nullcontext
from itertools import pairwise
from types import TracebackType

import torch
from torch import Tensor

WAIT_S = 600.0  # for one request; a thread that died says so only by its silence


class Continuous:
    """The manager; use it as a context. `model` is transformers' own, of this contender alone."""

    def __init__(self, model: torch.nn.Module, batch: int, length: int, block_size: int):
        """Room for `batch` sequences of `length` tokens, and for all of their prompts in one step.

        Twice the blocks: below a share of free ones it would let prompts wait. Blocks are not
        shared, or from the second round on the prompts would not be computed.
        """
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        fields = ContinuousBatchingConfig.__dataclass_fields__
        sizes = {"page_size" if "page_size" in fields else "block_size": block_size}
        sizes |= {"num_blocks": 2 * batch * -(-length // block_size) + 1}
        sizes |= {"max_batch_tokens": batch * length, "allow_block_sharing": False}
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.manager = model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        )
        self.model, self.block_size = model, block_size

    def __enter__(self) -> "Continuous":
        with torch.no_grad():  # not inference mode: its thread writes to the tensors made here
            self.manager.warmup()
        self.manager.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.manager.stop(block=True, timeout=30, hard_stop=error is not None)
        self.manager.destroy()

    @property
    def backend(self) -> str:
        """What it runs with: "torch, sdpa, page_size=16, num_blocks=97, ..."."""
        found = self.manager.continuous_batching_config
        names = "num_blocks", "max_batch_tokens", "use_cuda_graph", "use_async_batching"
        settings = [f"{name}={getattr(found, name, None)}" for name in names]
        attention = self.model.config._attn_implementation
        return ", ".join(["torch", attention, f"page_size={self.block_size}", *settings])

    def generate(self, prompts: Tensor, new_tokens: int) -> list:
        """Serve the prompts (B, T) to their end; its outputs, in the order of the prompts."""
        manager = self.manager
        with getattr(manager, "pause", nullcontext)():  # older versions have none
            options = {"max_new_tokens": new_tokens, "record_timestamps": True}
            ids = [manager.add_request(prompt, **options) for prompt in prompts.tolist()]
        found, until = {}, time.monotonic() + WAIT_S
        while len(found) < len(ids):
            output = manager.get_result(timeout=1.0)
            if output is not None:
                if output.error is not None:
                    raise ValueError(f"continuous batching failed: {output.error}")
                found[output.request_id] = output
            elif not manager.is_running() or time.monotonic() > until:
                raise ValueError("continuous batching ended without a result: see its log")
        return [found[request_id] for request_id in ids]

    def time_steps(self, prompts: Tensor, steps: int) -> list[float]:
        """Milliseconds of each decode step, from token to token of the sequence that began last."""
        outputs = self.generate(prompts, 1 + steps)
        stamps = max((output.timestamps for output in outputs), key=lambda stamps: stamps[0])
        assert len(stamps) == 1 + steps, f"{len(stamps)} tokens, not {1 + steps}"
        return [(after - before) * 1e3 for before, after in pairwise(stamps)]


@torch.inference_mode()
def check_equal_tokens(continuous: Continuous, theirs, prompts: Tensor) -> None:
    """Raise ValueError unless the first two tokens for two prompts are those of `theirs`.

    A token of which the score is as good as the best one's is right too: fp32 to 1e-3, 16 bits to
    2% of the largest score, as in `peers.check_equal_work`.
    """
    theirs.begin()
    outputs = continuous.generate(prompts[:2], 2)
    chosen = torch.tensor([output.generated_tokens for output in outputs], device=prompts.device)
    ids = prompts[:2]
    for number in range(2):
        logits = theirs.logits(ids).double()
        ids = chosen[:, number : number + 1]
        error = (logits.max(-1).values - logits.gather(-1, ids)[:, 0]).max()
        in_16_bits = theirs.model.dtype.itemsize == 2
        bound = 0.02 * logits.abs().max() if in_16_bits else 1e-3
        if not error <= bound:  # NaN fails too
            what = f"continuous batching chose a token of which the score is {error:.1e} lower"
            raise ValueError(f"{what} than the best, {bound:.1e} is allowed")
    del theirs.cache
