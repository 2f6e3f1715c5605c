"""The one place where the parts are chosen and put together: `LLM(model, ...)`.

Every other file takes what it needs as an argument: the scheduler takes an allocator, the cache a
size, the engine a forward. So each of them can be read alone. This file makes the choices, with
vLLM's names, so that a script written for vLLM needs little more than another import:

    from llm import LLM, SamplingParams
    llm = LLM("assets/tiny-gpt2")
    outputs = llm.generate(["Once upon a time", "The wolf"], SamplingParams(max_tokens=40, seed=1))

    name ─> checkpoint ─> GPT ┐            ┌─> PrefixCache ─> Scheduler ───┐
            tokenizer         ├─> LLM ─────┼─> KVCache ───────────────────┼─> InferenceEngine
            EngineConfig      ┘            └─> forward(batch) -> logits ───┘

By default a CPU computes in float32 with Numba's kernels (`kernels/backends.py`), and the weights
of a wide model are packed (`kernels/packed_linear.py`). A GPU computes in bfloat16, or in float16
where it has no bfloat16, with Triton's kernels, and decode steps are recorded once and replayed
(`speedups/cuda_graphs.py`). A file that only some machines or options need is imported in the
function that needs it: `LLM()` on a CPU loads no file about GPUs.

vLLM's class of this name: docs.vllm.ai, "Offline inference".
Run: python llm.py
Try: BLOCK_SIZE = 1 in the demo: the pool holds the same number of tokens in 16 times as many
blocks, and the texts are the same. TIGHT_POOL_TOKENS = 16: a prompt and its 24 new tokens no longer
fit into the pool, so the request is refused.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from beam_search import BeamScheduler, BeamSearchParams, add_beam_search, best_first
from block_allocator import BlockAllocator
from checkpoints.hub import find_folder
from checkpoints.load import load_model, weights_kind
from checkpoints.tokenizer import (
    FileTokenizer,
    Unreadable,
    gpt2_tokenizer,
    load_tokenizer,
    read_eos_ids,
)
from engine import Draw, Forward, InferenceEngine, eager_forward
from kernels.backends import (
    BACKENDS,
    Kernels,
    can_record,
    resolve_backend,
    resolve_device,
    resolve_dtype,
)
from kernels.device_memory import free_memory_bytes, preallocate
from kv_cache import KVCache
from model import GPT
from outputs import RequestOutput
from policies import first_come_first_served
from prefix_cache import PrefixCache
from sampling import SamplingParams, draw_tokens
from scheduler import reserve_now

if TYPE_CHECKING:
    from speedups.cuda_graphs import Calls, GraphForward, Graphs
    from speedups.ranks import Ranks

__all__ = [
    *("LLM", "EngineConfig", "SamplingParams", "BeamSearchParams", "RequestOutput"),
    "SHIPPED_MODEL",
]

SHIPPED_MODEL = Path(__file__).parent / "assets" / "tiny-gpt2"

GPT2_VOCAB_SIZES = (50257, 50304)  # GPT-2's own, and nanoGPT's: padded to a multiple of 64


# ---- the options ---------------------------------------------------------------------------------
def option(default: Any, help: str) -> Any:
    """A field of EngineConfig: its default, and the help text of its flag in generate.py."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, in vLLM's names except for num_blocks, kv_cache_mb and max_seq_len.

    A new field needs nothing else to become a flag of generate.py.
    """

    block_size: int = option(16, "tokens in a block; a larger block leaves more of it unfilled")
    num_blocks: int | None = option(None, "the pool's size in blocks")
    kv_cache_mb: float | None = option(
        None, "the pool's size in MB; without any size it is measured"
    )
    weights: str = option("float", "linear layers: float (as loaded, in the model's type) or int8")
    kv_cache_dtype: str = option("auto", "type of K and V in the pool: auto (the model's) or int8")
    # Used only if neither of the two sizes above is given and the device is a GPU:
    gpu_memory_utilization: float = option(0.9, "share of a GPU's free memory for the pool")
    max_num_seqs: int = option(256, "sequences in one step at most")
    # A prompt of so many tokens keeps all decoding sequences waiting for one long step.
    max_num_batched_tokens: int | None = option(
        None, "tokens in one step at most; if not given, 2048, and 8192 on a large GPU"
    )
    max_seq_len: int | None = option(None, "tokens in one sequence; if not given, as the model")
    enable_prefix_caching: bool = option(True, "prompts that begin alike share blocks")
    cuda_graphs: bool = option(True, "on a GPU, record decode steps once and replay them")
    plan_ahead: bool = option(False, "launch the next step before the last one's tokens are read")
    adapt_threads: bool = option(True, "on a CPU, use fewer threads while others take its cores")
    fused: bool = option(False, "on a GPU, join a decode step's small operations")
    few_rows: int = option(0, "with fused, steps of up to this many sequences use our own products")
    tensor_parallel: bool = option(False, "cut the model over the processes that torchrun started")
    seed: int = option(0, "the seed of requests that bring none")

    def __post_init__(self):
        may_be_none = ("num_blocks", "max_seq_len", "max_num_batched_tokens")
        for name in ("block_size", "max_num_seqs", *may_be_none):
            value = getattr(self, name)
            is_left_open = value is None and name in may_be_none
            if not is_left_open and (type(value) is not int or not 1 <= value < 2**63):
                allowed = "it must be an integer of at least 1 and below 2**63"
                raise ValueError(f"{name} is {short_repr(value)}: {allowed}")
        for name in (
            *("enable_prefix_caching", "cuda_graphs", "plan_ahead", "fused"),
            *("adapt_threads", "tensor_parallel"),
        ):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if self.tensor_parallel and (self.plan_ahead or self.fused):
            raise ValueError(
                "tensor_parallel goes neither with plan_ahead nor with fused: leave it"
            )
        if type(self.few_rows) is not int or self.few_rows < 0:
            raise ValueError(f"few_rows is {self.few_rows!r}: it must be an integer of at least 0")
        if self.few_rows and not self.fused:
            raise ValueError(f"few_rows is {self.few_rows}: it needs fused=True")
        if self.weights not in ("float", "int8"):
            raise ValueError(f"weights is {short_repr(self.weights)}: choose float or int8")
        if self.weights == "int8" and (self.fused or self.tensor_parallel):
            raise ValueError("weights='int8' goes neither with fused nor with tensor_parallel")
        if self.kv_cache_dtype not in ("auto", "int8"):
            dtype = short_repr(self.kv_cache_dtype)
            raise ValueError(f"kv_cache_dtype is {dtype}: choose auto or int8")
        if self.fused and self.kv_cache_dtype == "int8":
            raise ValueError("fused has no kernel for a pool in int8: leave one of the two out")
        mb = self.kv_cache_mb
        if mb is not None and not (isinstance(mb, int | float) and 0 < mb <= 1e12):
            allowed = "it must be a number above 0 and at most 1e12"
            raise ValueError(f"kv_cache_mb is {short_repr(mb)}: {allowed}")
        share = self.gpu_memory_utilization
        if not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization is {share}: it must be in (0, 1]")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}: it must be an integer from 0 to 2**63 - 1")


def default_budget(device: torch.device) -> int:
    """The default of `max_num_batched_tokens`: 8,192 on a GPU of more than 40 GB, else 2,048.

    An H200 served 256 requests 1.5 times as fast with 8,192: the host needs as long to launch a
    step of few tokens as one of many. A smaller GPU has little room for so many tokens' results.
    """
    if device.type == "cpu":
        return 2048
    return 8192 if torch.cuda.get_device_properties(device).total_memory > 40e9 else 2048


# ---- the tokenizer and the pool's size -----------------------------------------------------------
def find_tokenizer(path: Path | None, vocab_size: int) -> FileTokenizer | None:
    """The tokenizer in the folder of the weights; else, for GPT-2's vocabulary, tiktoken's.

    Returns None if there is neither, and, with a warning, if the folder's tokenizer is of a kind
    that is not read here. Then prompts and outputs are token ids. Raises ValueError for files that
    are damaged, or that belong to a larger vocabulary than the model's.
    """
    if path is not None:
        folder = path if path.is_dir() else path.parent
        try:
            tokenizer = load_tokenizer(folder)
        except Unreadable as error:
            warnings.warn(f"{error}: prompts and outputs are token ids", stacklevel=2)
            return None
        if tokenizer is not None:
            # Only ordinary tokens are counted. The model may have no row for a token that was
            # added later, [PAD] for example: a prompt with that token is refused.
            if tokenizer.num_ordinary > vocab_size:
                sizes = f"{tokenizer.num_ordinary} tokens, and the model has {vocab_size} rows"
                raise ValueError(
                    f"{folder}: the tokenizer has {sizes}: they do not belong together"
                )
            return tokenizer
    return gpt2_tokenizer() if vocab_size in GPT2_VOCAB_SIZES else None


def find_eos_ids(path: Path | None, eos_token_id: int | None, tokenizer) -> list[int]:
    """The ids that end a text, those of all sources, as in vLLM.

    The sources are the model's config (`eos_token_id`), the files beside its weights, and the
    tokenizer.
    """
    ids = {eos_token_id, tokenizer and tokenizer.eos_token_id}
    if path is not None:
        ids |= read_eos_ids(path if path.is_dir() else path.parent)
    return sorted(ids - {None})


def choose_num_blocks(
    block_bytes: int,
    most_useful: int,
    num_blocks: int | None = None,
    kv_cache_mb: float | None = None,
    gpu_memory_utilization: float = 0.9,
    device: str | torch.device = "cpu",
) -> int:
    """The pool's size in blocks: as given, or from its bytes, or from the device's free memory.

    `most_useful` is the number of blocks that `max_num_seqs` sequences of `max_seq_len` tokens
    fill. A measured pool is never larger. 1 MB is 10**6 bytes. Raises ValueError if both sizes are
    given, if not even one block fits, or if the pool is larger than the free memory.
    """
    if num_blocks is not None and kv_cache_mb is not None:
        raise ValueError(
            f"num_blocks={num_blocks} and kv_cache_mb={kv_cache_mb} both size the pool: give one"
        )
    free_bytes = free_memory_bytes(device)
    if kv_cache_mb is not None:
        num_blocks = _blocks_in_mb(kv_cache_mb, block_bytes)
    elif num_blocks is None:
        # A GPU mostly serves this program alone; a CPU's memory serves others too, so less of it.
        on_gpu = torch.device(device).type == "cuda"
        budget_bytes = free_bytes * gpu_memory_utilization if on_gpu else min(2**30, free_bytes / 4)
        num_blocks = min(int(budget_bytes) // block_bytes, most_useful)
        if num_blocks < 1:
            sizes = f"{block_bytes / 1e6:.0f} MB, {budget_bytes / 1e6:.0f} MB may be used"
            raise ValueError(f"one block takes {sizes}: lower block_size")
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}: the pool needs at least 1 block")
    needed_bytes = (num_blocks + 1) * block_bytes  # the scratch block is one more
    if needed_bytes > free_bytes:
        sizes = f"the pool needs {needed_bytes / 1e6:.0f} MB, {free_bytes / 1e6:.0f} MB are free"
        raise ValueError(f"{sizes}: lower num_blocks or kv_cache_mb")
    return num_blocks


def _blocks_in_mb(kv_cache_mb: float, block_bytes: int) -> int:
    # 113 blocks of 589,824 bytes are 66.650112 MB, and in floating point 66.650112 * 1e6 is
    # 66650111.99999999. Without the rounding it would be one block less.
    num_blocks = round(kv_cache_mb * 1e6) // block_bytes
    if num_blocks < 1:
        mb = block_bytes / 1e6
        raise ValueError(f"kv_cache_mb={kv_cache_mb} holds no block: one takes {mb:.3f} MB")
    return num_blocks


class ProgressBar(tqdm):
    """A progress bar that Ctrl-C cannot lock for ever.

    tqdm takes two locks one after the other, in Python. A Ctrl-C between them would leave the first
    one taken, and the next bar of the process would wait for it without end, even a disabled one.
    """

    _lock = RLock()  # one lock, which is taken in one operation


# ---- the engine ----------------------------------------------------------------------------------
class LLM:
    """A model, its tokenizer, and an engine around them.

    `model` is a name on the hub (`gpt2`, `org/name@revision`), a folder in Hugging Face's GPT-2
    layout, a nanoGPT checkpoint (`out/ckpt.pt`), `random:gpt2` (-medium, -large, -xl), or a `GPT`.
    A `GPT` brings no tokenizer and keeps its dtype and its device.
    `threads` is the number of CPU threads of PyTorch, for the whole process; None leaves it as it
    is. (For a model as small as the shipped one, 1 is fastest.)
    `reserve` and `policy` are passed to the scheduler, `prefix_salt` to the prefix cache. The other
    keyword arguments are fields of `EngineConfig`. With `tensor_parallel` every process of the
    group calls this, and keeps its part of the model (of a `GPT` object too, which is cut in
    place): see speedups/tensor_parallel.py. Raises ValueError for a choice that does not exist or
    does not fit.
    """

    def __init__(
        self,
        model: str | Path | GPT = SHIPPED_MODEL,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        reserve: Callable = reserve_now,
        policy: Callable = first_come_first_served,
        prefix_salt: bytes | None = None,
        **config,
    ):
        # Far more threads than cores only wait for one another, and a process may start so many.
        most = max(64, os.cpu_count() or 1)
        if threads is not None and (type(threads) is not int or not 1 <= threads <= most):
            allowed = f"it must be an integer of at least 1, and at most {most} on this machine"
            raise ValueError(f"threads is {short_repr(threads)}: {allowed}")
        self.config = EngineConfig(**config)
        self.ranks = self._join_ranks(model, device) if self.config.tensor_parallel else None
        if isinstance(model, GPT):
            self._take_model(model, device, dtype)
        else:
            self._load_model(model, device, dtype)
        if self.ranks is not None:
            from speedups.tensor_parallel import connect  # for tensor_parallel=True only

            connect(self.model, self.ranks)
        weight = self.model.wte.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.backend = resolve_backend(backend, self.device, self.dtype)
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = self._build_engine(reserve, policy, prefix_salt)

    def _take_model(self, model: GPT, device: str, dtype: str) -> None:
        """Serve a GPT object as it is."""
        if model.training and model.config.dropout:
            raise ValueError("the GPT drops out at random while it trains: call model.eval()")
        if (device, dtype) != ("auto", "auto"):
            raise ValueError("a GPT object is served where and as it is: move or cast it first")
        if self.config.weights != "float":
            how = "call speedups.quantized_weights.quantize(model) first"
            raise ValueError(f"a GPT object is served as it is: {how}")
        self.model = model if self.ranks is None else self._cut(model)
        self.model_name = "a GPT object"
        self.weights = "given weights"
        self.tokenizer: FileTokenizer | None = None
        self.eos_token_ids = find_eos_ids(None, model.config.eos_token_id, None)

    def _load_model(self, name: str | Path, device: str, dtype: str) -> None:
        """Load weights and tokenizer, or fill a known shape with random weights."""
        self.model_name = str(name)
        self.weights = weights_kind(self.model_name)
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        # Random weights have no file; a name on the hub is fetched if it is not on this machine.
        path = None if self.weights == "random weights" else find_folder(name)
        if self.ranks is None:
            self.model = load_model(path or name, chosen_dtype, chosen_device)
        else:  # a whole model need not fit into a GPU
            whole = load_model(path or name, chosen_dtype, "cpu")
            self.model = self._cut(whole).to(chosen_device)
        if self.config.weights == "int8":
            from speedups.quantized_weights import quantize  # for weights="int8" only

            quantize(self.model)
        elif chosen_device.type == "cpu":
            from kernels.packed_linear import pack  # for a CPU only

            pack(self.model)
        shape = self.model.config
        self.tokenizer = find_tokenizer(path, shape.vocab_size)
        self.eos_token_ids = find_eos_ids(path, shape.eos_token_id, self.tokenizer)

    # ---- several processes ----
    def _join_ranks(self, model: str | Path | GPT, device: str) -> "Ranks":
        """This process's place among those that run the model together."""
        from speedups.ranks import join  # for tensor_parallel=True only

        if isinstance(model, GPT):
            return join(model.wte.weight.device.type)
        return join(resolve_device(device).type)

    def _cut(self, model: GPT) -> GPT:
        """This rank's part of a whole model."""
        from speedups.tensor_parallel import cut  # for tensor_parallel=True only

        assert self.ranks is not None
        return cut(model, self.ranks)

    def _agree(self, num_blocks: int) -> int:
        """The number of blocks that fits on every rank; ValueError if the ranks differ."""
        from speedups.tensor_parallel import agree  # for tensor_parallel=True only

        assert self.ranks is not None
        # `ln_f` is whole on each rank: a cheap sign of the same weights.
        weights = self.model.ln_f.weight.double().sum().item()
        facts = self.config, self.model.config, self.dtype, self.max_seq_len, weights
        return agree(self.ranks, num_blocks, facts)

    def _build_engine(
        self, reserve: Callable, policy: Callable, prefix_salt: bytes | None
    ) -> InferenceEngine:
        """Choose the pool's size, then build all parts around it."""
        config = self.config
        shape = self.model.config
        self.max_seq_len = config.max_seq_len or shape.max_seq_len
        if self.max_seq_len > shape.max_seq_len:
            most = shape.max_seq_len
            raise ValueError(f"max_seq_len is {self.max_seq_len}, the model has {most} positions")
        launcher = self._choose_launcher()
        num_blocks = self._choose_pool_size(launcher)
        if self.ranks is not None:
            num_blocks = self._agree(num_blocks)
        budget = config.max_num_batched_tokens or default_budget(self.device)
        # From now on the config says what was chosen: a size in blocks.
        self.config = replace(
            config, num_blocks=num_blocks, kv_cache_mb=None, max_num_batched_tokens=budget
        )

        allocator = BlockAllocator(num_blocks, config.block_size)
        if config.enable_prefix_caching:
            allocator = PrefixCache(num_blocks, config.block_size, prefix_salt)
        scheduler = BeamScheduler(
            allocator,
            config.max_num_seqs,
            budget,
            self.max_seq_len,
            reserve,
            policy,
        )
        cache = self._build_cache(num_blocks)
        eager = self._build_forward(cache)
        recorded = self._record_steps(cache, eager, launcher) if launcher else None
        engine_class, options = self._choose_engine(recorded)
        forward, draw = self._adapt_threads(recorded or eager, self._choose_draw())
        return engine_class(
            forward=forward,
            cache=cache,
            scheduler=scheduler,
            vocab_size=shape.vocab_size,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            seed=config.seed,
            draw=draw,
            **options,
        )

    # ---- which parts ----
    def _choose_launcher(self) -> "Calls | Graphs | None":
        """What records decode steps as CUDA graphs; None if they are not recorded."""
        if not (self.config.cuda_graphs and can_record(self.backend, self.device)):
            return None
        if self.ranks is not None:
            if self.ranks.rank == 0:
                warnings.warn("tensor_parallel: steps are not recorded as CUDA graphs")
            return None
        from speedups.cuda_graphs import choose_launcher  # for a GPU only

        return choose_launcher(self.device)

    def _draws_on_gpu(self) -> bool:
        """Whether a Triton kernel draws the tokens. It computes in 32 bits, so not for float64."""
        return can_record(self.backend, self.device) and self.dtype != torch.float64

    def _choose_draw(self) -> Draw:
        """The function that turns logits into tokens."""
        if not self._draws_on_gpu():
            return draw_tokens
        from kernels.triton_sampling import draw_on_host, draw_tokens_triton  # for a GPU only

        # An engine that plans ahead copies the tokens itself, while the next step runs.
        return draw_tokens_triton if self.config.plan_ahead else draw_on_host

    def _choose_engine(
        self, recorded: "GraphForward | None"
    ) -> tuple[type[InferenceEngine], dict[str, Any]]:
        """The engine's class, and what it takes beside the plain engine's arguments."""
        if self.ranks is not None:
            from speedups.tensor_parallel import RankedEngine  # for tensor_parallel=True only

            return RankedEngine, {"ranks": self.ranks}
        if not self.config.plan_ahead:
            return InferenceEngine, {}
        from speedups.plan_ahead import AheadEngine  # for plan_ahead=True only

        # A recorded step with the draw in it: the host launches it and reads nothing.
        if recorded is not None and recorded.sampler is not None:
            return AheadEngine, {"decode": recorded.decode}
        return AheadEngine, {}

    def _choose_pool_size(self, launcher: "Calls | Graphs | None") -> int:
        """The number of blocks in the pool, with room left for the recorded steps."""
        # A recording holds the address of the pool that it reads, so the real recordings are made
        # after the pool. They take memory of their own, which the pool must leave free. Therefore
        # one recording is made first, over a pool of one block, and kept while memory is measured.
        rehearsal = self._rehearse_steps(launcher) if launcher else None
        config = self.config
        num_blocks = choose_num_blocks(
            self._block_bytes(),
            # 256 sequences of 1,024 tokens, block_size 16 -> 256 * 64 blocks
            most_useful=config.max_num_seqs * -(-self.max_seq_len // config.block_size),
            num_blocks=config.num_blocks,
            kv_cache_mb=config.kv_cache_mb,
            gpu_memory_utilization=config.gpu_memory_utilization,
            device=self.device,
        )
        del rehearsal  # the real recordings will use its memory
        return num_blocks

    @property
    def _num_heads(self) -> int:
        """The heads that this process computes: all, or its share under tensor_parallel."""
        layer: Any = self.model.h[0]
        return layer.attn.n_head

    def _block_bytes(self) -> int:
        """Bytes of a block: its tokens' K and V in all layers, those of this process's heads."""
        shape = self.model.config
        block_size = self.config.block_size
        if self.config.kv_cache_dtype != "int8":
            bytes_per_head = shape.kv_bytes_per_token(self.dtype) // shape.n_head
            return self._num_heads * bytes_per_head * block_size
        from speedups.quantized_kv import head_bytes  # for int8 only

        return 2 * shape.n_layer * self._num_heads * head_bytes(block_size, shape.head_dim)

    def _build_cache(self, num_blocks: int) -> KVCache:
        """A pool of this many blocks."""
        shape = self.model.config
        sizes: dict[str, Any] = {
            "num_layers": shape.n_layer,
            "num_blocks": num_blocks,
            "block_size": self.config.block_size,
            "num_kv_heads": self._num_heads,
            "head_dim": shape.head_dim,
            "device": self.device,
            "allocate": preallocate,
        }
        if self.config.kv_cache_dtype != "int8":
            return KVCache(**sizes, dtype=self.dtype)
        from speedups.quantized_kv import QuantizedKVCache  # for int8 only

        return QuantizedKVCache(**sizes)

    def _load_kernels(self) -> Kernels:
        """The backend's two functions, for the numbers of the pool."""
        if self.config.kv_cache_dtype != "int8":
            return BACKENDS[self.backend].load()
        from speedups.quantized_kv import int8_kernels  # for int8 only

        return int8_kernels(self.backend, self.dtype)

    def _build_forward(self, cache: KVCache) -> Forward:
        """The model over this pool, with the backend's kernels."""
        kernels = self._load_kernels()
        eager = eager_forward(self.model, cache, kernels.paged_attention, kernels.write_kv)
        if not self.config.fused:
            return self._compile_step(cache) or eager
        if self.backend != "triton":
            raise ValueError(f"fused is for backend triton, it is {self.backend}: leave it out")
        from kernels.triton_fused import fused_forward  # for fused=True only

        # Prefill steps stay eager.
        return fused_forward(self.model, cache, otherwise=eager, few_rows=self.config.few_rows)

    def _compile_step(self, cache: KVCache) -> Forward | None:
        """On a CPU, a forward in one compiled call; None where the model has no panels."""
        if self.backend != "numba" or isinstance(self.model.lm_head, torch.nn.Linear):
            return None
        from kernels.step_cpu import can_compile_step, step_forward  # for wide models only

        return step_forward(self.model, cache) if can_compile_step(self.model, cache) else None

    def _adapt_threads(self, forward: Forward, draw: Draw) -> tuple[Forward, Draw]:
        """On a CPU, both on fewer threads while other processes take its cores."""
        # Ranks wait for one another, so their times say nothing about other processes.
        if not self.config.adapt_threads or self.backend != "numba" or self.ranks is not None:
            return forward, draw
        if isinstance(self.model.lm_head, torch.nn.Linear):  # a library's product
            return forward, draw
        from speedups.adapt_threads import adapt_threads, has_own_products  # for wide models only

        is_wide = has_own_products(self.model)
        return adapt_threads(forward, draw) if is_wide else (forward, draw)

    # ---- recorded steps: on a GPU only ----
    def _rehearse_steps(self, launcher: "Calls | Graphs") -> object:
        """Hold as much memory as `_record_steps` will take, for as long as the result is kept."""
        from speedups.cuda_graphs import recorded_sizes, rehearse  # for a GPU only

        cache = self._build_cache(1)
        sizes = recorded_sizes(self.config.max_num_seqs)
        return rehearse(cache, self._build_forward(cache), sizes, self.max_seq_len, launcher)

    def _record_steps(
        self, cache: KVCache, eager: Forward, launcher: "Calls | Graphs"
    ) -> "GraphForward":
        """A forward that replays decode steps; other steps run eagerly."""
        from speedups.cuda_graphs import GraphForward, recorded_sizes  # for a GPU only

        sampler = None
        if self.config.plan_ahead and self._draws_on_gpu():
            from kernels.triton_sampling import sample_triton

            sampler = sample_triton
        return GraphForward(
            cache,
            eager,
            recorded_sizes(self.config.max_num_seqs),
            self.max_seq_len,
            launcher,
            progress=partial(ProgressBar, desc="recording decode steps", unit="size", disable=None),
            sampler=sampler,
        )

    # ---- vLLM's interface ----
    def generate(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        cache_prefix: bool = True,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts together; the outputs are in the order of the prompts.

        A prompt is text or token ids (a list, a tuple, an array, or a dict with "prompt" or
        "prompt_token_ids"); `sampling_params` is one for all prompts or one for each;
        `cache_prefix` and `cache_salt` are those of `InferenceEngine.add_request`. It calls `step`:
        use it in one thread, and not in a watcher or a strategy. Raises ValueError if any prompt is
        refused (then no prompt is served), or if the engine still has requests of an earlier
        caller.
        """
        pairs = _pair(prompts, sampling_params)
        add = partial(self.engine.add_request, cache_prefix=cache_prefix, cache_salt=cache_salt)
        return self._serve([partial(add, *pair) for pair in pairs], use_tqdm)

    def beam_search(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        params: BeamSearchParams | None = None,
        use_tqdm: bool = False,
        cache_prefix: bool = True,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Search the best texts for each prompt; the outputs are in the order of the prompts.

        An output has its texts best first, each with its score in `cumulative_logprob` (see
        `BeamSearchParams`). The other arguments are those of `generate`. It raises the same errors,
        and must be called in the same thread.
        """
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params is a {type(params).__name__}: give BeamSearchParams")
        add = partial(
            add_beam_search, params=params, cache_prefix=cache_prefix, cache_salt=cache_salt
        )
        adds = [partial(add, self.engine, prompt) for prompt, _ in _pair(prompts)]
        return [best_first(output, params) for output in self._serve(adds, use_tqdm)]

    def _serve(self, adds: Sequence[Callable[[], str]], use_tqdm: bool) -> list[RequestOutput]:
        """Call functions that add a request each, and step until all have ended."""
        if self.engine.has_unfinished():
            raise ValueError(
                "the engine still has requests: finish them with llm.engine.step() first"
            )
        request_ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            for add in adds:
                request_ids.append(add())
            with ProgressBar(total=len(adds), disable=not use_tqdm, unit="request") as bar:
                while self.engine.has_unfinished():
                    finished = self.engine.step().finished
                    outputs |= {output.request_id: output for output in finished}
                    bar.update(len(finished))
        except BaseException:  # a refused prompt or Ctrl-C: leave no request in the engine
            while True:
                try:
                    for request_id in request_ids:
                        self.engine.abort(request_id)
                    while self.engine.has_unfinished():  # this step computes nothing, frees blocks
                        self.engine.step()
                    break
                except KeyboardInterrupt:  # a second Ctrl-C: try again; the first is raised below
                    continue
            raise
        return [outputs[request_id] for request_id in request_ids]


def _pair(prompts, sampling_params=None) -> list[tuple[str | list[int], SamplingParams | None]]:
    """Each prompt with its parameters; the arguments are those of `LLM.generate`.

    Example: `_pair([5, 6], None)` is one prompt of two token ids: `[([5, 6], None)]`.
    """
    if hasattr(prompts, "tolist"):  # an array of NumPy or PyTorch; rows are prompts
        prompts = prompts.tolist()
    is_known = isinstance(prompts, str | list | tuple | dict)
    if not is_known or isinstance(sampling_params, dict):
        kinds = f"{type(prompts).__name__} and {type(sampling_params).__name__}"
        raise ValueError(f"{kinds} given: prompts are text or lists, params SamplingParams")
    # A list of integers is one prompt of token ids, a list of anything else is a list of prompts.
    is_one_prompt = isinstance(prompts, str | dict) or (prompts and all(map(_is_number, prompts)))
    if is_one_prompt:
        prompts = [prompts]
    if not hasattr(sampling_params, "__len__"):  # one for all, or None
        sampling_params = [sampling_params] * len(prompts)
    if len(sampling_params) != len(prompts):
        counts = f"{len(prompts)} prompts but {len(sampling_params)} sampling params"
        raise ValueError(f"{counts}: give one for all, or one each")
    return [(_plain(p), params) for p, params in zip(prompts, sampling_params, strict=True)]


def _is_number(value) -> bool:
    # numbers of NumPy and PyTorch are arrays without a dimension
    return type(value) is int or (hasattr(value, "item") and not value.shape)


def _plain(prompt) -> str | list[int]:
    """A prompt in one of vLLM's other forms as text or a list of ids: a dict, a tuple, an array."""
    if isinstance(prompt, dict):
        given = [prompt.get(key) for key in ("prompt_token_ids", "prompt")]
        if set(prompt) - {"prompt_token_ids", "prompt"} or given == [None, None]:
            keys = short_repr(list(prompt))
            raise ValueError(f"a prompt has the keys {keys}: give 'prompt' or 'prompt_token_ids'")
        prompt = given[1] if given[0] is None else given[0]
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple):
        return [
            value.item() if _is_number(value) and type(value) is not int else value
            for value in prompt
        ]
    return prompt


# --------------------------------------------------------------------------------------------------
BLOCK_SIZE = 16
POOL_TOKENS = 1024
TIGHT_POOL_TOKENS = 64


def demo():
    """The shipped model continues three openings, together and one by one: the same texts."""
    prompts = ["Once upon a time there was a", "The wolf said to the", '"Dear child," said']
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=24)
    llm = LLM(
        block_size=BLOCK_SIZE,
        num_blocks=POOL_TOKENS // BLOCK_SIZE,
        max_num_batched_tokens=64,
        threads=1,
    )
    name = llm.model_name.split("/")[-1]
    allocator = llm.engine.scheduler.allocator
    print(f"{name}, {llm.weights}, {llm.model.num_parameters():,} parameters")
    print(f"backend {llm.backend}, {str(llm.dtype)[6:]} on the {llm.device.type}")
    print(f"a pool of {allocator.num_blocks} blocks of {allocator.block_size} tokens\n")
    together = llm.generate(prompts, params)
    for output in together:
        print(f"[{output.prompt}]{output.outputs[0].text!r}")

    tight = LLM(
        block_size=BLOCK_SIZE,
        num_blocks=TIGHT_POOL_TOKENS // BLOCK_SIZE,
        max_num_batched_tokens=8,
    )
    alone = [tight.generate(prompt, params)[0] for prompt in prompts]
    num_tokens = sum(len(output.outputs[0].token_ids) for output in alone)
    print(f"\none by one, in a pool of {TIGHT_POOL_TOKENS} tokens: {num_tokens} tokens written")
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
    assert allocator.num_free == allocator.num_blocks
    print("ok: with its seed a prompt has the same text in any batch; every block is free again")


if __name__ == "__main__":
    demo()
