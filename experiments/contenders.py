"""Who plans the memory: paged, the paper's three reservations, static batches; one engine for all.

Each contender is an allocator, a reservation and a way to admit, under the same scheduler, in a
pool of the same bytes, with the same kernel; what differs is where a sequence's K and V lie and
how much is kept free for it. They run in the real engine, or in the simulated one, where a step
takes the time that a cost model says:

    a + b x tokens + c x KV tokens      --cost a b c, or fitted to a recording by --cost-from

By default about what the 124M GPT-2 should take on an H200 in 16 bits, worked out, not measured:
1.5 ms for some 140 launches by a host in Python, 0.25 GFLOP a token at 500 TFLOP/s, 36,864 bytes of
K and V a token at 4.3 TB/s.

This file measures nothing itself; `concurrency.py` and `trace.py` do.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from block_allocator import BlockAllocator
from checkpoints.load import load_model, weights_kind
from engine import InferenceEngine, eager_forward
from experiments.reservations import (
    BuddyAllocator,
    power_of_two,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
from experiments.results import device_name
from experiments.simulate import (
    Arrival,
    CostModel,
    Run,
    SimulatedEngine,
    admit_all,
    fit,
    pool_state,
    serve,
    static_batches,
)
from kernels.backends import BACKENDS, DTYPES, resolve_backend, resolve_device, resolve_dtype
from kernels.device_memory import preallocate
from kernels.packed_linear import pack
from kv_cache import KVCache
from llm import SHIPPED_MODEL
from model import GPT
from sampling import SamplingParams
from scheduler import Scheduler, reserve_now
from sequence import Plan
from watch.recorder import read_recording

H200 = CostModel(1.5, 0.0005, 8.6e-6)
GPT2_KV_BYTES = 36_864  # a token, in 16 bits: 12 layers x 2 x 768 x 2 bytes


# ---- the contenders ------------------------------------------------------------------------------
class Contender(NamedTuple):
    """A way to plan the memory."""

    allocator: type[BlockAllocator]
    reserve: Callable[[int], Callable]  # max_seq_len -> what a sequence reserves, in tokens
    region: Callable[[int], int] = int  # blocks asked for -> blocks taken
    is_static: bool = False


def reserve_power_of_two_in_all(max_seq_len: int) -> Callable[..., int]:
    """Prompt and output together, rounded up to a power of two: 20 + 5 tokens -> room for 32."""
    return lambda seq: min(power_of_two(seq.num_prompt_tokens + seq.max_tokens), max_seq_len)


# Buddies are the paper's contiguous memory. "Perfect fit" reserves as much, but in blocks that may
# lie anywhere: the most that a reservation could do if nothing were ever lost between its slabs.
CONTENDERS = {
    "paged": Contender(BlockAllocator, lambda max_seq_len: reserve_now),
    "oracle, perfect fit": Contender(BlockAllocator, reserve_oracle),
    "power of two, perfect fit": Contender(BlockAllocator, reserve_power_of_two_in_all),
    "maximum, perfect fit": Contender(BlockAllocator, reserve_maximum),
    "oracle, buddies": Contender(BuddyAllocator, reserve_oracle, power_of_two),
    "power of two, buddies": Contender(BuddyAllocator, reserve_power_of_two, power_of_two),
    "maximum, buddies": Contender(BuddyAllocator, reserve_maximum, power_of_two),
    "static batches": Contender(BuddyAllocator, reserve_maximum, power_of_two, is_static=True),
}


# ---- what serves them ----------------------------------------------------------------------------
def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The pool, and what stands behind it: a model, or the time that one would take."""
    add = parser.add_argument
    add("--simulate", action="store_true", help="no model, only its time: hours in seconds")
    add("--cost", type=float, nargs=3, metavar="MS", help="of a step, a token, a KV token")
    add("--cost-from", metavar="FILE", help="fit the cost to a recording (generate.py --record)")
    add("--blocks", type=int, help="pool size; default 4096, the real engine 8 longest sequences")
    add("--block-size", type=int, default=16, help="tokens in a block")
    add("--budget", type=int, default=2048, help="tokens in one step, at most")
    add("--model", default=str(SHIPPED_MODEL), help="the real engine's: a folder, or random:gpt2")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the real engine's kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")


