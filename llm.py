"""The one place where the parts are chosen and put together: `LLM(model, ...)`.

Every other file takes what it needs as an argument: the scheduler an allocator, the cache a size,
the engine a forward. That keeps each of them readable alone, and it leaves one question: who
decides? This file does. It has vLLM's face, so that what is learned here carries over, and so that
a script written for vLLM needs little more than another import:

    from llm import LLM, SamplingParams
    llm = LLM("assets/tiny-gpt2")
    outputs = llm.generate(["Once upon a time", "The wolf"], SamplingParams(max_tokens=40, seed=1))

    name ─> checkpoint ─> GPT ┐            ┌─> BlockAllocator ─> Scheduler ┐
            tokenizer         ├─> LLM ─────┼─> KVCache ───────────────────┼─> InferenceEngine
            EngineConfig      ┘            └─> forward(batch) -> logits ───┘

What is chosen by default: float32, packed weights where that pays and the Numba kernels on a CPU;
on a GPU the Triton kernels, decode steps that are recorded once and replayed, and bfloat16 where it
has it, else float16, whatever the file holds. What a production engine does beyond this: several
GPUs, and processes around them.

vLLM's class of this name: docs.vllm.ai, "Offline inference".
Run: python llm.py
Try: block_size=1 or num_blocks=12 in the demo: the texts stay the same, the blocks do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from block_allocator import BlockAllocator
from checkpoints.hub import find_folder
from checkpoints.load import load_model, weights_kind
from checkpoints.tokenizer import BPETokenizer, gpt2_tokenizer, load_tokenizer
from engine import Forward, InferenceEngine, eager_forward
from kernels.backends import BACKENDS, can_record, resolve_backend, resolve_device, resolve_dtype
from kernels.device_memory import free_memory_bytes, preallocate
from kernels.packed_linear import pack
from kernels.triton_fused import fused_forward
from kernels.triton_sampling import draw_tokens_triton, sample_triton
from kv_cache import KVCache
from model import GPT
from outputs import RequestOutput
from policies import first_come_first_served
from sampling import SamplingParams, draw_tokens
from scheduler import Scheduler, reserve_now
from speedups.cuda_graphs import GraphForward, recorded_sizes, rehearse
from speedups.plan_ahead import AheadEngine

__all__ = ["LLM", "EngineConfig", "SamplingParams", "RequestOutput", "SHIPPED_MODEL"]

SHIPPED_MODEL = Path(__file__).parent / "assets" / "tiny-gpt2"

GPT2_VOCAB_SIZES = (50257, 50304)  # as it is, and padded to a multiple of 64 by nanoGPT


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, named as in vLLM but for the pool's size and max_seq_len."""

    block_size: int = 16  # tokens; larger wastes more of each sequence's last block
    num_blocks: int | None = None  # the pool's size in blocks, or
    kv_cache_mb: float | None = None  # in 10**6 bytes, or neither: what the device has free
    gpu_memory_utilization: float = 0.9  # of the free memory of a GPU, where the pool is measured
    max_num_seqs: int = 256  # sequences in one step
    max_num_batched_tokens: int = 2048  # in one step: so long a prompt keeps decoders waiting
    max_seq_len: int | None = None  # tokens in one sequence; None: as many as the model can see
    cuda_graphs: bool = True  # record decode steps and replay them; without a GPU it means nothing
    plan_ahead: bool = False  # launch a decode step before the tokens of the last one were read
    fused: bool = False  # join a decode step's small operations, with Triton's kernels
    seed: int = 0  # of requests that bring none

    def __post_init__(self):
        may_be_none = ("num_blocks", "max_seq_len")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", *may_be_none):
            value = getattr(self, name)
            left_open = value is None and name in may_be_none
            if not left_open and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: it must be an integer of at least 1")
        mb, share = self.kv_cache_mb, self.gpu_memory_utilization
        if mb is not None and not (isinstance(mb, int | float) and 0 < mb < math.inf):
            raise ValueError(f"kv_cache_mb is {mb!r}: it must be a number above 0")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}: it must be an integer from 0 to 2**63 - 1")
        if not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization is {share}: it must be in (0, 1]")
        for name in ("cuda_graphs", "plan_ahead", "fused"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")


def find_tokenizer(path: Path | None, vocab_size: int) -> BPETokenizer | None:
    """The tokenizer that lies beside the weights; for a vocabulary like GPT-2's, tiktoken's own.

    None where there is neither: such a model is served with token ids. Raises ValueError for files
    that are damaged, or that belong to a larger vocabulary.
    """
    if path is not None:
        folder = path if path.is_dir() else path.parent
        if tokenizer := load_tokenizer(folder):
            # A token that was added, [PAD] say, may have no row: a prompt that has it is refused.
            if tokenizer.num_ordinary > vocab_size:
                sizes = f"{tokenizer.num_ordinary} tokens, and the model has {vocab_size} rows"
                raise ValueError(
                    f"{folder}: the tokenizer has {sizes}: they do not belong together"
                )
            return tokenizer
    return gpt2_tokenizer() if vocab_size in GPT2_VOCAB_SIZES else None


def choose_num_blocks(
    block_bytes: int,
    most_useful: int,
    num_blocks: int | None = None,
    kv_cache_mb: float | None = None,
    gpu_memory_utilization: float = 0.9,
    device: str | torch.device = "cpu",
) -> int:
    """The pool's size in blocks: as given, or from its bytes, or from what the device has free.

    `most_useful` is what `max_num_seqs` sequences of `max_seq_len` tokens could fill: a
    measured pool never takes more. 1 MB is 10**6 bytes. Raises ValueError where not even one
    block fits.
    """
    if num_blocks is not None and kv_cache_mb is not None:
        raise ValueError(
            f"num_blocks={num_blocks} and kv_cache_mb={kv_cache_mb} both size the pool: give one"
        )
    if num_blocks is None and kv_cache_mb is not None:
        num_blocks = round(kv_cache_mb * 1e6) // block_bytes
        if num_blocks < 1:
            mb = block_bytes / 1e6
            raise ValueError(f"kv_cache_mb={kv_cache_mb} holds no block: one takes {mb:.3f} MB")
    free = free_memory_bytes(device)
    if num_blocks is None:
        on_gpu = torch.device(device).type == "cuda"
        budget = free * gpu_memory_utilization if on_gpu else min(2**30, free / 4)
        num_blocks = min(int(budget) // block_bytes, most_useful)
        if num_blocks < 1:
            sizes = f"one block takes {block_bytes / 1e6:.0f} MB, {budget / 1e6:.0f} MB may be used"
            raise ValueError(f"{sizes}: lower block_size")
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}: the pool needs at least 1 block")
    needed = (num_blocks + 1) * block_bytes
    if needed > free:
        sizes = f"the pool needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise ValueError(f"{sizes}: lower num_blocks or kv_cache_mb")
    return num_blocks


class LLM:
    """A model, its tokenizer, and an engine around them.

    `model` is a name on the hub (`gpt2`, `org/name@revision`), a folder in Hugging Face's GPT-2
    layout, a nanoGPT checkpoint (`out/ckpt.pt`), `random:gpt2` (-medium, -large, -xl), or a `GPT`,
    which brings no tokenizer and is served in its own dtype and on its own device.
    `threads` is what PyTorch may use on a CPU, in the whole process; None leaves it alone (for
    a model as small as the shipped one, 1 is fastest). The keyword arguments after `policy` are
    `EngineConfig`'s fields.
    """

    def __init__(
        self,
        model: str | Path | GPT = SHIPPED_MODEL,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        reserve=reserve_now,
        policy=first_come_first_served,
        **config,
    ):
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"threads is {threads!r}: it must be an integer of at least 1")
        self.config = EngineConfig(**config)
        if isinstance(model, GPT):
            self.model, self.model_name, self.weights = model, "a GPT object", "given weights"
            self.tokenizer = None
            if model.training and model.config.dropout:
                raise ValueError("the GPT drops out at random while it trains: call model.eval()")
            if (device, dtype) != ("auto", "auto"):
                raise ValueError("a GPT object is served where and as it is: move or cast it first")
        else:
            self.model_name, self.weights = str(model), weights_kind(str(model))
            where = resolve_device(device)
            path = None if self.weights == "random weights" else find_folder(model)
            self.model = load_model(path or model, resolve_dtype(dtype, where), where)
            pack(self.model, self.config.max_num_seqs)
            self.tokenizer = find_tokenizer(path, self.model.config.vocab_size)
        weight = self.model.wte.weight
        self.backend = resolve_backend(backend, weight.device, weight.dtype)
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = self._build_engine(reserve, policy)

    def _build_engine(self, reserve, policy) -> InferenceEngine:
        shape, config = self.model.config, self.config
        weight = self.model.wte.weight
        self.max_seq_len = config.max_seq_len or shape.max_seq_len
        if self.max_seq_len > shape.max_seq_len:
            most = shape.max_seq_len
            raise ValueError(f"max_seq_len is {self.max_seq_len}, the model has {most} positions")
        # The kernel that draws has no use for 64 bits: it is for speed.
        can_draw = can_record(self.backend, weight.device) and weight.dtype != torch.float64
        ahead = config.plan_ahead and can_draw
        records = config.cuda_graphs and can_record(self.backend, weight.device)
        sizes = recorded_sizes(config.max_num_seqs) if records else []
        num_blocks = self._measure_pool(sizes)
        self.config = replace(config, num_blocks=num_blocks, kv_cache_mb=None)
        cache, forward = self._build_forward(num_blocks)
        if records:
            bar = partial(tqdm, desc="recording decode steps", unit="size", disable=None)
            options = {"progress": bar, "sampler": sample_triton if ahead else None}
            forward = GraphForward(cache, forward, sizes, self.max_seq_len, **options)
        scheduler = Scheduler(
            BlockAllocator(num_blocks, config.block_size),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.max_seq_len,
            reserve,
            policy,
        )
        parts = forward, cache, scheduler, shape.vocab_size, self.tokenizer, shape.eos_token_id
        draw = draw_tokens_triton if can_draw else draw_tokens
        if config.plan_ahead:
            decode = forward.decode if ahead and records else None
            return AheadEngine(*parts, config.seed, draw=draw, decode=decode)
        return InferenceEngine(*parts, config.seed, draw)

    def _measure_pool(self, sizes: list[int]) -> int:
        """How many blocks the pool gets, where steps of these sizes will be recorded."""
        shape, config, weight = self.model.config, self.config, self.model.wte.weight
        # The pool's place is part of a recording, and what a recording takes is no longer free for
        # the pool: so record over a pool of one block, and hold that while the pool is measured.
        held = rehearse(*self._build_forward(1), sizes, self.max_seq_len) if sizes else None
        block_bytes = shape.kv_bytes_per_token(weight.dtype) * config.block_size
        num_blocks = choose_num_blocks(
            block_bytes,
            most_useful=config.max_num_seqs * -(-self.max_seq_len // config.block_size),
            num_blocks=config.num_blocks,
            kv_cache_mb=config.kv_cache_mb,
            gpu_memory_utilization=config.gpu_memory_utilization,
            device=weight.device,
        )
        del held
        return num_blocks

    def _build_forward(self, num_blocks: int) -> tuple[KVCache, Forward]:
        """A pool of so many blocks, and the forward over it."""
        shape, weight, kernels = self.model.config, self.model.wte.weight, BACKENDS[self.backend]
        cache = KVCache(
            num_layers=shape.n_layer,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            num_kv_heads=shape.n_head,
            head_dim=shape.head_dim,
            dtype=weight.dtype,
            device=weight.device,
            allocate=preallocate,
        )
        forward = eager_forward(self.model, cache, kernels.paged_attention, kernels.write_kv)
        if self.config.fused:
            if self.backend != "triton":
                raise ValueError(f"fused is for backend triton, it is {self.backend}: leave it out")
            forward = fused_forward(self.model, cache, otherwise=forward)
        return cache, forward

    def generate(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete all prompts together; the outputs come in the order of the prompts.

        A prompt is text or a list of token ids; `sampling_params` is one for all or one
        each. Raises ValueError if any prompt cannot be served; then none of them is.
        """
        if self.engine.has_unfinished():
            raise ValueError(
                "the engine still has requests: finish them with llm.engine.step() first"
            )
        if not isinstance(prompts, str | list | tuple) or isinstance(sampling_params, dict):
            kinds = f"{type(prompts).__name__} and {type(sampling_params).__name__}"
            raise ValueError(f"{kinds} given: prompts are text or lists, params SamplingParams")
        if isinstance(prompts, str) or (prompts and all(type(p) is int for p in prompts)):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            counts = f"{len(prompts)} prompts but {len(sampling_params)} sampling params"
            raise ValueError(f"{counts}: give one for all, or one each")
        request_ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(prompts, sampling_params, strict=True):
                request_ids.append(self.engine.add_request(prompt, params))
            with tqdm(total=len(prompts), disable=not use_tqdm, unit="request") as bar:
                while self.engine.has_unfinished():
                    ended = [o for o in self.engine.step().outputs if o.finished]
                    outputs |= {output.request_id: output for output in ended}
                    bar.update(len(ended))
        except BaseException:  # a refused prompt or Ctrl-C: leave no half-finished request behind
            for request_id in request_ids:
                self.engine.abort(request_id)
            raise
        return [outputs[request_id] for request_id in request_ids]


# --------------------------------------------------------------------------------------------------
def demo():
    """The shipped model writes three beginnings on, together and alone: the same texts."""
    prompts = ["Once upon a time there was a", "The wolf said to the", '"Dear child," said']
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=24)
    llm = LLM(num_blocks=64, max_num_batched_tokens=64, threads=1)
    together = llm.generate(prompts, params)
    allocator = llm.engine.scheduler.allocator
    print(
        f"{llm.model_name.split('/')[-1]}, {llm.weights}, {llm.model.num_parameters():,} parameters"
    )
    print(f"a pool of {allocator.num_blocks} blocks of {allocator.block_size} tokens\n")
    for output in together:
        print(f"[{output.prompt}]{output.outputs[0].text!r}")
    tight = LLM(num_blocks=4, max_num_batched_tokens=8)
    alone = [tight.generate(prompt, params)[0] for prompt in prompts]
    print(
        f"\nalone, in a pool of 4 blocks: {sum(len(o.outputs[0].token_ids) for o in alone)} tokens"
    )
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
    assert allocator.num_free == allocator.num_blocks
    print("ok: a seed means the same text in any batch, and every block is free again")


if __name__ == "__main__":
    demo()
