"""Roads to the same tokens, each a generator of its steps, and one clock for all of them.

    no cache      every step computes all tokens again
    contiguous    one slab of the model's longest length a sequence, the library's attention
    paged         the engine, `InferenceEngine.step()`: schedule, forward, sample, detokenise
    transformers  its DynamicCache in a bare loop, where transformers is installed

All are greedy, and give each prompt the same number of tokens. A road yields a `Step` when the
step's tokens are on the host, so whoever reads the clock between two of them sees what a client
waits for. And what is timed is checked: `check_equal_work` refuses a road that wrote other tokens.
The experiments that drive them are speed.py and block_size.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from baselines import ContiguousCache, attend_without_cache, next_logits
from experiments import peers
from experiments.transformers_loop import Theirs
from kernels.device_memory import preallocate
from llm import LLM, SamplingParams
from model import GPT

CONTIGUOUS, PAGED, NO_CACHE, PEER = "contiguous", "paged", "no cache", peers.THEIRS


class Step(NamedTuple):
    """What one step of a road did."""

    tokens: dict[int, int]  # number of a prompt -> the token that it got
    computed: int  # tokens that went through the model
    kv_bytes: int  # held while it ran, reserved ones too
    preempted: int = 0  # sequences that lost their blocks


Road = Callable[[list[list[int]], int], Iterator[Step]]  # (prompts, new_tokens) -> its steps


# ---- the roads -----------------------------------------------------------------------------------
def static_road(model: GPT, cache: ContiguousCache | None) -> Road:
    """All start together and end together: in slabs or, without a `cache`, from the start again."""
    plug = cache.attend if cache else attend_without_cache

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        sequences, starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
        for _ in range(new_tokens):
            computed = sum(map(len, sequences)) - sum(starts)
            chosen = next_logits(model, plug, sequences, starts).argmax(-1).tolist()
            for token_ids, token_id in zip(sequences, chosen, strict=True):
                token_ids.append(token_id)
            if cache:
                starts = [len(token_ids) - 1 for token_ids in sequences]
            yield Step(dict(enumerate(chosen)), computed, cache.slabs.nbytes if cache else 0)

    return steps


def contiguous_road(model: GPT, batch: int) -> Road:
    """The road with slabs. A server that knows no lengths reserves the longest for everybody."""
    config, weight = model.config, model.wte.weight
    sizes = config.n_layer, batch, config.max_seq_len, config.n_head, config.head_dim
    return static_road(model, ContiguousCache(*sizes, weight.dtype, weight.device, preallocate))


def paged_road(llm: LLM) -> Road:
    """The engine: who does not fit waits, and who was preempted computes its tokens again."""
    allocator = llm.engine.scheduler.allocator
    block_bytes = llm.engine.cache.pool[:, 0].nbytes

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
        numbers = {request_id: number for number, request_id in enumerate(ids)}
        while llm.engine.has_unfinished():
            output = llm.engine.step()
            plan = output.plan
            tokens = {numbers[o.request_id]: o.outputs[0].token_ids[-1] for o in output.outputs}
            # Not the allocator's count: who ended with this step has given its blocks back by now.
            held = sum(allocator.blocks_needed(start + n) for _, start, n in plan.scheduled)
            yield Step(tokens, plan.num_tokens, held * block_bytes, len(plan.preempted))

    return steps


def transformers_road(theirs: Theirs, kv_bytes_per_token: int) -> Road:
    """A bare loop around transformers' model and its DynamicCache; prompts are of one length."""

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        B, T = len(prompts), len(prompts[0])
        for number in range(new_tokens):
            if number:
                theirs.step()
            else:
                theirs.start(torch.tensor(prompts, device=theirs.model.device))
            chosen = theirs.next_ids[:, 0].tolist()  # which waits for the device
            held = B * (T + number) * kv_bytes_per_token
            yield Step(dict(enumerate(chosen)), B if number else B * T, held)
        theirs.finish()

    return steps


# ---- the clock -----------------------------------------------------------------------------------
@dataclass
class Trial:
    """One road once, from the prompts to the last token."""

    token_ids: list[list[int]]  # written, a list a prompt
    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list)  # until a prompt's first token, one each
    step_ms: list[float] = field(default_factory=list)  # of all steps but the first
    computed: int = 0  # tokens, over all steps
    kv_bytes: int = 0  # at most
    preempted: int = 0


@torch.inference_mode()
def time_trial(road: Road, prompts: list[list[int]], new_tokens: int) -> Trial:
    """Walk a road to its end, and read the clock whenever it yields."""
    trial = Trial([[] for _ in prompts])
    started = last = time.perf_counter()
    for number, step in enumerate(road(prompts, new_tokens)):
        now = time.perf_counter()
        for i, token_id in step.tokens.items():
            if not trial.token_ids[i]:
                trial.first_ms.append((now - started) * 1e3)
            trial.token_ids[i].append(token_id)
        if number:
            trial.step_ms.append((now - last) * 1e3)
        trial.computed += step.computed
        trial.kv_bytes = max(trial.kv_bytes, step.kv_bytes)
        trial.preempted += step.preempted
        last = now
    trial.seconds = last - started
    assert {len(token_ids) for token_ids in trial.token_ids} == {new_tokens}
    return trial


def equal_start(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of all tokens, in percent, that come before their sequence's first difference."""
    equal = 0
    for a, b in zip(ours, theirs, strict=True):
        differences = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        equal += next(differences, len(a))
    return 100 * equal / sum(map(len, theirs))


def check_equal_work(name: str, trial: Trial, first: Trial, in_16_bits: bool) -> float:
    """Percent of equal tokens; ValueError where a road did not write what the first one wrote.

    Roads sum in different orders, so two scores that nearly tie may fall otherwise: rarely in
    float32, often in 16 bits, where only the first four tokens are held to it. A road that reads
    wrong memory goes wrong at its second token, the first one that needs what was kept.
    """
    ours, theirs = trial.token_ids, first.token_ids
    if in_16_bits:
        ours, theirs = ([ids[:4] for ids in token_ids] for token_ids in (ours, theirs))
    share, least = equal_start(ours, theirs), 40 if in_16_bits else 90
    if share < least:
        raise ValueError(f"{name} wrote {share:.0f}% as the first road did, {least}% are needed")
    return equal_start(trial.token_ids, first.token_ids)
