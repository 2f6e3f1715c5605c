"""transformers' own loop with four caches: DynamicCache, StaticCache, and PagedCache in two modes.

The model, the tokens and the logits are the same: a forward of transformers' GPT-2, and an arg max.
Only the cache and its attention differ:

    DynamicCache        each step copies K and V of all tokens into a longer tensor
    StaticCache         just long enough for the whole text; each step reads its whole length
    PagedCache, paged   attention reads the blocks where they lie (attn_implementation="paged")
    PagedCache, gather  the blocks are copied into one tensor for the model's own attention

    decode    B texts of `--context` tokens: the time of a step. K and V of the texts are random
              numbers, the same in all caches, because a step takes as long with any numbers
    prefill   the time of B prompts in one step
    memory    the bytes of K and V that each cache holds while texts grow, for texts of different
              lengths in one batch, and in a beam search. No time is taken

Contenders take turns in one process (A B C D A B C D), and a round before them warms up. Before
anything is timed, all four must give the same logits for one step (peers.py has the bounds), and
the counts of PagedCache must say that the mode's attention ran in each layer.

PagedCache wins where there are many tokens to copy. With one text of 256 tokens the weights are
most of what a step reads, and the four caches differ little. A padded batch holds its padding in
every cache: the rows "one cache a text" say what texts of different lengths take without it.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import load_model, weights_kind
from experiments import transformers_engines
from experiments.ceilings import Columns, resolve, set_threads
from experiments.peers import logits_bound, random_ids, time_ms
from experiments.results import Measurement, device_name, percentile
from kernels.backends import BACKENDS, DTYPES
from llm import SHIPPED_MODEL

DYNAMIC, STATIC = "DynamicCache", "StaticCache"
PAGED, GATHER = "PagedCache, paged", "PagedCache, gather"
CACHES = (DYNAMIC, STATIC, PAGED, GATHER)
ALONE = "PagedCache, one cache a text"
OWN = "the tokens' own"
PARTS = ("decode", "prefill", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="default: all")
    add("--model", default="random:gpt2", help="a folder, or random:gpt2 (its speed is GPT-2's)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=[*DTYPES], help="in turn")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="PagedCache's kernels")
    add("--threads", type=int, nargs="+", help="of the CPU, one run each; default: all")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], help="decode: texts")
    add("--context", type=int, default=256, help="tokens of each text before the first step")
    add("--steps", type=int, default=8, help="decode: steps timed in a round")
    add("--rounds", type=int, default=5, help="of decode and of prefill")
    add("--prompts", type=int, default=8, help="prefill: prompts of --context tokens")
    add("--block-size", type=int, default=16, help="tokens in a block of PagedCache")
    add("--grow", type=int, nargs="+", default=[1, *range(64, 1025, 64)], help="memory: tokens")
    add("--texts", type=int, default=8, help="memory: texts that grow, or differ in length")
    add("--beams", type=int, default=4, help="memory: beams, of the shipped model")
    add("--beam-tokens", type=int, default=64, help="memory: tokens of each beam")
    add("--seed", type=int, default=0, help="of tokens, K, V and lengths")


# ---- the contenders ------------------------------------------------------------------------------
def make_cache(name: str, model: Any, batch: int, length: int, args: argparse.Namespace) -> Any:
    """An empty cache with room for `batch` texts of `length` tokens; the model attends its way."""
    from transformers import DynamicCache, StaticCache

    from serving.hf_paged_cache import PagedCache

    model.set_attn_implementation("paged" if name == PAGED else "sdpa")
    if name == DYNAMIC:
        return DynamicCache(config=model.config)
    if name == STATIC:
        return StaticCache(config=model.config, max_cache_len=length)
    num_blocks = batch * -(-length // args.block_size)
    return PagedCache.for_model(model, num_blocks, args.block_size, args.backend)


def bytes_held(cache: Any) -> int:
    """The bytes of K and V that a cache holds. A block that is shared counts once."""
    if hasattr(cache, "bytes_held"):
        return cache.bytes_held
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def random_kv(model: Any, batch: int, num_tokens: int, args: argparse.Namespace) -> list[Tensor]:
    """K and V of each layer in one tensor (2, batch, H, num_tokens, D)."""
    c = model.config
    sizes = 2, batch, c.n_head, num_tokens, c.n_embd // c.n_head
    generator = torch.Generator().manual_seed(args.seed)
    numbers = torch.randn(sizes, generator=generator).to(model.dtype).to(model.device)
    return [numbers.roll(layer, 3) for layer in range(c.n_layer)]  # no layer is like another


class Loop:
    """The loop around the model over one kind of cache: `fill` or `prefill`, `step`, .., `end`."""

    def __init__(self, name: str, model: Any, batch: int, length: int, args: argparse.Namespace):
        self.name, self.model = name, model
        self.sizes = batch, length, args
        self.num_forwards = 0

    def begin(self) -> None:
        """Make an empty cache."""
        self.cache = make_cache(self.name, self.model, *self.sizes)
        self.num_forwards = 0

    def fill(self, layers: list[Tensor], ids: Tensor) -> None:
        """Begin with these K and V (2, B, H, T, D) of each layer; `ids` (B, 1) come next."""
        self.begin()
        for layer, (k, v) in enumerate(layers):
            self.cache.update(k, v, layer)
        self.ids = ids

    def forward(self) -> Tensor:
        """Logits (B, V) after `ids`."""
        self.num_forwards += 1
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(self.ids, **options).logits[:, -1]

    def step(self) -> None:
        """One more token for each text."""
        self.ids = self.forward().argmax(-1, keepdim=True)

    def prefill(self, prompts: Tensor) -> None:
        """The first token after each of the prompts (B, T)."""
        self.ids = prompts
        self.step()

    def end(self) -> int:
        """Drop the cache; the bytes that it held. PagedCache must have run in its mode."""
        num_bytes = bytes_held(self.cache)
        if self.name in (PAGED, GATHER):
            mode = self.name.removeprefix("PagedCache, ")
            calls = self.cache.counts[mode]
            assert calls >= self.num_forwards * self.model.config.n_layer, self.cache.counts
            assert mode == "gather" or self.cache.counts["gather"] == 0, self.cache.counts
            self.cache.release()
        del self.cache
        return num_bytes


@torch.inference_mode()
def check_equal_work(loops: dict[str, Loop], layers: list[Tensor], ids: Tensor) -> None:
    """Raise ValueError unless all contenders give the same logits for one step."""
    found = {}
    for name, loop in loops.items():
        loop.fill(layers, ids)
        found[name] = loop.forward().double()
        loop.end()
    expected = found[DYNAMIC]
    bound = logits_bound(expected.abs().max().item(), layers[0].dtype.itemsize)
    for name, logits in found.items():
        error = (logits - expected).abs().max()
        if not error <= bound:  # true for NaN as well
            raise ValueError(f"{name}: logits differ by {error:.1e}, {bound:.1e} is allowed")


# ---- decode and prefill --------------------------------------------------------------------------
Rounds = dict[str, list[list[float]]]  # contender -> for each round its times in milliseconds


def rows_of_times(rounds: Rounds, columns: Columns, backend: str) -> Iterator[Measurement]:
    """The times of each contender, and what they are against DynamicCache's."""
    medians = {name: list(map(statistics.median, each)) for name, each in rounds.items()}
    late = {name: [percentile(ms, 99) for ms in each] for name, each in rounds.items()}
    for name, each in rounds.items():
        own = columns | {"contender": name, "backend": backend if name == PAGED else "torch"}
        yield Measurement.of([x for ms in each for x in ms], metric="time a step", unit="ms", **own)
        if name == DYNAMIC:
            continue
        for metric, of in (("time a step", medians), ("p99 of a step", late)):
            against = {"metric": f"{metric} against {DYNAMIC}", "unit": "x"}
            yield Measurement.ratio_of(of[name], of[DYNAMIC], **against, **own)


