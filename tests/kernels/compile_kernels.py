"""Compile the Triton kernels for three GPUs on a machine without a GPU, and report what they use.

Triton needs a GPU to run a kernel but not to compile it: `NoGPU` takes the place of its driver and
names the target. The functions that launch the kernels are called with tensors on the device
"meta", which have shapes and strides but no memory, and each launch is replaced by a compilation.

The compiler rejects programs that the interpreter runs: a `break`, a shape that is not a power of
two, a variable whose type changes in a loop. The binary also says how many registers a kernel uses,
how many bytes it spills to the stack, and how much shared memory it needs.

Run: PYTHONPATH=. python tests/kernels/compile_kernels.py [--all] [--json]
Try: --kernels prefill --head-sizes 256 --prefill-tiles 64 64 4 3, a tile that is too large
It prints one line for each kernel and exits with 1 if one of them is over a limit.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

# Bytes of shared memory that one program may have. sm_80 is an A100, sm_90 an H100 or H200, and
# sm_100 a B200.
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
# The instructions of tensor cores: those of an A100, of an H100 for 64 rows or more, and of a B200.
PRODUCTS = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
# Registers that do not fit are spilled to the stack, in slow memory. A few bytes do no harm.
STACK_LIMIT_BYTES = 64
DTYPES = ("float16", "bfloat16", "float32", "float64")
KERNELS = ("decode", "chunks", "fused_decode", "prefill", "mixed", "write", "sample")
KERNELS += ("small_linear", "add_norm", "simple", "simple_write")


class Case(NamedTuple):
    """One call to compile: `mixed` is the prefill of a batch whose decode rows go elsewhere."""

    kernel: str
    dtype: str
    head_dim: int = 0  # `sample` knows no heads
    block_size: int = 16
    group: int = 1  # query heads for each head of K and V
    starts: bool = False  # with context_starts
    vocab_size: int = 0  # of `sample`
    rows: int = 0  # of `small_linear`, which also has inputs and outputs
    sizes: tuple[int, int] = (0, 0)  # of `add_norm` the first is the length of a row
    int8: bool = False  # a pool of int8, whatever the dtype of q, k and v


@dataclass
class Report:
    """What one compiled kernel uses, and which instructions it has."""

    kernel: str
    call: str  # the kernel named in the Case
    target: int  # 90 is sm_90
    dtype: str
    head_dim: int
    block_size: int
    group: int
    registers: int  # for each thread
    stack_bytes: int
    shared_bytes: int
    tensor_core_products: int  # such instructions in the code, however often they run
    copies: dict[int, int]  # asynchronous copies to shared memory: bytes -> instructions of so many
    triton: str
    vocab_size: int = 0
    rows: int = 0
    sizes: tuple[int, int] = (0, 0)
    int8: bool = False


def every(*values, **rest) -> list[Case]:
    """All combinations of kernels, dtypes, head sizes and, if given, block sizes."""
    return [Case(*combination, **rest) for combination in itertools.product(*values)]


QUICK = [  # GPT-2's heads with every kernel, then the shapes that come closest to the limits
    *(Case(kernel, "bfloat16", 64) for kernel in KERNELS[:6]),
    Case("decode", "float16", 64, block_size=3, group=4),
    Case("chunks", "bfloat16", 128, block_size=1, group=4, starts=True),
    Case("prefill", "float16", 128, block_size=256, starts=True),
    Case("prefill", "bfloat16", 256),
    Case("fused_decode", "bfloat16", 128, block_size=1, group=20),
    Case("decode", "float32", 64),
    Case("prefill", "float32", 64),
    Case("write", "float32", 80, block_size=3),
    Case("decode", "float64", 16),
    Case("prefill", "float64", 16),
    *every(("decode", "prefill", "write"), DTYPES[:3], (64,), int8=True),
    Case("chunks", "float16", 128, block_size=3, group=4, starts=True, int8=True),
    Case("sample", "bfloat16", vocab_size=50_257),  # GPT-2's, its rows aligned to single numbers
    Case("sample", "float32", vocab_size=50_257),
    Case("sample", "float16", vocab_size=3_072),
    # One row, and two: with a norm in front; then tensor cores, and what they do not multiply.
    Case("small_linear", "bfloat16", rows=1, sizes=(768, 2304)),
    Case("small_linear", "bfloat16", rows=2, sizes=(1600, 6400)),
    Case("small_linear", "bfloat16", rows=8, sizes=(768, 768)),
    Case("small_linear", "float16", rows=16, sizes=(3072, 768)),
    Case("small_linear", "float32", rows=16, sizes=(1600, 6400)),
    Case("small_linear", "float64", rows=2, sizes=(768, 2304)),
    Case("add_norm", "bfloat16", sizes=(768, 0)),
    Case("add_norm", "float64", sizes=(1600, 0)),
    # The lesson's kernels.
    *(Case("simple", dtype, 64) for dtype in DTYPES),
    Case("simple", "bfloat16", 80, block_size=3, group=4, starts=True),
    Case("simple", "float32", 1, block_size=1),
    Case("simple_write", "bfloat16", 64),
    Case("simple_write", "float32", 5, block_size=3),
]
# The head size decides about tiles and registers, so it meets every kernel and every width of type.
# fp16 and bf16 differ in one instruction, block sizes in a division, the group in a few registers.
HEAD_SIZES = (5, 16, 64, 80, 96, 128, 256)
WIDTHS = ("bfloat16", "float32", "float64")
GPT2, WIDEST = (64,), (64, 128, 256)
# One token, less and more than a tile, GPT-2's rows padded to be aligned, and a modern vocabulary.
VOCAB_SIZES = (1, 97, 4_097, 50_257, 50_304, 151_936)


FULL = [
    *every(("decode", "prefill", "write"), WIDTHS, HEAD_SIZES),
    *every(("decode",), WIDTHS, HEAD_SIZES, group=4),
    *every(("chunks",), WIDTHS, HEAD_SIZES, group=4, starts=True),
    *every(("fused_decode",), WIDTHS, HEAD_SIZES, group=4),
    *every(("mixed",), WIDTHS, GPT2, starts=True),
    *every(("decode", "chunks", "fused_decode", "prefill", "write"), ("float16",), WIDEST, group=3),
    *every(("decode", "fused_decode", "prefill", "write"), ("bfloat16",), GPT2, (1, 3, 256)),
    # Heads of 256 in float32 spill up to 168 bytes over a pool of int8, so they are not here.
    *every(("decode", "prefill", "write"), WIDTHS[:2], HEAD_SIZES[:-1], int8=True),
    *(Case("sample", dtype, vocab_size=V) for dtype in DTYPES[:3] for V in VOCAB_SIZES),
    *(Case("add_norm", dtype, sizes=(C, 0)) for dtype in DTYPES for C in (5, 48, 768, 1600)),
    *(
        Case("small_linear", dtype, rows=rows, sizes=sizes)
        for dtype, rows in itertools.product(WIDTHS, (1, 2, 4, 8, 16))
        for sizes in (((5, 7), (768, 768), (6400, 1600)) if rows in (2, 16) else ((768, 768),))
    ),
]


def problems(report: Report) -> list[str]:
    """The limits that a compiled kernel is over, a sentence each."""
    found = []
    limit = SHARED_LIMIT_BYTES[report.target]
    if report.stack_bytes > STACK_LIMIT_BYTES:
        found.append(f"spills {report.stack_bytes} bytes, at most {STACK_LIMIT_BYTES} are harmless")
    if report.shared_bytes > limit:
        found.append(f"wants {report.shared_bytes} bytes of shared memory, there are {limit}")
    return found


def parse_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes from what `cuobjdump -res-usage` prints of one kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump printed no line with REG and STACK: {text.strip()!r}")
    return int(found[1]), int(found[2])


# ---- standing in for a GPU -----------------------------------------------------------------------
class NoGPU:
    """A driver without a device: the methods that Triton calls in order to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches compiled kernels by device: one for each target

    def get_current_stream(self, device=None) -> int:
        return 0


