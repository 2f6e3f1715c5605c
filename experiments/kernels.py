"""The kernel ladder: decode attention from gathering to reading in place, against a slab.

Each rung does the same attention over the same bytes, the K and V of all sequences, each read once:

    gather, then dense       copy the blocks into one piece, then the library's kernel
    block by block           paged_attention.py, in PyTorch
    (sequence, head)         one plain program for each, nothing gathered
    tiles / whole blocks     a GPU takes tiles over several blocks; a CPU a block with all its heads
    chunks and merge         several programs for one context, on a GPU; the CPU's kernel cuts its
                             work into equal parts itself, so there the rung before is the last
    contiguous               the library's kernel on slabs: what a cache without blocks would do

The blocks are shuffled over a pool with all layers and as many sequences as it takes to exceed the
caches, and the slabs are as many: a step of a model comes back to a layer after all others. The
contenders run strictly in turn. A rung whose result differs from the oracle's fails the run before
anything is timed. Beside milliseconds stand GB/s (bytes of K and V that must be read / time), the
share of a plain read's bandwidth, measured in the same rounds, and the speed against the slab.

Then the same for prompts, and the writing of their K and V; on a GPU a straight line through five
sizes, time = t0 + bytes / bandwidth, says what a launch costs and what a byte.
Run: python -m experiments.kernels
     python -m experiments.kernels --shapes 32x256 --dtypes float32 --only whole contiguous
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from experiments.ceilings import (
    Reader,
    best_reader,
    in_turn,
    resolve,
    set_threads,
    timer,
    warm_up,
)
from experiments.results import Measurement, device_name, run_alone
from experiments.rungs import (
    BEST,
    CONTIGUOUS,
    Rungs,
    Setting,
    World,
    decode_rungs,
    gather_only,
    prefill_rungs,
    writers,
)

CPU_SHAPES, GPU_SHAPES = ["8x256", "32x256", "32x1000"], ["1x1024", "8x512", "64x512", "64x1024"]
GPU_SHAPES.append("256x512")
FIT_SHAPES = ["32x512", "64x512", "64x1024", "256x512", "256x1024"]  # 50 to 805 MB in 16 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--shapes", nargs="*", help="decode: sequences x context, 32x256; none: skip")
    add("--prefill", nargs="*", help="prompts: sequences x tokens; none: skip; default by device")
    add("--fit", nargs="*", help="sizes for t0 + bytes / bandwidth; default: five on a GPU")
    add("--dtypes", nargs="+", help="default: float32 bfloat16, on a GPU bfloat16")
    add("--block-sizes", type=int, nargs="+", default=[16], help="tokens a block")
    add("--heads", type=int, default=12, help="of K, V and the queries; GPT-2's 12")
    add("--head-dim", type=int, default=64, help="numbers a head")
    add("--layers", type=int, default=12, help="taken in turn, so that none stays in a cache")
    add("--pool-mb", type=int, help="K and V to cycle through at least; default 1024, GPU 512")
    add("--read-mb", type=int, help="buffer of the plain read; default 1024, on a GPU 8192")
    add("--chunk-len", type=int, default=256, help="tokens a chunk, of chunks and merge")
    add("--only", nargs="+", default=[""], help="contenders whose name has one of these words")
    add("--threads", type=int, nargs="+", help="of the CPU; default: 1 and all")
    add("--repeats", type=int, default=7, help="rounds; each times every contender once")
    add("--seed", type=int, default=0, help="of the numbers and the tables")


# ---- measuring -----------------------------------------------------------------------------------
def num_calls(call: Callable[[int], Tensor], world: World) -> int:
    """Calls in a round: on a CPU each place once, on a GPU the layers ten times over.

    A rung that needs more than a second for that (on a GPU a recording of many thousand nodes)
    makes fewer, at least 2: it is far above any noise.
    """
    device = world.setting.device
    on_gpu = device.type == "cuda"
    most = 10 * world.setting.num_layers if on_gpu else len(world.places)

    def finished(i: int) -> None:
        call(i)
        if on_gpu:
            torch.cuda.synchronize()

    once_ms = timer(finished, 1, torch.device("cpu"))()
    return max(2, min(most, int((100 if on_gpu else 1000) / max(once_ms, 1e-3))))


def wanted(name: str, args: argparse.Namespace) -> bool:
    """Whether the flag --only keeps a contender; what others are compared with always stays."""
    return name == CONTIGUOUS or any(word in name for word in args.only)


def time_attention(
    setting: Setting, rungs: Rungs, reader: Reader, args: argparse.Namespace, common: dict
) -> Iterator[Measurement]:
    """All rows of one workload: each rung checked, then all of them and a plain read in turn."""
    world = World(setting, pool_bytes(args, setting.device))
    rungs = {name: rung for name, rung in rungs.items() if wanted(name, args)}
    calls = {name: partial(call, world) for name, (_, call) in rungs.items()}
    for name, call in calls.items():
        world.check(name, call)
    decode = setting.num_queries == 1
    if decode and "gather, then dense" in calls:
        calls["gather alone"] = partial(gather_only, world)
    device = setting.device
    timers = {name: timer(c, num_calls(c, world), device) for name, c in calls.items()}
    timers["read"] = reader.measure
    times_ms = in_turn(timers, args.repeats)
    reads = [reader.num_bytes / t / 1e6 for t in times_ms.pop("read")]
    what = {"workload": setting.workload, "dtype": str(setting.dtype)[6:]} | common
    if decode:
        plain = {"contender": reader.name, "metric": "bandwidth", "backend": reader.backend}
        yield Measurement.of(reads, unit="GB/s", **plain, **what)
    for name, times in times_ms.items():
        what |= {"contender": name, "backend": rungs.get(name, ("torch",))[0]}
        yield Measurement.of(times, metric="time a call", unit="ms", **what)
        if not decode:
            # Two products of T x T / 2 scores and D numbers a head, two operations each.
            operations = 2 * setting.B * setting.H * setting.T**2 * setting.D
            rates = [operations / t / 1e9 for t in times]
            yield Measurement.of(rates, metric="operations", unit="TFLOP/s", **what)
        else:
            rates = [setting.kv_bytes / t / 1e6 for t in times]
            yield Measurement.of(rates, metric="KV bandwidth", unit="GB/s", **what)
            share = {"metric": "share of the read", "unit": "%"}
            yield Measurement.ratio_of(rates, reads, scale=100, **share, **what)
        if name not in (CONTIGUOUS, "gather alone"):
            against = {"metric": "speed against contiguous", "unit": "x"}
            yield Measurement.ratio_of(times_ms[CONTIGUOUS], times, **against, **what)


def time_write(setting: Setting, args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Rows of the scatter: all tokens' K and V into shuffled slots, bytes written a second."""
    world = World(setting, pool_bytes(args, setting.device), slabs=False)
    s, found = setting, writers(setting.device)
    position = torch.arange(s.T, device=s.device)
    slots = [
        (table[:, position // s.block_size].long() * s.block_size + position % s.block_size)
        for table in world.tables
    ]
    slots = [x.flatten() for x in slots]

    def write(function: Callable, i: int) -> Tensor:
        k_cache, v_cache, _ = world.caches(i)
        slot_mapping = slots[world.places[i % len(world.places)][1]]
        function(world.k, world.v, k_cache, v_cache, slot_mapping)
        return k_cache

    calls = {name: partial(write, f) for name, (_, f) in found.items() if wanted(name, args)}
    for name, call in calls.items():
        world.pool.zero_()
        call(0)
        k_cache, v_cache, _ = world.caches(0)
        got = [c.transpose(1, 2).flatten(0, 1)[slots[0]] for c in (k_cache, v_cache)]
        if not (torch.equal(got[0], world.k) and torch.equal(got[1], world.v)):
            raise ValueError(f"{name} does not write what it is given, {setting.workload}")
    timers = {n: timer(c, num_calls(c, world), s.device) for n, c in calls.items()}
    what = {"workload": f"write {s.workload}", "dtype": str(s.dtype)[6:]} | common
    for name, times in in_turn(timers, args.repeats).items():
        what |= {"contender": name, "backend": found[name][0]}
        rates = [s.kv_bytes / t / 1e6 for t in times]
        yield Measurement.of(times, metric="time a call", unit="ms", **what)
        yield Measurement.of(rates, metric="scatter bandwidth", unit="GB/s", **what)


def fit_line(num_bytes: list[int], times_ms: list[float]) -> tuple[float, float]:
    """Least squares of time = t0 + bytes / bandwidth: t0 in microseconds, bandwidth in GB/s.

    100 MB in 0.11 ms and 300 MB in 0.31 ms are 10 us and 1000 GB/s.
    """
    mean_bytes, mean_ms = statistics.mean(num_bytes), statistics.mean(times_ms)
    products = [(b - mean_bytes) * (t - mean_ms) for b, t in zip(num_bytes, times_ms, strict=True)]
    ms_per_byte = sum(products) / sum((b - mean_bytes) ** 2 for b in num_bytes)
    return (mean_ms - ms_per_byte * mean_bytes) * 1e3, 1e-6 / ms_per_byte


def time_fit(
    settings: list[Setting], rungs: Rungs, reader: Reader, args: argparse.Namespace, common: dict
) -> Iterator[Measurement]:
    """Rows of t0 and bandwidth of the kernel that the engine uses, one line through all sizes."""
    if len(settings) < 2:
        return
    device, times_ms = settings[0].device, []
    name = BEST[device.type]
    for setting in settings:  # one after the other: together they would not fit into memory
        world = World(setting, pool_bytes(args, device), slabs=False)
        call = partial(rungs[name][1], world)
        world.check(name, call)
        timers = {"rung": timer(call, num_calls(call, world), device), "read": reader.measure}
        rounds = in_turn(timers, args.repeats)
        times_ms.append(rounds["rung"])
    reads = [reader.num_bytes / t / 1e6 for t in rounds["read"]]
    sizes = [setting.kv_bytes for setting in settings]
    lines = [fit_line(sizes, list(times)) for times in zip(*times_ms, strict=True)]
    shapes = ",".join(f"{s.B}x{s.T}" for s in settings)
    workload = f"t0 + bytes / bandwidth over {shapes} block_size={settings[0].block_size}"
    what = {"contender": name, "workload": workload, "backend": rungs[name][0]}
    what |= {"dtype": str(settings[0].dtype)[6:]} | common
    yield Measurement.of([t0 for t0, _ in lines], metric="t0", unit="us", **what)
    slopes = [bandwidth for _, bandwidth in lines]
    yield Measurement.of(slopes, metric="bandwidth", unit="GB/s", **what)
    share = {"metric": "share of the read", "unit": "%"}
    yield Measurement.ratio_of(slopes, reads, scale=100, **share, **what)


# ---- the experiment ------------------------------------------------------------------------------
def pool_bytes(args: argparse.Namespace, device: torch.device) -> int:
    """How much K and V to cycle through: more than the caches (L3 of a server: 260 MB) hold."""
    return (args.pool_mb or (512 if device.type == "cuda" else 1024)) << 20


def parse_shape(text: str) -> tuple[int, int]:
    """ "32x256" -> (32, 256). Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape: write sequences x tokens, as in 32x256")
    return int(parts[0]), int(parts[1])


def settings_of(args: argparse.Namespace, device: torch.device, shapes: list, decode: bool):
    """All workloads of some shapes, as (dtype, block size) ask for them."""
    on_gpu = device.type == "cuda"
    for dtype in args.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"]):
        for block_size in args.block_sizes:
            yield [
                Setting(
                    B,
                    T,
                    num_queries=1 if decode else T,
                    block_size=block_size,
                    dtype=getattr(torch, dtype),
                    device=device,
                    H=args.heads,
                    D=args.head_dim,
                    num_layers=args.layers,
                    seed=args.seed,
                )
                for B, T in map(parse_shape, shapes)
            ]


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    device = resolve(args.device)
    on_gpu = device.type == "cuda"

    def chosen(given: list[str] | None, on_a_cpu: list[str], on_a_gpu: list[str]) -> list[str]:
        return given if given is not None else on_a_gpu if on_gpu else on_a_cpu

    shapes = chosen(args.shapes, CPU_SHAPES, GPU_SHAPES)
    prompts = chosen(args.prefill, ["8x256"], ["16x512"])
    fits = chosen(args.fit, [], FIT_SHAPES)
    before = torch.get_num_threads()
    common = {"experiment": "kernels", "device": device_name(device), "seed": args.seed}
    decode, prefill = decode_rungs(device, args.chunk_len), prefill_rungs(device)
    warm_up(device)
    try:
        for threads in args.threads or ([before] if on_gpu else sorted({1, before})):
            set_threads(threads)
            common |= {"threads": threads}
            reader = best_reader(device, args.read_mb)
            for settings in settings_of(args, device, shapes, decode=True):
                for setting in settings:
                    yield from time_attention(setting, decode, reader, args, common)
            for settings in settings_of(args, device, prompts, decode=False):
                for setting in settings:
                    yield from time_attention(setting, prefill, reader, args, common)
                    yield from time_write(setting, args, common)
            for settings in settings_of(args, device, fits, decode=True):
                yield from time_fit(settings, decode, reader, args, common)
    finally:
        set_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