def decode(
    model: Any, batch: int, args: argparse.Namespace, columns: Columns
) -> Iterator[Measurement]:
    """Rows of the steps of `batch` texts, and of the bytes that the caches hold at their end."""
    length = args.context + args.steps
    loops = {name: Loop(name, model, batch, length, args) for name in CACHES}
    layers = random_kv(model, batch, args.context, args)
    ids = torch.full((batch, 1), 1, device=model.device)
    check_equal_work(loops, layers, ids)
    rounds: Rounds = {name: [] for name in loops}
    held: dict[str, int] = {}
    for number in range(args.rounds + 1):
        for name, loop in loops.items():
            time_ms(lambda loop=loop: loop.fill(layers, ids), model.device)
            steps_ms = [time_ms(loop.step, model.device) for _ in range(args.steps)]
            backend = getattr(loop.cache, "backend", "torch")
            held[name] = loop.end()
            if number > 0:
                rounds[name].append(steps_ms)
    context = f"context={args.context}..{length}"
    columns = columns | {"workload": f"decode batch={batch} {context} block_size={args.block_size}"}
    yield from rows_of_times(rounds, columns, backend)
    own_bytes = batch * length * bytes_per_token(model)
    for name, num_bytes in held.items():
        where = {"contender": name, "backend": "none"}
        yield Measurement.of([num_bytes], metric="KV memory", unit="bytes", **columns | where)
        against = {"metric": f"KV memory against {OWN}", "unit": "x"}
        yield Measurement.of([num_bytes / own_bytes], **against, **columns | where)


