"""Where the time of a run's steps goes: their work is counted, and compared with the machine.

A step of 58 ms may be good or ten times too slow. A profile shows which call took longest, but not
whether it had to take so long. The work of a step can be counted. For example, 12 sequences of the
124M GPT-2 in float32 with 500 tokens each read 495 MB of weights and 442 MB of keys and values, in
any engine. Divided by what this machine can do at most, each count is a floor (`roofline.py`). The
largest floor says what the step is bound by. An `Explainer` is a watcher of the engine:

    step() ──> StepOutput ─┬─> plan: who ran, from where to where ─> rows, context tokens
                           └─> timings: the whole step; schedule and update are the host's own time

    weights read             494.6 MB   24.7 ms
    keys and values read     442.4 MB   22.1 ms    through one memory: at least 46.8 ms,
    measured                            58.5 ms    and this step takes 1.25 times as long

A step in which each sequence adds one token is a decode step; every other step is a prefill step.
The tests compare the counts with counts by hand and with PyTorch's own counter.

Williams, Waterman and Patterson 2009, "Roofline", CACM 52(4). Run: python generate.py --explain
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from engine import Forward
from kv_cache import Batch, KVCache, Row, make_batch
from model import GPT
from outputs import StepOutput
from sequence import RUNNING, Plan, Scheduled
from watch.roofline import Ceilings, Work, bound_by, floors_ms, measure_ceilings

# The titles of the floors in the table.
TITLES = {
    "weights": "weights read",
    "KV": "keys and values read",
    "memory": "both, through one memory",
    "operations": "operations",
    "launches": "launches of the forward",
    "host": "host's own time",
}
# For the largest floor: the name of such a step, and what follows from it.
VERDICTS = {
    "weights": ("weight-bound", "more sequences would share the reading of the weights"),
    "KV": ("KV-bound", "shorter contexts would take less time"),
    "operations": ("compute-bound", "twice the tokens take twice the time"),
    "launches": ("launch-bound", "fewer and larger kernels would take less time"),
    "host": ("host-bound", "more sequences would share the host's work"),
}


# ---- what a step has to do -----------------------------------------------------------------------
class CountedStep(NamedTuple):
    """One step of a run: the work that its plan asked for, and how long it took."""

    num_rows: int  # tokens that went through the layers
    num_sample_rows: int  # those of them whose logits were computed
    num_context_tokens: int  # tokens whose K and V were read
    num_pairs: int  # of a query and a position that it reads; the same in each head and layer
    is_decode: bool  # each sequence added one token
    measured_ms: float  # the whole step, on the host's clock
    host_ms: float  # of it: to plan the step, and to apply its tokens


def count_step(output: StepOutput) -> CountedStep:
    """The work and the times of a step.

    Example: positions [4, 7) of a sequence are 3 rows over 7 tokens, in 5 + 6 + 7 = 18 pairs.
    """
    plan, timings = output.plan, output.timings
    # Each of n queries reads the `start` tokens before; among themselves 1 + 2 + .. + n.
    pairs = [n * start + n * (n + 1) // 2 for _, start, n in plan.scheduled]
    return CountedStep(
        num_rows=plan.num_tokens,
        num_sample_rows=count_sample_rows(plan),
        num_context_tokens=sum(start + n for _, start, n in plan.scheduled),
        num_pairs=sum(pairs),
        is_decode=plan.num_tokens == len(plan.scheduled),
        measured_ms=timings.total,
        host_ms=timings.schedule + timings.update,
    )


def count_sample_rows(plan: Plan) -> int:
    """Rows whose logits were computed: one of each sampled sequence, all of a scored prompt."""
    scored = [entry for entry in plan.scheduled if is_scored(entry)]
    sampled = set(plan.sampled).difference(entry.seq for entry in scored)
    return len(sampled) + sum(entry.num_new_tokens for entry in scored)


def is_scored(entry: Scheduled) -> bool:
    """Whether a step computed the log-probabilities of a prompt, which the request asked for.

    For a sequence that was preempted it returns False: its prompt was probably scored before.
    """
    seq, start, _ = entry
    is_asked = seq.request.prompt_logprobs is not None and seq.index == 0
    return is_asked and start < seq.num_prompt_tokens and not seq.num_preemptions


def next_is_launched(plan: Plan) -> bool:
    """Whether the engine launched the next step before it read the tokens of this one."""
    return any(
        seq.status == RUNNING and seq.num_computed_tokens > start + num_new_tokens
        for seq, start, num_new_tokens in plan.scheduled
    )


def parts_for_all_rows(model: GPT) -> nn.ModuleList:
    """The parts that all rows of a step go through: the last layer only up to its K and V."""
    last: Any = model.h[-1]
    return nn.ModuleList([*model.h[:-1], last.ln_1, last.attn.c_attn])


def parts_for_sample_rows(model: GPT) -> nn.ModuleList:
    """The parts that a row goes through only if its logits are computed."""
    last: Any = model.h[-1]
    return nn.ModuleList([last.attn.c_proj, last.ln_2, last.mlp, model.ln_f, model.lm_head])


def weight_bytes(model: GPT, num_rows: int, num_sample_rows: int) -> int:
    """Bytes of weights that a step reads.

    A step reads a layer's weights once, however many rows it has. Of each of the two embeddings it
    reads one row a token: 6 KB of the 158 MB of the 124M shape. It reads the head, and the last
    layer after its K and V, only if it computes logits. A head that shares the weights of the
    embedding is read as a whole, too.
    """
    num_bytes = 2 * num_rows * model.config.n_embd * model.wte.weight.dtype.itemsize  # embeddings
    parts = [parts_for_all_rows(model)]
    if num_sample_rows:
        parts.append(parts_for_sample_rows(model))
    for part in parts:
        # Packed weights too have a size and a dtype.
        num_bytes += sum(weight.numel() * weight.dtype.itemsize for weight in part.parameters())
    return num_bytes


def count_operations(model: GPT, step: CountedStep) -> int:
    """Multiplications and additions of a step's matrix products and of its attention.

    Each weight is multiplied with each row that goes through its part. A pair of a query and a
    position costs C multiply-adds for the scores of all heads and C for the sum over V, in each
    layer. LayerNorms, activations and residuals are left out: they are about a thousandth of it.
    """
    all_rows = step.num_rows * _num_weights_of_products(parts_for_all_rows(model))
    sample_rows = step.num_sample_rows * _num_weights_of_products(parts_for_sample_rows(model))
    attention = step.num_pairs * 2 * model.config.n_layer * model.config.n_embd
    return 2 * (all_rows + sample_rows + attention)  # a multiplication and an addition each


def _num_weights_of_products(parts: nn.ModuleList) -> int:
    # nn.Linear and its packed forms have these two attributes.
    linears: list[Any] = [part for part in parts.modules() if hasattr(part, "in_features")]
    return sum(linear.in_features * linear.out_features for linear in linears)


def count_launches(call: Callable[[], object]) -> int:
    """Kernels and copies that a GPU runs in one call, counted by PyTorch's profiler."""
    call()  # compiles what has to be compiled
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(1 for event in profiler.events() if event.device_type == on_gpu)