def record_launches(compiled: list) -> None:
    """From now on `kernel[grid](...)` compiles, launches nothing, and adds to the list."""
    from triton.runtime import JITFunction

    def compile_instead(kernel, grid) -> Callable:
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

    JITFunction.__getitem__ = compile_instead


def call(case: Case) -> None:
    """One call of the function that an engine calls, with tensors that have no memory."""
    import paged_attention_triton as simple
    from kernels import triton_decode as decode
    from kernels import triton_prefill as prefill
    from kv_cache import KVCache
    from speedups.quantized_kv import QuantizedKVCache

    if case.kernel == "sample":
        return call_sample(case)
    if case.kernel in ("small_linear", "add_norm"):
        return call_joined(case)
    D, H_kv, B = case.head_dim, 4, 8
    H, query_len = H_kv * case.group, 100 if case.kernel in ("prefill", "mixed") else 1
    N, dtype = B * query_len, getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = (1, 89, case.block_size, H_kv, D)
    if case.int8:
        cache = QuantizedKVCache(*sizes, device="meta")
    else:
        cache = KVCache(*sizes, dtype=dtype, device="meta")
    qkv = empty(N, H + 2 * H_kv, D, dtype=dtype)  # as the model hands over its slices
    q, k, v = qkv[:, :H], qkv[:, H : H + H_kv], qkv[:, H + H_kv :]
    caches = cache.layer(0)
    if case.kernel == "write":
        return prefill.write_kv_triton(k, v, *caches, empty(N, dtype=torch.int64))
    if case.kernel == "simple_write":
        return simple.write_kv_triton_simple(k, v, *caches, empty(N, dtype=torch.int64))
    if case.kernel == "fused_decode":
        return call_fused_decode(q, k, v, *caches)
    starts = empty(B) if case.starts else None
    arguments = (q, *caches, empty(B, 60), empty(B + 1), empty(B), D**-0.5, query_len, 900, starts)
    match case.kernel:
        case "decode":
            decode.paged_decode_triton(*arguments, chunk_len=0)
        case "chunks":  # and the merge
            decode.paged_decode_triton(*arguments, chunk_len=decode.CHUNK_LEN)
        case "prefill":
            prefill.paged_prefill_triton(*arguments)
        case "mixed":
            prefill.paged_prefill_triton(*arguments, skip_decode=True)
        case "simple":
            simple.paged_attention_triton_simple(*arguments)