def prefill(model: Any, args: argparse.Namespace, columns: Columns) -> Iterator[Measurement]:
    """Rows of one step that computes prompts."""
    loops = {name: Loop(name, model, args.prompts, args.context, args) for name in CACHES}
    generator = torch.Generator().manual_seed(args.seed)
    sizes = model.config.vocab_size, (args.prompts, args.context)
    prompts = torch.randint(*sizes, generator=generator).to(model.device)
    rounds: Rounds = {name: [] for name in loops}
    for number in range(args.rounds + 1):
        for name, loop in loops.items():
            loop.begin()
            taken_ms = time_ms(lambda loop=loop: loop.prefill(prompts), model.device)
            backend = getattr(loop.cache, "backend", "torch")
            loop.end()
            if number > 0:
                rounds[name].append([taken_ms])
    sizes = f"batch={args.prompts} prompt={args.context} block_size={args.block_size}"
    yield from rows_of_times(rounds, columns | {"workload": f"prefill {sizes}"}, backend)


def bytes_per_token(model: Any) -> int:
    """K and V of one token in all layers."""
    return 2 * model.config.n_layer * model.config.n_embd * model.dtype.itemsize


# ---- memory --------------------------------------------------------------------------------------
def memory_row(name: str, workload: str, num_bytes: float, columns: Columns) -> Measurement:
    """The row of what a contender holds."""
    where = {"contender": name, "workload": workload, "backend": "none"}
    return Measurement.of([num_bytes], metric="KV memory", unit="bytes", **columns | where)


def held_by(name: str, model: Any, batch: int, num_tokens: int, room: int, args: Any) -> int:
    """Bytes of a cache after `batch` texts of `num_tokens`; a StaticCache has `room` for each."""
    cache = make_cache(name, model, batch, room, args)
    for layer, (k, v) in enumerate(random_kv(model, batch, num_tokens, args)):
        cache.update(k, v, layer)
    num_bytes = bytes_held(cache)
    if hasattr(cache, "release"):
        cache.release()
    return num_bytes


def growing(model: Any, args: argparse.Namespace, columns: Columns) -> Iterator[Measurement]:
    """What is held while texts of equal length grow."""
    room = max(args.grow)
    for num_tokens in args.grow:
        workload = f"grow tokens={num_tokens} batch={args.texts} block_size={args.block_size}"
        for name in (DYNAMIC, STATIC, PAGED):
            num_bytes = held_by(name, model, args.texts, num_tokens, room, args)
            yield memory_row(name, workload, num_bytes, columns)


