"""Whole workloads of the engine: requests of mixed lengths, prompts alone, and a profiled step.

Requests come all at once, and as many run as may. They are served in each way in turn: one step
after the other, one step ahead (plan_ahead.py), and ahead with joined kernels where a GPU has them.
Each has to write as many tokens as were asked for, and nearly the same ones (roads.py says how
nearly). latency.py yields these rows behind its own.
"""

import argparse
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from experiments import peers
from experiments.kernels import parse_shape
from experiments.profiles import Profile, lines_of, profile_steps
from experiments.results import Measurement
from experiments.roads import Trial, check_equal_work
from experiments.steps import random_ids
from kernels.triton_fused import can_fuse
from llm import LLM, SamplingParams
from model import GPT

SERIAL, AHEAD, AHEAD_FUSED = "serial", "one step ahead", "one step ahead, fused"
STEP_TOKENS = 8192  # a budget at which prompts wait for the GPU and not for the host
PROFILED_STEPS = 20
# What of a profile is a row: its name there, here, and its unit.
PROFILE_ROWS = [
    ("kernels", "kernels a step", "launches"),
    ("copies_to_device", "copies to the device a step", "copies"),
    ("waits", "waits a step", "waits"),
    ("allocations", "device allocations a step", "calls"),
    ("idle_percent", "device idle", "%"),
]


# ---- requests ------------------------------------------------------------------------------------
def ways_to_serve(model: GPT, args: argparse.Namespace) -> dict[str, dict[str, bool]]:
    """What `LLM` is told: one step after the other, one ahead, and the same with fewer kernels."""
    ways = {SERIAL: {}, AHEAD: {"plan_ahead": True}}
    if args.device.type == "cuda" and can_fuse(model) is None:
        ways[AHEAD_FUSED] = {"plan_ahead": True, "fused": True}
    return ways


def serve(llm: LLM, requests: list[tuple[list[int], int]]) -> Trial:
    """Serve (prompt, tokens to write) pairs, all there from the start; seconds and texts."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
    trial = Trial([])
    prompts = [prompt for prompt, _ in requests]

    def work() -> None:
        outputs = llm.generate(prompts, params)
        trial.token_ids = [output.outputs[0].token_ids for output in outputs]

    trial.seconds = peers.time_ms(work, llm.engine.cache.pool.device) / 1e3
    assert [len(text) for text in trial.token_ids] == [n for _, n in requests]
    return trial


def mixed_requests(vocab_size: int, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(prompt, tokens to write) pairs, both of lengths that are evenly mixed."""
    choose, (least, most) = random.Random(args.seed), args.lengths
    requests = []
    for _ in range(args.requests):
        prompt = [choose.randrange(vocab_size) for _ in range(choose.randint(least, most))]
        requests.append((prompt, choose.randint(least, most)))
    return requests


def throughput(model: GPT, args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Rows of the requests, served in each way in turn."""
    requests = mixed_requests(model.config.vocab_size, args)
    blocks = (-(-(len(prompt) + n) // args.block_size) for prompt, n in requests)
    # A block more for each: with fewer free ones than sequences no step is planned ahead.
    sizes = {"block_size": args.block_size, "num_blocks": sum(blocks) + len(requests)}
    sizes |= {"max_num_seqs": min(256, len(requests)), "max_num_batched_tokens": STEP_TOKENS}
    ways = ways_to_serve(model, args)
    llms = {name: LLM(model, **sizes, **options) for name, options in ways.items()}
    trials: dict[str, list[Trial]] = {name: [] for name in llms}
    for number in range(args.rounds + 1):  # the first warms up
        for name, llm in llms.items():
            trials[name].append(serve(llm, requests))
            in_16_bits = args.dtype.itemsize == 2
            check_equal_work(name, trials[name][-1], trials[SERIAL][0], in_16_bits)
    least, most = args.lengths
    workload = f"requests={len(requests)} prompts and texts of {least}..{most} tokens"
    what = {"workload": workload} | common
    seconds = {name: [trial.seconds for trial in ts[1:]] for name, ts in trials.items()}
    num_tokens = sum(n for _, n in requests)
    for name, taken in seconds.items():
        rates = [num_tokens / s for s in taken]
        of = {"contender": name, "metric": "output tokens", "unit": "tokens/s"}
        yield Measurement.of(rates, **of, **what)
        if name != SERIAL:
            against = {"contender": name, "metric": f"speed against {SERIAL}", "unit": "x"}
            yield Measurement.ratio_of(seconds[SERIAL], taken, **against, **what)


def prefill(model: GPT, args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Rows of steps that compute prompts, and the first token of each."""
    for B, T in map(parse_shape, args.prefill):
        llm = LLM(
            model,
            block_size=args.block_size,
            num_blocks=B * -(-(T + 1) // args.block_size),
            max_num_seqs=B,
            max_num_batched_tokens=B * T,
            cuda_graphs=False,  # no step of it is a decode
        )
        ours, prompts, rates = peers.Ours(llm, 1), random_ids(model, B, T, args.seed), []
        for number in range(args.rounds + 1):
            taken_ms = peers.time_ms(partial(ours.start, prompts), args.device)
            ours.finish()  # one token each, so they have ended
            if number:
                rates.append(B * T * 1e3 / taken_ms)
        what = {"contender": SERIAL, "workload": f"prefill batch={B} prompt={T}"} | common
        yield Measurement.of(rates, metric="prompt tokens", unit="tokens/s", **what)


# ---- a profile -----------------------------------------------------------------------------------
def profile_llm(llm: LLM, prompts: Tensor) -> Profile:
    """Of steps in which all sequences decode, none joins and none leaves."""
    ours = peers.Ours(llm, PROFILED_STEPS + 8)
    ours.start(prompts)
    for _ in range(4):  # nothing of the prompts is to be seen
        ours.step()
    profile = profile_steps(ours.step, PROFILED_STEPS)
    while llm.engine.has_unfinished():
        llm.engine.step()
    return profile


def profiles(model: GPT, args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Rows of what a step does, of the fewest and the most sequences; the text in a file."""
    T, most = args.contexts[0], max(args.batches)
    prompt_len = max(1, T - PROFILED_STEPS - 8)
    blocks = -(-(prompt_len + PROFILED_STEPS + 8) // args.block_size) + 1  # one stays free
    sizes = {"block_size": args.block_size, "max_num_seqs": most, "num_blocks": most * blocks}
    lines = []
    for name, options in ways_to_serve(model, args).items():
        llm = LLM(model, max_num_batched_tokens=most * prompt_len, **sizes, **options)
        for B in sorted({min(args.batches), most}):
            profile = profile_llm(llm, random_ids(model, B, prompt_len, args.seed))
            workload = f"profile batch={B} context={T}"
            lines += [*lines_of(f"{name}, {workload}, {PROFILED_STEPS} steps", profile), ""]
            Path(args.profile).write_text("\n".join(lines), encoding="utf-8")
            what = {"contender": name, "workload": workload} | common
            for name_there, metric, unit in PROFILE_ROWS:
                figure = getattr(profile, name_there)
                yield Measurement.of([figure], metric=metric, unit=unit, **what)