def cost_model(args: argparse.Namespace) -> tuple[CostModel, str]:
    """What the flags say that a step takes, and a sentence about where that comes from.

    Of a recording the first step is left out, in which kernels may be compiled. Raises ValueError
    for a negative cost, or a recording of too few steps.
    """
    if args.cost_from:
        steps = [
            (
                sum(s["new_tokens"] for s in step["sequences"]),
                sum(s["num_computed_tokens"] for s in step["sequences"] if s["new_tokens"]),
                step["milliseconds"],
            )
            for step in read_recording(args.cost_from)[1][1:]
        ]
        cost, residual_ms = fit(steps)
        origin = f"fitted to {len(steps)} steps of {args.cost_from}, off by {residual_ms:.3g} ms"
    else:
        cost, origin = CostModel(*(args.cost or H200)), "given" if args.cost else "H200, worked out"
    if min(cost) < 0 or max(cost) == 0:
        raise ValueError(f"--cost {' '.join(map(str, cost))}: none below 0, one above it")
    return cost, f"a step takes {cost[0]:.3g} ms + {cost[1]:.3g} a token + {cost[2]:.3g} a KV " + (
        f"token: {origin}"
    )


class RealEngine:
    """A model's engine with the interface of `SimulatedEngine`, on the clock on the wall.

    It has a new pool, and random prompts; `look` is called in each step, between plan and update.
    """

    def __init__(self, model: GPT, backend: str, scheduler: Scheduler, look: Callable, seed: int):
        shape, weight, allocator = model.config, model.wte.weight, scheduler.allocator
        sizes = shape.n_layer, allocator.num_blocks, allocator.block_size
        cache = KVCache(
            *sizes, shape.n_head, shape.head_dim, weight.dtype, weight.device, preallocate
        )
        kernels = BACKENDS[backend]
        forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
        self._seen: Any = None

        def forward_and_look(batch) -> torch.Tensor:
            self._seen = look(scheduler)
            return forward(batch)

        self.engine = InferenceEngine(forward_and_look, cache, scheduler, shape.vocab_size)
        self._draw, self._started = random.Random(seed), time.perf_counter()

    @property
    def now_s(self) -> float:
        """Seconds since this engine was made."""
        return time.perf_counter() - self._started

    def wait_until(self, second: float) -> None:
        """Sleep until then."""
        while (left := second - self.now_s) > 0:
            time.sleep(left)

    def add(self, prompt_tokens: int, max_tokens: int) -> str:
        """Queue a prompt of random tokens, for exactly so many more; returns its id."""
        prompt = [self._draw.randrange(self.engine.vocab_size) for _ in range(prompt_tokens)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return self.engine.add_request(prompt, params)

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has anything to do."""
        return self.engine.has_unfinished()

    def step(self) -> tuple[Plan, float, Any]:
        """Run one step: its plan, milliseconds, and what `look` saw."""
        output = self.engine.step()
        return output.plan, output.milliseconds, self._seen


class Machine:
    """What all contenders run on: one model or one cost model, and pools of one size."""

    def __init__(self, args: argparse.Namespace, max_seq_len: int):
        self.args, self.max_seq_len = args, max_seq_len
        slab = power_of_two(-(-max_seq_len // args.block_size))  # blocks of the longest's region
        self.num_blocks = args.blocks or (4096 if args.simulate else 8 * slab)
        self.batch_size = self.num_blocks // slab  # of a static batch: every slab is taken
        if self.batch_size < 1:
            raise ValueError(f"--blocks {self.num_blocks}: one slab alone needs {slab}, raise it")
        if args.simulate:
            self.cost, self.clock = cost_model(args)
            token_bytes = GPT2_KV_BYTES
        else:
            self._load(args)
            self.clock = f"the engine on {device_name(self.device)}"
            token_bytes = self.model.config.kv_bytes_per_token(self.model.wte.weight.dtype)
        self.pool_bytes = token_bytes * args.block_size * self.num_blocks

    def _load(self, args: argparse.Namespace) -> None:
        """The real model."""
        self.device = resolve_device(args.device)
        threads = args.threads or (1 if args.model == str(SHIPPED_MODEL) else None)
        if threads:
            torch.set_num_threads(threads)
        model = load_model(args.model, resolve_dtype(args.dtype, self.device), self.device)
        self.model = pack(model, args.budget)
        if self.max_seq_len > (limit := self.model.config.max_seq_len):
            found = f"sequences of {self.max_seq_len} tokens, the model has {limit} positions"
            raise ValueError(f"{found}: raise --shrink or lower --max-seq-len")
        self.backend = resolve_backend(args.backend, self.device, self.model.wte.weight.dtype)

    def serve(self, name: str, requests: list[Arrival], look: Callable = pool_state) -> Run:
        """All requests, planned by the contender of this name, in a pool of its own.

        Asserts what makes runs comparable: every request got all its tokens, no block was lost.
        """
        contender, args = CONTENDERS[name], self.args
        allocator = contender.allocator(self.num_blocks, args.block_size)
        # As many sequences as there are: what limits them is memory alone.
        limits = len(requests), args.budget, self.max_seq_len
        scheduler = Scheduler(allocator, *limits, contender.reserve(self.max_seq_len))
        if args.simulate:
            engine = SimulatedEngine(scheduler, self.cost, look)
        else:
            engine = RealEngine(self.model, self.backend, scheduler, look, args.seed)
        static = static_batches(self.batch_size)
        run = serve(requests, engine, static if contender.is_static else admit_all)
        assert all(len(one.token_s) == one.request.output_tokens for one in run.served)
        allocator.check_integrity([])
        return run

    def in_turn(
        self,
        names: list[str],
        requests: list[Arrival],
        figures_of: Callable[[Run], dict],
        look_of: Callable[[str], Callable] = lambda name: pool_state,
    ) -> Iterator[tuple[str, list[dict]]]:
        """Each contender with the figures of its runs: A B A B, after a few requests to warm up.

        A simulation says the same each time: one run is all, and its figures come at once.
        """
        if self.args.simulate:
            for name in names:
                yield name, [figures_of(self.serve(name, requests, look_of(name)))]
            return
        self.serve(names[0], [request._replace(arrival_s=0.0) for request in requests[:4]])
        rounds: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(self.args.repeats):
            for name in names:
                rounds[name].append(figures_of(self.serve(name, requests, look_of(name))))
        yield from rounds.items()

    def columns(self) -> dict:
        """What all rows of a run say of it."""
        args = self.args
        if args.simulate:
            clock = {"device": "a simulated clock", "model": "gpt2's KV bytes"}
            return {"backend": "none", "dtype": "none", "threads": 1, "seed": args.seed} | clock
        is_shipped = args.model == str(SHIPPED_MODEL)
        return {
            "backend": self.backend,
            "dtype": str(self.model.wte.weight.dtype)[6:],
            "threads": torch.get_num_threads(),
            "device": device_name(self.device),
            "model": Path(args.model).name if is_shipped else args.model,
            "weights": weights_kind(args.model),
            "seed": args.seed,
        }

    def words(self) -> str:
        """Memory and clock, for the workload column."""
        pool = f"blocks={self.num_blocks} block_size={self.args.block_size}"
        if not self.args.simulate:
            return pool
        a, b, c = self.cost
        return f"{pool} cost={a:.3g}+{b:.3g}+{c:.3g}"
