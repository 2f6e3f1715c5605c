"""Where the time of a run's steps goes: each is counted and timed from outside, and judged.

An engine that takes 30 ms for a step may be perfect or ten times too slow; a profile says which
call took longest, never whether it had to. What a step has to do can be counted: 12 sequences of
the 124M GPT-2 in 32 bits with 500 tokens each read 495 MB of weights and 442 MB of keys and values,
in any engine. Divided by what this machine can do at most, each count is a floor, and the largest
floor names what the step is bound by. An `Explainer` stands around the engine, as a recorder does:

    step() ──> engine.step() ──> StepOutput: who ran, from where to where ─> rows, context tokens
                  └─> forward(batch) ──> its time; what the step has more is the host's

    weights read             494.6 MB   24.7 ms
    keys and values read     442.4 MB   22.1 ms    through one memory: at least 46.8 ms,
    measured                            58.5 ms    and this step takes 1.25 times as long

A decode step adds one token to each of its sequences; any other counts as prefill. What a
production engine does beyond this: a trace of every kernel, and the hardware's own counters.

Williams, Waterman and Patterson 2009, "Roofline", CACM 52(4); see watch/roofline.py.
Run: python -m watch.explain
Try: the two functions of kernels/attention_cpu.py in the demo's eager_forward (what is above all
floors shrinks), or one prompt instead of six (which floors grow smaller, and which do not?).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from block_allocator import BlockAllocator
from engine import Forward, InferenceEngine, eager_forward
from kv_cache import Batch, KVCache, Row, make_batch
from model import GPT, GPTConfig
from outputs import StepOutput
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import Plan
from watch.roofline import Ceilings, Work, bound_by, floors_ms, measure_ceilings

# The floors' lines in the table.
TITLES = {
    "weights": "weights read",
    "KV": "keys and values read",
    "memory": "both, through one memory",
    "operations": "operations",
    "launches": "launches of the forward",
    "host": "host's own time",
}
# What a step is called that such work binds, and what follows.
VERDICTS = {
    "weights": ("weight-bound", "larger steps would share the reading"),
    "KV": ("KV-bound", "shorter contexts would take less"),
    "operations": ("compute-bound", "twice the tokens take twice the time"),
    "launches": ("launch-bound", "fewer, larger kernels would take less"),
    "host": ("host-bound", "larger steps would share its work"),
}


# ---- what a step has to do -----------------------------------------------------------------------
class CountedStep(NamedTuple):
    """One step of a run: what its plan asked for, and how long it took."""

    num_rows: int  # tokens that went through the layers
    num_sample_rows: int  # of them, those whose logits were wanted
    num_context_tokens: int  # whose K and V were read
    num_pairs: int  # of a query and a position that it reads, in each head of each layer
    is_decode: bool  # each of its sequences added one token
    step_ms: float  # on the host's clock, from the plan to the text
    forward_ms: Callable[[], float]  # asked for after the run: a GPU may not have come so far

    @property
    def measured_ms(self) -> float:
        """The whole step: a GPU's also where nobody waited for it, in the middle of a prompt."""
        return max(self.step_ms, self.forward_ms())


def count_plan(plan: Plan) -> tuple[int, int, int]:
    """Rows, context tokens and pairs of a step, see `CountedStep`.

    Example: positions [4, 7) of a sequence are 3 rows over 7 tokens, in 5 + 6 + 7 = 18 pairs.
    """
    context_tokens = pairs = 0
    for _, start, n in plan.scheduled:
        context_tokens += start + n
        pairs += n * start + n * (n + 1) // 2
    return plan.num_tokens, context_tokens, pairs


def split_parts(model: GPT) -> tuple[list[nn.Module], list[nn.Module]]:
    """The parts that all rows of a step go through, and those for rows that want logits."""
    last = model.h[-1]
    sampled = [last.attn.c_proj, last.ln_2, last.mlp, model.ln_f, model.lm_head]
    return [*model.h[:-1], last.ln_1, last.attn.c_attn], sampled