def different(model: Any, args: argparse.Namespace, columns: Columns) -> Iterator[Measurement]:
    """What texts of different lengths hold: padded to the longest, or each in a cache of its own.

    The lengths are even from an eighth of the longest to the longest: 8 texts, 128 to 1,024.
    """
    longest = max(args.grow)
    lengths = [longest * (i + 1) // args.texts for i in range(args.texts)]
    workload = f"ragged batch={args.texts} tokens={lengths[0]}..{longest}"
    workload += f" block_size={args.block_size}"
    held = {
        name: held_by(name, model, args.texts, longest, longest, args)
        for name in (DYNAMIC, STATIC, PAGED)
    }
    held[ALONE] = sum(held_by(PAGED, model, 1, n, longest, args) for n in lengths)
    held[OWN] = sum(lengths) * bytes_per_token(model)
    for name, num_bytes in held.items():
        yield memory_row(name, workload, num_bytes, columns)


def search(name: str, model: Any, prompt: Tensor, args: argparse.Namespace) -> tuple[Any, list]:
    """The texts of a beam search, and the bytes that the cache held after each token."""
    cache = make_cache(name, model, args.beams, args.context + args.beam_tokens, args)
    held: list[int] = []

    def watch(ids: Tensor, scores: Any) -> Tensor:
        held.append(bytes_held(cache))
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"num_beams": args.beams, "do_sample": False, "stopping_criteria": [watch]}
    options |= {"max_new_tokens": args.beam_tokens, "eos_token_id": -1, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompt), "past_key_values": cache}
    return model.generate(prompt, **options).tolist(), held


def beams(args: argparse.Namespace, columns: Columns) -> Iterator[Measurement]:
    """What a beam search of the shipped model holds after each of its tokens."""
    gpt = load_model(str(SHIPPED_MODEL), torch.float32, "cpu")
    model = transformers_engines.as_transformers(gpt)
    prompt = random_ids(gpt, 1, args.context, args.seed)
    columns = columns | {"model": SHIPPED_MODEL.name, "weights": weights_kind(str(SHIPPED_MODEL))}
    columns |= {"dtype": "float32", "device": device_name("cpu")}
    sizes = f"beams={args.beams} prompt={args.context} block_size={args.block_size}"
    texts = {}
    for name in (DYNAMIC, PAGED):
        texts[name], held = search(name, model, prompt, args)
        for number, num_bytes in enumerate(held, 1):
            yield memory_row(name, f"beams step={number} {sizes}", num_bytes, columns)
    assert texts[DYNAMIC] == texts[PAGED], "the beams wrote other texts"


# ---- all parts -----------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows. Raises ValueError if transformers is missing or the model has too few positions."""
    transformers_engines.require_transformers()
    device = resolve(args.device)
    threads_before = torch.get_num_threads()
    common = {"experiment": "hf", "device": device_name(device), "seed": args.seed}
    common |= {"model": args.model, "weights": weights_kind(args.model)}
    for number, dtype in enumerate(args.dtypes):
        gpt = load_model(args.model, DTYPES[dtype], device)
        if args.context + args.steps > gpt.config.max_seq_len:
            sizes = f"{args.context} tokens and {args.steps} steps"
            raise ValueError(f"{sizes}: the model has {gpt.config.max_seq_len} positions")
        model = transformers_engines.as_transformers(gpt)
        del gpt
        columns = common | {"dtype": dtype, "threads": torch.get_num_threads()}
        if "memory" in args.parts and number == 0:
            yield from growing(model, args, columns)
            yield from different(model, args, columns)
            yield from beams(args, columns)
        try:
            for threads in args.threads or [threads_before]:
                set_threads(threads)
                columns = common | {"dtype": dtype, "threads": threads}
                if "decode" in args.parts:
                    for batch in args.batches:
                        yield from decode(model, batch, args, columns)
                if "prefill" in args.parts:
                    yield from prefill(model, args, columns)
        finally:
            set_threads(threads_before)
