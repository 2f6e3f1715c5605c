"""The traffic that one process and several ranks must serve alike; run as a program, one rank.

    python tests/ranked.py FOLDER SIZE RANK      serves each case of CASES, rank 0 keeps what came
    python tests/ranked.py FOLDER SIZE all       the same, and all ranks are forks of this process
    python tests/ranked.py FOLDER SIZE all die VICTIM MOMENT       one rank kills itself

The ranks find each other through a file in FOLDER, so that tests side by side share no port. Forks
save the time of the imports. Only processes of their own have another hash seed each.
"""

import atexit
import os
import pickle
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from beam_search import BeamSearchParams, add_beam_search, best_first
from llm import LLM
from model import GPT, GPTConfig
from policies import first_come_first_served
from sampling import SamplingParams
from speedups.tensor_parallel import follow

VOCAB_SIZE = 97
POOL = {"block_size": 4, "num_blocks": 18, "max_num_seqs": 7, "max_num_batched_tokens": 17}


def by_lot(seq) -> float:
    """A policy whose order is another one in each process, as one that reads the clock."""
    return random.SystemRandom().random()


TWELVE = {"n_head": 12, "n_embd": 48}
# Nothing divides evenly: 25 heads, 37 columns of the MLP, 97 rows of the vocabulary.
ODD = {"n_head": 25, "n_embd": 50, "n_inner": 37, "tie_word_embeddings": False}
ODD |= {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}
CASES = {
    "12 heads": (TWELVE, {"backend": "numba", "policy": first_come_first_served}),
    "25 heads": (ODD, {"backend": "torch", "policy": by_lot}),
}


def model_of(shape: dict) -> GPT:
    """A small model in float64 whose biases are not zero."""
    model = GPT(GPTConfig(VOCAB_SIZE, 64, 2, **shape)).init_weights(std=0.2, seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


class TopOfAll:
    """A strategy that looks at all its sequences: each gets the token that is likeliest in all.

    It shows whether requests that share it are asked together.
    """

    def __call__(self, sequences, logits):
        from sequence import Continuation

        token_id = int(logits.sum(0).argmax())
        return [Continuation(seq, [token_id]) for seq in sequences]


SHARED = TopOfAll()


def requests_by_step() -> dict[int, list[tuple]]:
    """What arrives before which step: (name, prompt, parameters, strategy)."""
    draw = random.Random(5)
    stem = [draw.randrange(VOCAB_SIZE) for _ in range(14)]

    def prompt(length: int, start: list[int] = []) -> list[int]:
        return start + [draw.randrange(VOCAB_SIZE) for _ in range(length)]

    def params(max_tokens: int, **fields) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)

    beams = BeamSearchParams(beam_width=3, max_tokens=7)
    strict = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 2.0}}
    cut = {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.02}
    return {
        0: [("in pieces", prompt(35), params(6, temperature=0), None)],  # no row of logits at first
        1: [
            ("aborted while it runs", prompt(4), params(30), None),
            ("greedy", prompt(5), params(12, temperature=0), None),
            ("sampled", prompt(3, stem), params(15, temperature=0.9, seed=3), None),
            ("three texts", prompt(6), params(9, n=3, logprobs=2), None),
        ],
        2: [
            ("penalties", prompt(7), params(14, **strict), None),
            ("aborted while it waits", prompt(8), params(9), None),
            ("aborted at once", prompt(8), params(9), None),
        ],
        6: [
            ("beams", prompt(5), beams, None),
            ("cut tails", prompt(2), params(10, seed=8, **cut), None),
            ("scored", prompt(9), params(3, prompt_logprobs=1, logprobs=0), None),
        ],
        9: [
            ("a prefix", prompt(2, stem), params(11, seed=4), None),
            ("a stop", prompt(4), params(20, stop_token_ids=list(range(0, 97, 5))), None),
            ("together 1", prompt(3), params(6, temperature=0), SHARED),
        ],
        11: [("together 2", prompt(4), params(6, temperature=0), SHARED)],
        30: [("late", prompt(1, stem), params(5, temperature=0), None)],
    }


ABORTS = {2: "aborted at once", 3: "aborted while it waits", 4: "aborted while it runs"}