def call_fused_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *caches) -> None:
    """`fused_decode_triton` without chunks and with them: two kernels."""
    from kernels.triton_fused_decode import fused_decode_triton, num_arrivals

    B, lens = len(q), torch.empty(len(q), dtype=torch.int32, device="meta")
    where = lens.long(), lens.new_empty(B, 60), lens
    arrived = lens.new_empty(num_arrivals(B, q.shape[1], k.shape[1]))
    for chunk_len in (0, 256):
        step = (*where, q.shape[2] ** -0.5, 900, arrived)
        fused_decode_triton(q, k, v, *caches, *step, chunk_len=chunk_len)


def call_sample(case: Case) -> None:
    """`sample_triton` for 8 rows."""
    from kernels.triton_sampling import sample_triton

    B = 8
    types = "int64 int64 float32 int32 float64 float32".split()  # seeds, positions, .. min_ps
    rows = [torch.empty(B, dtype=getattr(torch, name), device="meta") for name in types]
    logits = torch.empty(B, case.vocab_size, dtype=getattr(torch, case.dtype), device="meta")
    sample_triton(logits, *rows, peaks=torch.empty_like(rows[-1]))


def call_joined(case: Case) -> None:
    """`add_norm`, or `small_linear` with all of its options."""
    from kernels.triton_fused import add_norm
    from kernels.triton_small_linear import MOST_NORM_ROWS, small_linear

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")

    IN, OUT = case.sizes
    norm = (empty(IN), empty(IN), 1e-5)
    if case.kernel == "add_norm":
        add_norm(empty(8, IN), empty(8, IN), *norm)
        return
    options = {"gelu": True, "residual": empty(case.rows, OUT)}
    if case.rows <= MOST_NORM_ROWS:
        options["norm"] = norm
    small_linear(empty(case.rows, IN), empty(OUT, IN), empty(OUT), **options)