def weight_bytes(model: GPT, num_rows: int, num_sample_rows: int) -> int:
    """Bytes of weights that a step reads.

    All of the layers, once, however many rows there are. Of the two embeddings only a row each a
    token: 6 KB of the 124M shape's 158 MB. The head reads its matrix whole, and as the last layer
    behind its attention only where logits are wanted; that it may be the embedding's own matrix
    saves room, not reading.
    """
    every, sampled = split_parts(model)
    parts = nn.ModuleList(every + sampled if num_sample_rows else every).parameters()
    looked_up = 2 * num_rows * model.config.n_embd * model.wte.weight.dtype.itemsize
    # Of packed weights only sizes and type are asked for, not their order.
    return looked_up + sum(weight.numel() * weight.dtype.itemsize for weight in parts)


def count_operations(model: GPT, step: CountedStep) -> int:
    """Multiplications and additions of a step's products and of its attention.

    Each weight of a layer meets each row; those of the head, and of the last layer behind its
    attention, each row that wants logits. In every layer each pair is C multiply-adds for the
    scores of all heads, and C more for the sum over V. LayerNorms, activations and residuals are
    left out: a thousandth of it.
    """
    products = 0
    for parts, num_rows in zip(
        split_parts(model), (step.num_rows, step.num_sample_rows), strict=True
    ):
        linears = [p for p in nn.ModuleList(parts).modules() if hasattr(p, "in_features")]
        products += num_rows * sum(p.in_features * p.out_features for p in linears)
    in_pairs = 2 * model.config.n_layer * model.config.n_embd
    return 2 * (products + step.num_pairs * in_pairs)


def count_launches(call: Callable[[], object]) -> int:
    """What a GPU is asked to do in one call, copies included, as PyTorch's profiler sees it."""
    call()  # whatever compiles, compiles now
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profiler.events())


# ---- the table -----------------------------------------------------------------------------------
class Explained(NamedTuple):
    """A kind of step: the median one's work, its floors, and how long it took."""

    kind: str  # "decode" or "prefill"
    num_steps: int
    step: CountedStep
    work: Work
    floors_ms: dict[str, float]  # by the names in TITLES

    @property
    def times_floor(self) -> float:
        """How many times as long as its largest floor the step took."""
        return self.step.measured_ms / max(self.floors_ms.values())

    @property
    def verdict(self) -> str:
        """One sentence: what such steps are bound by."""
        bound, consequence = VERDICTS[bound_by(self.floors_ms)]
        if self.num_steps == 1:
            consequence = "it was the only one, and warmed up"
        elif self.times_floor > 2:
            consequence = "less than half of the time is explained"
        times = f"{self.times_floor:,.2f} times its floor"
        return f"a {self.kind} step is {bound}, at {times}: {consequence}"


def _column(e: Explained, names: list[str]) -> list[tuple[str, str]]:
    """The two cells of a kind of step in each line of the table but the first."""
    amounts = {
        "weights": f"{e.work.weight_bytes / 1e6:,.1f} MB",
        "KV": f"{e.work.kv_bytes / 1e6:,.1f} MB",
        "memory": f"{(e.work.weight_bytes + e.work.kv_bytes) / 1e6:,.1f} MB",
        "operations": f"{e.work.operations / 1e9:,.2f} G",
        "launches": "-" if e.work.launches is None else f"{e.work.launches:,}",
        "host": "",
    }
    floors = [f"{e.floors_ms[name]:,.3f}" if name in e.floors_ms else "-" for name in names]
    return [
        ("work", "floor ms"),
        (f"{e.step.num_rows:,}", ""),
        (f"{e.step.num_context_tokens:,}", ""),
        *((amounts[name], floor) for name, floor in zip(names, floors, strict=True)),
        ("", f"{e.step.measured_ms:,.3f}"),
        ("", f"{e.times_floor:,.2f}"),
    ]