# ---- the table -----------------------------------------------------------------------------------
class Explained(NamedTuple):
    """A kind of step: the work of the median step, its floors, and how long it took."""

    kind: str  # "decode" or "prefill"
    num_steps: int
    step: CountedStep
    work: Work
    floors_ms: dict[str, float]  # by the names in TITLES

    @property
    def times_floor(self) -> float:
        """The measured time divided by the largest floor."""
        return self.step.measured_ms / max(self.floors_ms.values())

    @property
    def verdict(self) -> str:
        """What such a step is bound by, in one sentence."""
        bound, consequence = VERDICTS[bound_by(self.floors_ms)]
        if self.num_steps == 1:
            consequence = "it was the only one, so its time includes the warm-up"
        elif self.times_floor > 2:
            consequence = "less than half of the time is explained"
        times = f"{self.times_floor:,.2f} times its floor"
        return f"a {self.kind} step is {bound}, at {times}: {consequence}"


def _column(e: Explained, names: list[str]) -> list[tuple[str, str]]:
    """The cells (work, floor) of a kind of step, one pair for each line below the table's head."""
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
    """The lines of a table with two columns for each kind of step: its work, and the floors.

    It has a line for launches only if they were counted for some kind.
    """
    names = [name for name in TITLES if any(name in e.floors_ms for e in kinds)]
    titles = [
        "the median of them",
        "tokens computed",
        "context tokens read",
        *(TITLES[name] for name in names),
        "measured",
        "measured / largest floor",
    ]
    heads = [f"{e.kind}, {e.num_steps:,} step{'s' if e.num_steps > 1 else ''}" for e in kinds]
    columns = [_column(e, names) for e in kinds]
    lines = [" " * 26 + "".join(f"{head:>26}" for head in heads)]
    for title, *pairs in zip(titles, *columns, strict=True):
        cells = "".join(f"{work:>14}{floor:>12}" for work, floor in pairs)
        lines.append(f"{title:26}{cells}".rstrip())
    return lines