def tools() -> Path:
    """The folder of NVIDIA's programs in Triton's package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def known_targets() -> list[int]:
    """What this Triton compiles for. Since 3.3 its package has an assembler for sm_100 too."""
    knows_blackwell = (tools() / "ptxas-blackwell").is_file()
    return [target for target in SHARED_LIMIT_BYTES if target < 100 or knows_blackwell]


def cuobjdump() -> Path:
    """The program that reads binaries."""
    tool = tools() / "cuobjdump"
    if not tool.is_file():
        raise FileNotFoundError(f"{tool} is missing: it reads what a kernel uses from its binary")
    return tool


def describe(kernel, case: Case, target: int) -> Report:
    """Read a compiled kernel's binary and its assembly."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack_bytes = parse_usage(printed)
    ptx = kernel.asm["ptx"]
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x\w+|\d+)", ptx)
    return Report(
        kernel=kernel.metadata.name,
        call=case.kernel,
        target=target,
        dtype=case.dtype,
        head_dim=case.head_dim,
        block_size=case.block_size,
        group=case.group,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=kernel.metadata.shared,
        tensor_core_products=len(re.findall(PRODUCTS, ptx)),
        copies=dict(Counter(int(size, 0) for size in sizes)),
        triton=triton.__version__,
        vocab_size=case.vocab_size,
        rows=case.rows,
        sizes=case.sizes,
        int8=case.int8,
    )


def reports(cases: list[Case], targets: list[int]) -> Iterator[Report]:
    """Compile every case for every target; a case may be two kernels."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled: list = []
    record_launches(compiled)
    for target in targets:
        triton.runtime.driver.set_active(NoGPU(GPUTarget("cuda", target, 32)))
        for case in cases:
            compiled.clear()
            call(case)
            for kernel in compiled:
                yield describe(kernel, case, target)


# --------------------------------------------------------------------------------------------------
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--all", action="store_true", help="the whole matrix instead of a quick choice: minutes")
    add("--json", action="store_true", help="one JSON object a line instead of a table")
    add(
        "--targets",
        type=int,
        nargs="+",
        default=known_targets(),
        choices=known_targets(),
        help="default: all",
    )
    add("--kernels", nargs="+", default=KERNELS, choices=KERNELS, help="only these")
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="only these")
    add("--head-sizes", type=int, nargs="+", help="only these")
    names = ("TILE_K", "num_warps", "num_stages")
    add("--decode-tiles", type=int, nargs=3, metavar=names, help="instead of those that ship")
    add("--prefill-tiles", type=int, nargs=4, metavar=("TILE_Q", *names), help="the same")
    return parser.parse_args()


def use_tiles(args: argparse.Namespace) -> None:
    """Replace the tiles that ship by those of the command line, for all types and head sizes."""
    from kernels import triton_decode as decode
    from kernels import triton_prefill as prefill

    names = ("TILE_Q", "TILE_K", "num_warps", "num_stages")
    if args.decode_tiles:
        decode.decode_tiles = lambda *_: dict(zip(names[1:], args.decode_tiles, strict=True))
    if args.prefill_tiles:
        prefill.prefill_tiles = lambda *_: dict(zip(names, args.prefill_tiles, strict=True))


def main() -> int:
    args = parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    use_tiles(args)
    chosen = [
        case
        for case in dict.fromkeys(FULL + QUICK if args.all else QUICK)
        if case.kernel in args.kernels
        and case.dtype in args.dtypes
        and (args.head_sizes is None or case.head_dim in args.head_sizes)
    ]
    if not args.json:
        columns = (
            "kernel                  call         target dtype    D or V block  G  registers  stack"
        )
        print(columns + "   shared  products  copies x bytes")
    failures = 0
    for r in reports(chosen, args.targets):
        wrong = problems(r)
        failures += bool(wrong)
        if args.json:
            print(json.dumps(asdict(r) | {"problems": wrong}), flush=True)
            continue
        width = r.head_dim or r.vocab_size or r.sizes[0]
        shape = f"{r.kernel:24}{r.call:13}sm_{r.target}  {r.dtype:8}{width:7}"
        shape += f"{r.block_size:6}{r.group:3}"
        takes = f"{r.registers:11}{r.stack_bytes:7}{r.shared_bytes:9}{r.tensor_core_products:10}"
        copies = ", ".join(f"{n} x {size}" for size, n in sorted(r.copies.items()))
        print(shape + takes + "  " + "  ".join([copies, *wrong]), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