def table(kinds: list[Explained]) -> list[str]:
    """Lines for a terminal: what a step of each kind has to do, and how long that takes at least.

    The line of the launches stands there only if somebody counted them.
    """
    names = [name for name in TITLES if any(name in e.floors_ms for e in kinds)]
    titles = ["the median of them", "tokens computed", "context tokens read"]
    titles += [*(TITLES[name] for name in names), "measured", "measured / largest floor"]
    heads = (f"{e.kind}, {e.num_steps:,} step{'s' * (e.num_steps != 1)}" for e in kinds)
    lines = [" " * 26 + "".join(f"{head:>26}" for head in heads)]
    for title, *cells in zip(titles, *(_column(e, names) for e in kinds), strict=True):
        pairs = (f"{work:>14}{time_ms:>12}" for work, time_ms in cells)
        lines.append(f"{title:26}{''.join(pairs)}".rstrip())
    return lines


# ---- around an engine ----------------------------------------------------------------------------
class Explainer:
    """An engine whose steps are counted and timed: its methods are the engine's, and `report`.

    `model` is the one behind the engine's forward: its weights are what a step reads. Raises
    ValueError for an engine that plans ahead: the time of a step that another one overlaps cannot
    be taken apart.
    """

    steps_overlap = False

    def __init__(self, engine: InferenceEngine, model: GPT):
        if engine.steps_overlap:
            raise ValueError("steps that were planned ahead overlap: explain without plan_ahead")
        self.engine, self.model = engine, model
        self.steps: list[CountedStep] = []

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def has_unfinished(self) -> bool:
        return self.engine.has_unfinished()

    def add_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options
    ) -> str:
        """Queue a prompt as the engine does."""
        return self.engine.add_request(prompt, params, **options)

    def abort(self, request_id: str) -> bool:
        """End a request as the engine does."""
        return self.engine.abort(request_id)

    def step(self) -> StepOutput:
        """Run one step and count it. A step that raised is not counted."""
        forward, ran = self.engine.forward, []

        def timed(batch: Batch) -> Tensor:
            logits, forward_ms = _timed(forward, batch, self.engine.cache.pool.is_cuda)
            ran.append((len(batch.sample_rows), forward_ms))
            return logits

        self.engine.forward = timed
        try:
            output = self.engine.step()
        finally:
            self.engine.forward = forward  # between two of our steps the engine is as it was
        for num_sample_rows, forward_ms in ran:  # once, or never: where nobody could run
            rows, *counts = count_plan(output.plan)
            is_decode = rows == len(output.plan.scheduled)
            times = output.milliseconds, forward_ms
            self.steps.append(CountedStep(rows, num_sample_rows, *counts, is_decode, *times))
        return output

    def work(self, step: CountedStep) -> Work:
        """What a step had to do; launches are counted for a decode step on a GPU."""
        cache = self.engine.cache
        token_bytes = cache.pool[:, 0].nbytes // cache.block_size  # K and V of one, all layers
        launches = None
        if cache.pool.device.type == "cuda" and step.is_decode:
            batch = self.rehearsal(step)
            launches = count_launches(lambda: self.engine.forward(batch))
        return Work(
            weight_bytes(self.model, step.num_rows, step.num_sample_rows),
            token_bytes * step.num_context_tokens,
            count_operations(self.model, step),
            launches,
            step.measured_ms - step.forward_ms(),
        )

    def rehearsal(self, step: CountedStep) -> Batch:
        """A batch like a decode step's that disturbs nobody: it lies in the scratch block."""
        cache = self.engine.cache
        context = max(1, step.num_context_tokens // step.num_rows)
        table = [cache.scratch_block] * -(-context // cache.block_size)
        rows = [Row([0] * context, context - 1, 1, table, 1)] * step.num_rows
        return make_batch(rows, cache.block_size, cache.scratch_block)

    def median_steps(self) -> dict[str, tuple[int, CountedStep]]:
        """For each kind of step how many there were, and the one that took the median time.

        One step and not the median of each of its figures: so they fit together. The first of a
        kind compiles and warms up: it stands for them only if it is the only one. Raises
        ValueError before any step was run.
        """
        if not self.steps:
            raise ValueError("0 steps have run, so there is nothing to explain: call step() first")
        found = {}
        for kind, is_decode in (("decode", True), ("prefill", False)):
            steps = [step for step in self.steps if step.is_decode == is_decode]
            ranked = sorted(steps[1:] or steps, key=lambda step: step.measured_ms)
            if ranked:
                found[kind] = len(steps), ranked[(len(ranked) - 1) // 2]
        return found

    @torch.inference_mode()
    def report(self) -> list[str]:
        """Measure the ceilings, which takes a second or two, and lay the table; its lines."""
        device, dtype = self.engine.cache.pool.device, self.model.wte.weight.dtype
        if device.type == "cuda":
            torch.cuda.synchronize()  # every forward has ended, and knows its time
        medians = self.median_steps()
        works = {kind: self.work(step) for kind, (_, step) in medians.items()}
        first = next(iter(works.values()))  # the decode step's, where there is one
        ceilings = measure_ceilings(device, dtype, first.weight_bytes + first.kv_bytes)
        kinds = [
            Explained(kind, *medians[kind], work, floors_ms(work, ceilings))
            for kind, work in works.items()
        ]
        head = _ceilings_line(ceilings, device, dtype)
        return [head, *table(kinds), *(kind.verdict for kind in kinds)]


def _timed(forward: Forward, batch: Batch, on_gpu: bool) -> tuple[Tensor, Callable[[], float]]:
    """Logits, and a function that gives the milliseconds they took, on a GPU once it is through.

    There two events are queued before and behind the forward's own work: nobody waits for them.
    """
    if not on_gpu:
        started = time.perf_counter()
        logits = forward(batch)
        taken_ms = (time.perf_counter() - started) * 1e3
        return logits, lambda: taken_ms
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    logits = forward(batch)
    last.record()
    return logits, lambda: first.elapsed_time(last)


def _ceilings_line(ceilings: Ceilings, device: torch.device, dtype: torch.dtype) -> str:
    """The head of a report: what was measured, with which threads, in which type."""
    num_threads, where = torch.get_num_threads(), f"this {device.type}"
    if device.type == "cpu":
        where += f" with {num_threads} thread{'s' * (num_threads != 1)}"
    launch = "" if ceilings.launch_ms is None else f", {ceilings.launch_ms * 1e3:.2f} us a launch"
    reads = f"{ceilings.bytes_per_ms / 1e6:,.1f} GB/s read"
    products = f"{ceilings.operations_per_ms / 1e6:,.0f} GFLOP/s multiplied in {str(dtype)[6:]}"
    return f"at most, on {where}: {reads}, {products}{launch}"


# --------------------------------------------------------------------------------------------------
def demo():
    """Six prompts through a small random model: the table, and the same tokens as without it."""
    torch.set_num_threads(1)
    model = GPT(GPTConfig(vocab_size=4096, max_seq_len=256, n_layer=4, n_head=4, n_embd=256))
    model.init_weights(std=0.2).eval()
    prompts = [list(range(1, 40 + 8 * i)) for i in range(6)]
    wanted = SamplingParams(temperature=0, max_tokens=24)

    def run(wrap: Callable) -> tuple[dict[str, list[int]], InferenceEngine]:
        cache = KVCache(4, num_blocks=64, block_size=16, num_kv_heads=4, head_dim=64)
        scheduler = Scheduler(BlockAllocator(64, 16), 8, 128, 256)
        engine = wrap(InferenceEngine(eager_forward(model, cache), cache, scheduler, 4096))
        for prompt in prompts:
            engine.add_request(prompt, wanted)
        written = {}
        while engine.has_unfinished():
            outputs = engine.step().outputs
            written |= {o.request_id: o.outputs[0].token_ids for o in outputs if o.finished}
        return written, engine

    bare, _ = run(lambda engine: engine)
    written, explainer = run(lambda engine: Explainer(engine, model))
    print("\n".join(explainer.report()))
    # The last token of each sequence is written and never computed.
    rows = sum(len(prompt) + wanted.max_tokens - 1 for prompt in prompts)
    assert sum(step.num_rows for step in explainer.steps) == rows
    assert written == bare
    print(f"ok: {rows} tokens computed in {len(explainer.steps)} steps, all counted, none changed")


if __name__ == "__main__":
    demo()