# ---- the watcher ---------------------------------------------------------------------------------
class Explainer:
    """A watcher that counts steps, and reports: `engine.watchers.append(explainer)`.

    `model` is the model of the engine's forward: its weights are what a step reads. `cache` and
    `forward` are the engine's.
    """

    def __init__(self, model: GPT, cache: KVCache, forward: Forward):
        self.model = model
        self.cache = cache
        self.forward = forward
        self.steps: list[CountedStep] = []
        self._was_awaited = True  # the host waited for the end of the step before
        self._launched_next = False  # the step after it was launched before it was read

    def __call__(self, output: StepOutput) -> None:
        """Count a step that has just run, if its time is its own."""
        plan = output.plan
        if not plan.scheduled:
            return
        step = count_step(output)
        if self._has_own_time(plan, step.is_decode):
            self.steps.append(step)

    def _has_own_time(self, plan: Plan, is_decode: bool) -> bool:
        """Whether the time of a step is that of its own work, or of a step like it."""
        # The host waits for a GPU when it reads tokens. A chunk in the middle of a prompt gives no
        # token, so the host does not wait: the measured time of that step is too short, and that of
        # the next step includes both.
        was_awaited = self._was_awaited
        self._was_awaited = bool(plan.sampled) or not self.cache.pool.is_cuda
        # If the next step is launched before this one is read, the measured time may be that of the
        # next step's work. Between decode steps that makes no difference, because they are alike.
        # But the first of a row of such steps has the time of two, and the last has almost none.
        was_launched, self._launched_next = self._launched_next, next_is_launched(plan)
        is_in_a_row = was_launched == self._launched_next and (is_decode or not was_launched)
        return was_awaited and self._was_awaited and is_in_a_row

    def work(self, step: CountedStep) -> Work:
        """The work of a step; launches are counted for a decode step on a GPU only."""
        cache = self.cache
        token_bytes = cache.pool[:, 0].nbytes // cache.block_size  # K and V of a token, all layers
        launches = None
        if cache.pool.is_cuda and step.is_decode:
            batch = self.rehearsal(step)
            launches = count_launches(lambda: self.forward(batch))
        return Work(
            weight_bytes=weight_bytes(self.model, step.num_rows, step.num_sample_rows),
            kv_bytes=token_bytes * step.num_context_tokens,
            operations=count_operations(self.model, step),
            launches=launches,
            host_ms=step.host_ms,
        )

    def rehearsal(self, step: CountedStep) -> Batch:
        """A batch like that of a decode step. It reads and writes the scratch block only."""
        cache = self.cache
        context_len = max(1, step.num_context_tokens // step.num_rows)
        block_table = [cache.scratch_block] * -(-context_len // cache.block_size)
        # Token 0 at the last position of the context, with its logits.
        row = Row([0] * context_len, context_len - 1, 1, block_table, 1)
        return make_batch([row] * step.num_rows, cache.block_size, cache.scratch_block)

    def median_steps(self) -> dict[str, tuple[int, CountedStep]]:
        """For each kind of step: how many there were, and the one that took the median time.

        All figures are those of this one step, so they belong together. The first step of a kind
        includes compilation and warm-up, so it is left out if there are others. Raises ValueError
        if no step was counted.
        """
        if not self.steps:
            raise ValueError("0 steps were counted, so there is nothing to explain: run for longer")
        medians = {}
        for kind, is_decode in (("decode", True), ("prefill", False)):
            steps = [step for step in self.steps if step.is_decode == is_decode]
            if steps:
                ranked = sorted(steps[1:] or steps, key=lambda step: step.measured_ms)
                medians[kind] = (len(steps), ranked[(len(ranked) - 1) // 2])  # the lower of two
        return medians

    @torch.inference_mode()
    def report(self) -> list[str]:
        """The lines of the report. Measuring the ceilings takes a second or two."""
        device = self.cache.pool.device
        dtype = self.model.wte.weight.dtype
        medians = self.median_steps()
        works = {kind: self.work(step) for kind, (_, step) in medians.items()}
        # The decode step's if there is one: the buffer of the read is as large as what it reads.
        first = next(iter(works.values()))
        ceilings = measure_ceilings(device, dtype, first.weight_bytes + first.kv_bytes)
        kinds = []
        for kind, (num_steps, step) in medians.items():
            floors = floors_ms(works[kind], ceilings)
            kinds.append(Explained(kind, num_steps, step, works[kind], floors))
        head = _ceilings_line(ceilings, device, dtype)
        return [head, *table(kinds), *(kind.verdict for kind in kinds)]


def _ceilings_line(ceilings: Ceilings, device: torch.device, dtype: torch.dtype) -> str:
    """The first line of a report: the measured rates, the number of threads, the dtype."""
    machine = f"this {device.type}"
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        machine += f" with {num_threads} thread{'s' if num_threads > 1 else ''}"
    launch = "" if ceilings.launch_ms is None else f", {ceilings.launch_ms * 1e3:.2f} us a launch"
    reads = f"{ceilings.bytes_per_ms / 1e6:,.1f} GB/s read"
    products = f"{ceilings.operations_per_ms / 1e6:,.0f} GFLOP/s multiplied in {str(dtype)[6:]}"
    return f"at most, on {machine}: {reads}, {products}{launch}"
