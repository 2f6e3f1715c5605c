"""Which tile is fastest here: tokens a tile, warps, buffers and chunks of the decode kernel.

A tile holds 32 to 128 tokens of one head; more of it in flight hides the memory's latency, and less
leaves room for more programs beside it. Which of the two wins is for the machine to say, not for a
table by name of device. The kernel asks one small function for its tiles, and that is what is
replaced here, a variant at a time; one that does not fit into the GPU is left out and named.

Run: python -m experiments.sweep                (on a GPU)
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch

from experiments.ceilings import best_reader, in_turn, resolve, timer, warm_up
from experiments.kernels import num_calls, parse_shape
from experiments.results import Measurement, device_name, run_alone
from experiments.rungs import Setting, World
from kernels import triton_decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="cpu: interpreted")
    add("--shapes", nargs="+", default=["1x1024", "64x512", "256x512"], help="sequences x context")
    add("--dtype", default="bfloat16", help="of the pool")
    add("--tiles", type=int, nargs="+", default=[32, 64, 128], help="tokens a tile")
    add("--warps", type=int, nargs="+", default=[4, 8], help="32 threads each, of a program")
    add("--stages", type=int, nargs="+", default=[3, 5], help="loads under way, tables included")
    add("--chunks", type=int, nargs="+", default=[0, 256], help="tokens a chunk; 0: no chunks")
    add("--block-size", type=int, default=16, help="tokens a block")
    add("--heads", type=int, default=12, help="of K, V and the queries")
    add("--head-dim", type=int, default=64, help="numbers a head")
    add("--layers", type=int, default=12, help="taken in turn")
    add("--pool-mb", type=int, default=512, help="K and V to cycle through at least")
    add("--read-mb", type=int, help="buffer of the plain read; default 8192")
    add("--repeats", type=int, default=5, help="rounds; each times every variant once")
    add("--seed", type=int, default=0, help="of the numbers and the tables")


def prepare(world: World, variant: dict[str, int], chunk_len: int) -> Callable[[], float] | None:
    """A timer of the kernel with these tiles, or None where the GPU refuses them."""
    decode = partial(triton_decode.paged_decode_triton, chunk_len=chunk_len)
    call = partial(world.paged, decode)
    tiles = mock.patch.object(triton_decode, "decode_tiles", lambda *_: variant)
    with tiles:  # only while it is recorded: a replay asks for nothing
        try:
            world.check("the kernel", call)
            return timer(call, num_calls(call, world), world.setting.device)
        except ValueError:
            raise  # it ran, and its result is wrong
        except Exception as error:  # triton's own classes differ between its versions
            print(f"{variant} left out: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
            return None


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    device = resolve(args.device)
    if device.type == "cpu" and not triton_decode.INTERPRETED:
        raise ValueError("there is no GPU here, and tiles are a GPU's")
    warm_up(device)
    reader = best_reader(device, args.read_mb)
    common = {"experiment": "sweep", "backend": "triton", "dtype": args.dtype, "seed": args.seed}
    common |= {"device": device_name(device), "threads": torch.get_num_threads()}
    for B, T in map(parse_shape, args.shapes):
        sizes = {"H": args.heads, "D": args.head_dim, "num_layers": args.layers}
        sizes |= {"dtype": getattr(torch, args.dtype), "device": device, "seed": args.seed}
        setting = Setting(B, T, num_queries=1, block_size=args.block_size, **sizes)
        world = World(setting, args.pool_mb << 20, slabs=False)
        timers = {"read": reader.measure}
        grid = itertools.product(args.tiles, args.warps, args.stages, args.chunks)
        for tile, warps, stages, chunk_len in grid:
            variant = {"TILE_K": tile, "num_warps": warps, "num_stages": stages}
            if measure := prepare(world, variant, chunk_len):
                name = f"tile={tile} warps={warps} stages={stages} chunk={chunk_len}"
                timers[name] = measure
        times_ms = in_turn(timers, args.repeats)
        reads = [reader.num_bytes / t / 1e6 for t in times_ms.pop("read")]
        for name, times in times_ms.items():
            what = {"contender": name, "workload": setting.workload} | common
            yield Measurement.of(times, metric="time a call", unit="ms", **what)
            rates = [setting.kv_bytes / t / 1e6 for t in times]
            share = {"metric": "share of the read", "unit": "%"}
            yield Measurement.ratio_of(rates, reads, scale=100, **share, **what)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