def serve(llm: LLM) -> dict:
    """Serve the traffic; what each request got, the logits of each step, and what happened."""
    engine, logits = llm.engine, []
    forward = engine.forward

    def remembered(batch):
        logits.append(forward(batch).clone())
        return logits[-1]

    engine.forward = remembered
    by_step = requests_by_step()
    ids, names, outputs, states = {}, {}, {}, {}
    step = 0
    while by_step or engine.has_unfinished():
        for name, prompt, params, strategy in by_step.pop(step, []):
            if isinstance(params, BeamSearchParams):
                ids[name] = add_beam_search(engine, prompt, params)
            else:
                ids[name] = engine.add_request(prompt, params, strategy=strategy)
            names[ids[name]] = name
        if step in ABORTS:
            name = ABORTS[step]
            request = engine.requests[ids[name]]
            states[name] = request.is_queued and request.sequences[0].status
            assert engine.abort(ids[name])
        for output in engine.step().finished:
            name = names[output.request_id]
            if name == "beams":
                output = best_first(output, BeamSearchParams(beam_width=3, max_tokens=7))
            outputs[name] = [
                (c.token_ids, c.finish_reason, c.cumulative_logprob, c.error)
                for c in output.outputs
            ]
        engine.scheduler.check_integrity()
        step += 1
    scheduler = engine.scheduler
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
    return {
        "outputs": outputs,
        "logits": logits,
        "states": states,
        "preemptions": scheduler.num_preemptions,
        "hits": scheduler.num_blocks_hit,
        "pool bytes": engine.cache.pool.nbytes,
        "weight bytes": sum(p.nbytes for p in set(llm.model.parameters())),
    }


# ---- one rank ------------------------------------------------------------------------------------
def checked(output, engine) -> None:
    """A watcher of the ranks that follow: their books are whole after each step."""
    try:
        engine.scheduler.check_integrity()
    except AssertionError as error:
        print(f"the books of rank {engine.ranks.rank} are wrong: {error}", flush=True)
        os._exit(3)


def serve_cases(folder: Path, rank: int, size: int) -> None:
    """Each case in turn, in one group."""
    results = {}
    for name, (shape, options) in CASES.items():
        if size > 2:
            options = options | {"backend": "torch"}  # a second to load less
        llm = LLM(model_of(shape), tensor_parallel=True, **POOL, **options)
        if rank:
            llm.engine.watchers.append(lambda output, engine=llm.engine: checked(output, engine))
            follow(llm.engine)
            scheduler = llm.engine.scheduler
            assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
            assert llm.engine.num_steps > 30 and not llm.engine.requests
        else:
            results[name] = serve(llm)
            llm.ranks.close()
    if rank == 0:
        (folder / "results.pkl").write_bytes(pickle.dumps(results))


def die(rank: int, victim: int, moment: str) -> None:
    """Serve until the victim ends: by a signal or Ctrl-C in the middle of a step, or when idle, or
    because it draws other tokens than the others.
    """
    llm = LLM(model_of(TWELVE), tensor_parallel=True, backend="torch", **POOL)
    whole_sum, num_sums = llm.ranks.sum, 0

    def last_sum(x):
        nonlocal num_sums
        num_sums += 1
        if num_sums == 23:  # there are 5 a step: this is in the middle of the fifth one
            if moment == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_sum(x)

    if rank == victim and moment == "differ":  # in the bits of a draw, as on another processor
        draw = llm.engine.sampler.draw
        llm.engine.sampler.draw = lambda logits, rows: draw(-logits, rows)
    elif rank == victim and moment != "idle":
        llm.ranks.sum = last_sum
    if rank:
        if rank == victim and moment == "idle":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
            signal.alarm(2)
        follow(llm.engine)
        return
    try:
        for _ in range(4 if moment == "idle" else 8):
            llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=1))
    except KeyboardInterrupt:  # as with one process, nothing is left in the engine
        scheduler = llm.engine.scheduler
        assert not llm.engine.has_unfinished() and not llm.engine.requests
        assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
        os._exit(130)
    time.sleep(60)


def run(folder: Path, size: int, rank: int, arguments: list[str]) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **group, timeout=timedelta(seconds=60))
    atexit.register(dist.destroy_process_group)
    if arguments:
        die(rank, int(arguments[1]), arguments[2])
    else:
        serve_cases(folder, rank, size)


def fork_all(folder: Path, size: int, arguments: list[str]) -> None:
    """Run all ranks as forks; FOLDER/ends.pkl has (rank, exit code, seconds) as each one ends.

    What a rank prints goes to FOLDER/RANK.txt.
    """
    ranks = {}
    for rank in range(size):
        pid = os.fork()
        if pid:
            ranks[pid] = rank
            continue
        output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            run(folder, size, rank, arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    ends = []
    while ranks:
        pid, status = os.wait()
        ends.append((ranks.pop(pid), os.waitstatus_to_exitcode(status), time.monotonic()))
    (folder / "ends.pkl").write_bytes(pickle.dumps(ends))


if __name__ == "__main__":
    folder, size, which = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if which == "all":
        fork_all(folder, size, sys.argv[4:])
    else:
        run(folder, size, int(which), sys.argv[4:])
