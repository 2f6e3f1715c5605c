"""What is gained when requests share blocks: prompts that begin alike, texts of one prompt, beams.

    prefix      a prompt of 0 to 900 known tokens and 20 new ones: time to its first token
    chat        each turn sends the whole history: time to the turn's first token
    forks       four texts of one prompt: one request with n=4, or four requests
    blocks      n texts and beams: blocks saved / blocks without sharing, as the paper's figure 15
    throughput  32 requests with 500 tokens in common, GPT-2's 124M shape
    trace       the block hashes of a recorded trace (block_trace.py): no model

Contenders take turns in one process, with new prompts in each round, and a round before them warms
up. What was found is counted and checked: a figure of a run without hits would prove nothing.

Prompts are real texts where the folder PAGEDGPT_DATA holds them (prompts/mt_bench_question.jsonl)
and the model has a tokenizer; else random tokens. The workload says which. Lengths of the part
`blocks` are exponential draws with the means of the paper's data sets, as in block_size.py. The
paper's figures (OPT-13B) are for n = 2, 4, 6 on Alpaca 6.09, 8.53, 9.79%, on ShareGPT 16.2 to
30.5%; for beams 37.56, 53.13, 55.16% and 44.3 to 66.3%. What differs here: the model, whose beams
part at other places, the prompts, and lengths that are drawn. A first block that is not full is
copied, so short prompts share nothing.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, sections 6.3 and 6.4.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beam_search import BeamSearchParams, add_beam_search
from checkpoints.load import load_model
from experiments.block_size import MEANS, draw_lengths
from experiments.block_trace import TRACE_NAME, rows_of_trace
from experiments.ceilings import Columns
from experiments.results import Measurement, device_name
from experiments.speed import model_columns, threads_for
from kernels.backends import BACKENDS, DTYPES, resolve_device, resolve_dtype
from kernels.packed_linear import pack
from llm import LLM, SHIPPED_MODEL, SamplingParams, find_tokenizer
from watch.tree import SharingMeter

PROMPTS_NAME = Path("prompts") / "mt_bench_question.jsonl"
CACHE, NO_CACHE = "prefix cache", "no prefix cache"
OWN_TOKENS = 20  # of each prompt, behind what it has in common with others
QUESTION_TOKENS = 60  # of a turn of the chat, at most
BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="default: all")
    add("--model", default=str(SHIPPED_MODEL), help="a folder, or random:gpt2")
    add("--large-model", default="random:gpt2", help="throughput: a folder, or random:gpt2")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--rounds", type=int, default=5, help="of prefix, chat, forks")
    add("--shared", type=int, nargs="+", default=[0, 100, 300, 500, 700, 900], help="prefix")
    add("--turns", type=int, default=8, help="chat")
    add("--answer", type=int, default=50, help="chat: tokens of an answer")
    add("--prompt-tokens", type=int, default=500, help="forks")
    add("--new-tokens", type=int, default=64, help="forks: of each text")
    add("--widths", type=int, nargs="+", default=[2, 4, 6], help="blocks: texts, beams")
    add("--lengths", nargs="+", choices=[*MEANS], default=[*MEANS], help="blocks: of which data")
    add("--requests", type=int, default=16, help="blocks: of each of them")
    add("--large-requests", type=int, default=32, help="throughput")
    add("--large-shared", type=int, default=500, help="throughput: tokens in common")
    add("--large-new", type=int, default=32, help="throughput: tokens of each text")
    add("--budget", type=int, default=512, help="throughput: tokens in a step, at most")
    add("--large-rounds", type=int, default=3, help="throughput")
    add("--seed", type=int, default=0, help="of prompts, lengths, texts")


# ---- prompts -------------------------------------------------------------------------------------
def data_folder() -> Path | None:
    """The folder that PAGEDGPT_DATA names, if it does."""
    name = os.environ.get("PAGEDGPT_DATA")
    return Path(name) if name else None


class Bench:
    """A model in memory, and where its prompts come from."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args = args
        self.device = resolve_device(args.device)
        self.dtype = resolve_dtype(args.dtype, self.device)
        self.name = name
        self.model = pack(load_model(name, self.dtype, self.device))
        self.generator = torch.Generator().manual_seed(args.seed)
        self.questions = self._read_questions()
        self.next_question = 0
        self.texts = "MT-Bench" if self.questions else "random"

    def _read_questions(self) -> list[list[int]]:
        """The token ids of the questions in the data folder; none without it or a tokenizer."""
        folder = data_folder()
        path = Path(self.name)
        if folder is None or not (folder / PROMPTS_NAME).is_file() or not path.exists():
            return []
        tokenizer = find_tokenizer(path, self.model.config.vocab_size)
        if tokenizer is None:
            return []
        lines = (folder / PROMPTS_NAME).read_text(encoding="utf-8").splitlines()
        return [tokenizer.encode(turn) for line in lines for turn in json.loads(line)["turns"]]

    def random_ids(self, length: int) -> list[int]:
        """So many random tokens, others each time."""
        size = self.model.config.vocab_size
        return torch.randint(size, (length,), generator=self.generator).tolist()

    def question(self) -> list[int]:
        """The next question, or random tokens in its place."""
        if not self.questions:
            return self.random_ids(QUESTION_TOKENS // 2)
        self.next_question += 1
        return self.questions[(self.next_question - 1) % len(self.questions)]

    def prompt(self, length: int) -> list[int]:
        """A prompt of exactly so many tokens: a question, others behind it, cut at its end."""
        token_ids: list[int] = []
        while len(token_ids) < length:
            token_ids += self.question()
        return token_ids[:length]

    def llm(self, **options) -> LLM:
        """An engine around the model."""
        return LLM(self.model, backend=self.args.backend, **({"block_size": BLOCK_SIZE} | options))

    def contenders(self, num_tokens: int, **options) -> dict[str, LLM]:
        """Two engines with room for so many tokens: with the prefix cache, and without."""
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        return {
            name: self.llm(num_blocks=num_blocks, enable_prefix_caching=name == CACHE, **options)
            for name in (CACHE, NO_CACHE)
        }

    def columns(self, llm: LLM) -> Columns:
        """The columns that rows of this model share."""
        columns = {"experiment": "sharing", "backend": llm.backend, "dtype": str(self.dtype)[6:]}
        columns |= {"threads": torch.get_num_threads(), "device": device_name(self.device)}
        return columns | {"seed": self.args.seed} | model_columns(self.name)


# ---- one trial -----------------------------------------------------------------------------------
class Served(NamedTuple):
    """What it took to serve requests that were all there at the start."""

    seconds: float
    first_ms: float  # until each text had its first token, on average
    texts: list[list[int]]  # token ids
    num_computed: int  # tokens that went through the model
    num_cached: int  # prompt tokens that were found
    peak_blocks: int
    num_copied: int  # blocks


def serve(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> Served:
    """Serve (prompt, params) pairs together, and read the clock after each step."""
    engine = llm.engine
    allocator = engine.scheduler.allocator
    first_ms: dict[tuple[str, int], float] = {}
    outputs = []
    num_computed = peak_blocks = num_copied = 0
    started = time.perf_counter()
    for prompt, params in requests:
        engine.add_request(prompt, params)
    while engine.has_unfinished():
        output = engine.step()
        now_ms = 1e3 * (time.perf_counter() - started)
        for delta in output.deltas:
            first_ms.setdefault((delta.request_id, delta.index), now_ms)
        outputs += output.finished
        num_computed += output.plan.num_tokens
        num_copied += output.blocks.copied
        # Nothing is preempted here, so blocks are freed only at the end of a step.
        held = allocator.num_blocks - allocator.num_free + output.blocks.freed
        peak_blocks = max(peak_blocks, held)
    seconds = time.perf_counter() - started
    assert engine.scheduler.num_preemptions == 0, "a pool that is too small"
    texts = [completion.token_ids for output in outputs for completion in output.outputs]
    num_cached = sum(output.num_cached_tokens or 0 for output in outputs)
    mean_ms = sum(first_ms.values()) / len(first_ms)
    return Served(seconds, mean_ms, texts, num_computed, num_cached, peak_blocks, num_copied)


def greedy(num_tokens: int) -> SamplingParams:
    """So many tokens, never fewer."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


Rounds = dict[str, list[Served]]  # of each contender, one a round


def rows_of_times(rounds: Rounds, columns: Columns, base: str) -> Iterator[Measurement]:
    """Of each contender the time to the first token, the ratio to `base`'s, what it computed."""
    times_ms = {name: [served.first_ms for served in each] for name, each in rounds.items()}
    for name, each in rounds.items():
        own = columns | {"contender": name}
        yield Measurement.of(times_ms[name], metric="time to first token", unit="ms", **own)
        computed = [served.num_computed for served in each]
        yield Measurement.of(computed, metric="tokens computed", unit="tokens", **own)
        cached = [served.num_cached for served in each]
        yield Measurement.of(cached, metric="tokens not recomputed", unit="tokens", **own)
        if name != base:
            against = {"metric": f"first token against {base}", "unit": "x"}
            yield Measurement.ratio_of(times_ms[base], times_ms[name], **against, **own)


# ---- a common prefix -----------------------------------------------------------------------------
def rows_of_prefix(args: argparse.Namespace) -> Iterator[Measurement]:
    """A prompt comes after another one that begins alike. Only the second one is timed."""
    bench = Bench(args, args.model)
    llms = bench.contenders(2 * (max(args.shared) + OWN_TOKENS + BLOCK_SIZE))
    for shared in args.shared:
        rounds: Rounds = {name: [] for name in llms}
        for number in range(args.rounds + 1):
            prefix = bench.random_ids(shared)
            one, two = (prefix + bench.random_ids(OWN_TOKENS) for _ in range(2))
            for name, llm in llms.items():
                serve(llm, [(one, greedy(1))])
                served = serve(llm, [(two, greedy(1))])
                # Whole blocks only: of 100 tokens in blocks of 16 it finds 96.
                found = shared // BLOCK_SIZE * BLOCK_SIZE if name == CACHE else 0
                assert served.num_cached == found, (served.num_cached, found)
                if number > 0:
                    rounds[name].append(served)
        columns = bench.columns(llm) | {"workload": f"prefix shared={shared} own={OWN_TOKENS}"}
        yield from rows_of_times(rounds, columns, NO_CACHE)


# ---- a chat --------------------------------------------------------------------------------------
def rows_of_chat(args: argparse.Namespace) -> Iterator[Measurement]:
    """Each turn sends the history, the last answer included, and a new question."""
    bench = Bench(args, args.model)
    longest = args.turns * (QUESTION_TOKENS + args.answer)
    llms = bench.contenders(longest + BLOCK_SIZE)
    turns: list[Rounds] = [{name: [] for name in llms} for _ in range(args.turns)]
    for number in range(args.rounds + 1):
        history: list[int] = []
        for rounds in turns:
            history += bench.question()[:QUESTION_TOKENS]
            for name, llm in llms.items():
                served = serve(llm, [(history, greedy(args.answer))])
                if number > 0:
                    rounds[name].append(served)
                if name == CACHE:
                    answer = served.texts[0]
            history = history + answer  # both get the same prompts
    columns = bench.columns(llm)
    for number, rounds in enumerate(turns, 1):
        workload = f"chat {bench.texts} turn={number} answer={args.answer}"
        yield from rows_of_times(rounds, columns | {"workload": workload}, NO_CACHE)
    whole = columns | {"workload": f"chat {bench.texts} turns={args.turns} answer={args.answer}"}
    for name in llms:
        shares = []
        for each in zip(*(rounds[name] for rounds in turns), strict=True):
            cached = sum(served.num_cached for served in each)
            computed = sum(served.num_computed for served in each)
            # Of each answer all tokens but the last are computed, too.
            shares.append(100 * cached / (cached + computed - args.turns * (args.answer - 1)))
        own = whole | {"contender": name, "metric": "prompt tokens not recomputed", "unit": "%"}
        yield Measurement.of(shares, **own)


# ---- four texts of one prompt --------------------------------------------------------------------
TEXTS = 4
FORKS = f"one request, n={TEXTS}"
SEPARATE = f"{TEXTS} requests"


def rows_of_forks(args: argparse.Namespace) -> Iterator[Measurement]:
    """One request that forks, or as many requests as texts, with the prefix cache and without."""
    bench = Bench(args, args.model)
    room = TEXTS * (args.prompt_tokens + args.new_tokens + BLOCK_SIZE)
    with_cache, without = bench.contenders(room).values()
    ways = {
        FORKS: (without, True),
        f"{SEPARATE}, {CACHE}": (with_cache, False),
        f"{SEPARATE}, {NO_CACHE}": (without, False),
    }
    rounds: Rounds = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        prompt = bench.prompt(args.prompt_tokens)
        for name, (llm, forks) in ways.items():
            length = {"max_tokens": args.new_tokens, "ignore_eos": True}
            if forks:
                requests = [(prompt, SamplingParams(n=TEXTS, seed=number, **length))]
            else:
                params = [SamplingParams(seed=TEXTS * number + i, **length) for i in range(TEXTS)]
                requests = [(prompt, each) for each in params]
            served = serve(llm, requests)
            assert [len(text) for text in served.texts] == [args.new_tokens] * TEXTS
            if number > 0:
                rounds[name].append(served)
    workload = f"forks {bench.texts} prompt={args.prompt_tokens} new={args.new_tokens}"
    columns = bench.columns(without) | {"workload": workload}
    base = f"{SEPARATE}, {NO_CACHE}"
    yield from rows_of_times(rounds, columns, base)
    seconds = {name: [served.seconds for served in each] for name, each in rounds.items()}
    for name, each in rounds.items():
        own = columns | {"contender": name}
        yield Measurement.of(seconds[name], metric="generation time", unit="s", **own)
        held = [served.peak_blocks for served in each]
        yield Measurement.of(held, metric="blocks held at most", unit="blocks", **own)
        copied = [served.num_copied for served in each]
        yield Measurement.of(copied, metric="blocks copied", unit="blocks", **own)
        if name != base:
            against = {"metric": f"speed against {base}", "unit": "x"}
            yield Measurement.ratio_of(seconds[base], seconds[name], **against, **own)


# ---- blocks saved --------------------------------------------------------------------------------
def rows_of_blocks(args: argparse.Namespace) -> Iterator[Measurement]:
    """Blocks saved / blocks without sharing, over all steps, for n texts and for beams."""
    bench = Bench(args, args.model)
    sizes = argparse.Namespace(**vars(args), max_seq_len=bench.model.config.max_seq_len)
    for name in args.lengths:
        pairs = draw_lengths(name, sizes)
        prompts = [(bench.prompt(prompt), new) for prompt, new in pairs]
        for width in args.widths:
            for contender, add in ADDERS.items():
                meter, llm = count_blocks(bench, prompts, width, add)
                workload = f"blocks {name} {bench.texts} requests={args.requests} width={width}"
                columns = bench.columns(llm) | {"workload": workload, "contender": contender}
                for metric, unit, value in (
                    ("blocks saved", "%", meter.percent_saved),
                    ("blocks held, all steps", "blocks", meter.num_held),
                    ("blocks without sharing, all steps", "blocks", meter.num_unshared),
                ):
                    yield Measurement.of([value], metric=metric, unit=unit, **columns)


def add_texts(llm: LLM, prompt: list[int], width: int, new_tokens: int, seed: int) -> None:
    """A request for `width` texts."""
    params = SamplingParams(n=width, seed=seed, max_tokens=new_tokens, ignore_eos=True)
    llm.engine.add_request(prompt, params)


def add_beams(llm: LLM, prompt: list[int], width: int, new_tokens: int, seed: int) -> None:
    """A search with `width` beams. It draws nothing, so it has no use for a seed."""
    add_beam_search(llm.engine, prompt, BeamSearchParams(width, new_tokens))


Adder = Callable[[LLM, list[int], int, int, int], None]  # prompt, width, new tokens, seed
ADDERS: dict[str, Adder] = {"texts": add_texts, "beams": add_beams}


def count_blocks(
    bench: Bench,
    prompts: list[tuple[list[int], int]],  # with the tokens of each text
    width: int,
    add: Adder,
) -> tuple[SharingMeter, LLM]:
    """Serve all prompts in one pool that has room for them, and count its blocks in each step."""
    num_blocks = sum(width * -(-(len(p) + new + 1) // BLOCK_SIZE) for p, new in prompts)
    llm = bench.llm(
        num_blocks=num_blocks, max_num_seqs=width * len(prompts), enable_prefix_caching=False
    )
    meter = SharingMeter(llm.engine.scheduler)
    llm.engine.watchers.append(meter)
    for number, (prompt, new_tokens) in enumerate(prompts):
        add(llm, prompt, width, new_tokens, number)
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert llm.engine.scheduler.num_preemptions == 0, "a pool that is too small"
    return meter, llm


# ---- throughput ----------------------------------------------------------------------------------
def rows_of_throughput(args: argparse.Namespace) -> Iterator[Measurement]:
    """Requests with a common prefix, all there at once, on the large model."""
    bench = Bench(args, args.large_model)
    N, new = args.large_requests, args.large_new
    length = args.large_shared + OWN_TOKENS + new
    llms = bench.contenders(N * (length + BLOCK_SIZE), max_num_batched_tokens=args.budget)
    rounds: Rounds = {name: [] for name in llms}
    for number in range(args.large_rounds + 1):
        prefix = bench.random_ids(args.large_shared)
        prompts = [prefix + bench.random_ids(OWN_TOKENS) for _ in range(N)]
        if number == 0:
            prompts = prompts[:2]  # enough to warm up
        for name, llm in llms.items():
            served = serve(llm, [(prompt, greedy(new)) for prompt in prompts])
            found = args.large_shared // BLOCK_SIZE * BLOCK_SIZE if name == CACHE else 0
            assert served.num_cached == (len(prompts) - 1) * found
            if number > 0:
                rounds[name].append(served)
    sizes = f"requests={N} shared={args.large_shared} own={OWN_TOKENS} new={new}"
    columns = bench.columns(llm) | {"workload": f"throughput {sizes} budget={args.budget}"}
    seconds = {name: [served.seconds for served in each] for name, each in rounds.items()}
    for name, each in rounds.items():
        rates = [N * new / taken for taken in seconds[name]]
        own = columns | {"contender": name}
        yield Measurement.of(rates, metric="generated tokens", unit="tokens/s", **own)
        held = [served.peak_blocks for served in each]
        yield Measurement.of(held, metric="blocks held at most", unit="blocks", **own)
        if name == CACHE:
            against = {"metric": f"throughput against {NO_CACHE}", "unit": "x"}
            yield Measurement.ratio_of(seconds[NO_CACHE], seconds[name], **against, **own)
    yield from rows_of_times(rounds, columns, NO_CACHE)


# ---- all parts -----------------------------------------------------------------------------------
def rows_of_block_trace(args: argparse.Namespace) -> Iterator[Measurement]:
    """The recorded trace, if there is one."""
    folder = data_folder()
    if folder is None or not (folder / TRACE_NAME).is_file():
        print(f"the part trace is skipped: PAGEDGPT_DATA names no folder with {TRACE_NAME}")
        return
    yield from rows_of_trace(folder / TRACE_NAME)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Measurement]]] = {
    "prefix": rows_of_prefix,
    "chat": rows_of_chat,
    "forks": rows_of_forks,
    "blocks": rows_of_blocks,
    "throughput": rows_of_throughput,
    "trace": rows_of_block_trace,
}


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that is too small."""
    minima = {"rounds": 1, "large_rounds": 1, "turns": 1, "answer": 1, "new_tokens": 1}
    minima |= {"prompt_tokens": 1, "requests": 1, "large_requests": 1, "large_new": 1, "budget": 1}
    for name, minimum in minima.items():
        if getattr(args, name) < minimum:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(args, name)}: it must be at least {minimum}")
    if min(args.shared) < 0 or min(args.widths) < 1:
        raise ValueError("--shared must be at least 0, and --widths at least 1")


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    check(args)
    for part in dict.fromkeys(args.parts):
        model = args.large_model if part == "throughput" else args.model
        with threads(threads_for(model, args.threads)):
            yield from PARTS[part](args)


@contextmanager
def threads(number: int) -> Iterator[Any]:
    """So many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
