"""The tables of README.md and docs/, written from the code and from measured rows.

A number in a text goes stale when the rows or the files change. So the tables stand between marks,

    <!-- table: kernels -->
    ...
    <!-- end of table -->

and this program writes what stands between them. A test fails when a text and its rows differ.

Run: python -m plots.tables            (writes README.md and docs/*.md anew)
"""

import ast
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.results import read
from plots import gpu
from watch.files import replacing

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)

LESSON = {  # the root files in reading order: the concept in one sentence
    "model.py": "A GPT-2 with one socket, `attend`. It does not know where K and V are kept.",
    "block_allocator.py": "Equal blocks cannot fragment: a free list and reference counts.",
    "kv_cache.py": "One preallocated tensor; a block table turns a position into a slot.",
    "paged_attention.py": "The online softmax, block by block, in plain PyTorch.",
    "paged_attention_triton.py": "The same function on a GPU, in its simplest form.",
    "sampling.py": "From logits to a token: temperature, top-k, top-p, penalties, seeds.",
    "sequence.py": "Requests, sequences, and the plan of one step.",
    "policies.py": "Who runs first, who waits, who is preempted.",
    "scheduler.py": "Every step chooses again who runs: budget, chunked prefill, preemption.",
    "outputs.py": "Tokens to text without breaking a character; stop strings.",
    "engine.py": "schedule, forward, sample, repeat.",
    "baselines.py": "What paging replaces: no cache, and one slab per sequence.",
    "prefix_cache.py": "An allocator with a memory: equal beginnings share blocks.",
    "beam_search.py": "Sequences that fork share blocks until one of them writes.",
    "llm.py": "Chooses the parts and puts them together.",
    "generate.py": "The command line: prompts in, streamed text out.",
    "benchmark.py": "The three-way comparison, and the table of experiments.",
}
NO_TORCH = {"block_allocator.py", "sequence.py", "policies.py", "scheduler.py"}
LINES_A_MINUTE = 35  # of code, comments and docstrings together

WINGS = {
    "kernels": "The lesson's functions, fast: Numba on a CPU, Triton on a GPU.",
    "checkpoints": "Weights and tokenizers from files and from the hub; the training program.",
    "speedups": "CUDA graphs, steps planned ahead, a pool in eight bits, a model cut over devices.",
    "watch": "Looks at a run from outside: recorder, terminal, roofline.",
    "serving": "An HTTP server that speaks OpenAI's API; pages that show a run.",
    "plots": "The pictures and tables of these pages, drawn by code.",
    "experiments": "Everything that measures, and the rows it writes.",
}

SETTINGS = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
OF_SETTINGS = "float32, 1 thread | 2 threads | bfloat16, 1 thread | 2 threads"
DYNAMIC_CACHE = "speed against transformers DynamicCache"


# ---- finding a figure ----------------------------------------------------------------------------
def newest(
    file: str,
    contender: str,
    metric: str,
    workload: str,
    dtype: str = "float32",
    threads: int = 1,
    model: str = "",
) -> float:
    """The newest median of a figure; `workload` by how it begins.

    Raises ValueError where the file has no such row.
    """
    found = [
        row["median"]
        for row in read(ROOT / "results" / file)
        if row["contender"] == contender
        and row["metric"] == metric
        and row["workload"].startswith(workload)
        and " trial=" not in row["workload"]  # one repeat of several
        and (row["dtype"], row["threads"]) == (dtype, threads)
        and row["model"].startswith(model)
    ]
    if not found:
        raise ValueError(f"{file} has no row {contender!r}, {metric!r}, {workload!r}, {dtype}")
    return found[-1]


def cells_of_settings(
    file: str, contender: str, metric: str, workload: str, digits: int = 2
) -> str:
    """One figure in each dtype with one and two threads, as cells of a table."""
    figures = [newest(file, contender, metric, workload, *setting) for setting in SETTINGS]
    return " | ".join(f"{figure:.{digits}f}" for figure in figures)


def table(head: str, rows: list[str]) -> list[str]:
    """Lines of a Markdown table; `head` and each row are cells with `|` between them."""
    columns = head.count("|") + 1
    return [f"| {head} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows)]


# ---- the code ------------------------------------------------------------------------------------
def minutes(name: str) -> int:
    """Reading time of a file: its lines that are not blank, at a steady pace."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return max(1, round(sum(bool(line.strip()) for line in lines) / LINES_A_MINUTE))


def lesson() -> list[str]:
    """The lesson's files, with the minutes until each has been read."""
    rows, total = [], 0
    for number, (name, concept) in enumerate(LESSON.items(), 1):
        total += minutes(name)
        star = "*" if name in NO_TORCH else ""
        rows.append(f"{number} | [{name}]({name}){star} | {concept} | {minutes(name)} | {total}")
    return table("# | file | the concept in one sentence | minutes | in all", rows)


def wings() -> list[str]:
    """The wings, with how many files each has."""
    rows = []
    for wing, purpose in WINGS.items():
        count = len(list((ROOT / wing).glob("[!_]*.py")))
        rows.append(f"[{wing}/]({wing}/__init__.py) | {purpose} | {count}")
    return table("wing | what is in it | files", rows)


def files_of_wings() -> list[str]:
    """Each wing's files in reading order, from the docstring of its `__init__.py`."""
    lines = []
    for wing in WINGS:
        tree = ast.parse((ROOT / wing / "__init__.py").read_text(encoding="utf-8"))
        listed = re.findall(r"(?m)^    (\w+)  +(.+)$", ast.get_docstring(tree))
        rows = [f"[{name}.py](../{wing}/{name}.py) | {words}" for name, words in listed]
        lines += [f"**{wing}/**", "", *table("file | what is in it", rows), ""]
    return lines[:-1]


# ---- measured rows -------------------------------------------------------------------------------
def reaches() -> list[str]:
    """README's one table: what the engine reaches, and where paging loses."""
    rows = []

    def compare(name: str, ratio: float) -> None:
        rows.append(f"{name} | {ratio:.2f} | {'loses' if ratio < 1 else 'wins'}")

    decode = newest("cpu/peers.csv", "paged engine", DYNAMIC_CACHE, "decode batch=32 ")
    compare("decode, 32 sequences / transformers", decode)
    steps = newest(HF, HF_PAGED, "time a step against DynamicCache", "decode batch=32 ")
    compare("decode, 32 texts in transformers, with PagedCache / DynamicCache *", 1 / steps)
    file, slab = "cpu/kernels.csv", "speed against contiguous"
    ratio = newest(file, "whole blocks, all heads", slab, "batch=32 context=256 ")
    compare("decode attention, 32 x 256 tokens / contiguous slab *", ratio)
    ratio = newest(file, "paged", slab, "prefill batch=8 ")
    compare("a prompt's attention, 8 x 256 tokens / contiguous slab *", ratio)
    file, long = "cpu/speed.csv", "batch=1 prompt=64 new=500 "
    for other, metric in (("no cache", "speed against no cache"), ("contiguous slab", slab)):
        ratio = newest(file, "paged", metric, long, threads=2, model="random:gpt2")
        compare(f"500 new tokens, 1 sequence, 2 threads / {other}", ratio)
    at_once = {
        plan: figures["running at once, mean"] for plan, figures in equal_memory_figures().items()
    }
    ratio = at_once["paged"] / at_once["maximum, buddies"]
    compare("requests at once in equal memory / reserving the maximum", ratio)
    against = f"throughput against {CACHES[1]}"
    of = SHARING, CACHES[0], against, "throughput requests=32 "
    ratio = newest(*of, threads=2, model="random:gpt2")
    compare("32 prompts that share 500 tokens, 2 threads / no prefix cache *", ratio)
    return table("the same work: PagedGPT / the other | times as much | paging", rows)


def kernels() -> list[str]:
    """Decode attention of one layer, as GB/s of keys and values."""
    contenders = {  # how the page says it: how the rows say it
        "gather the blocks, then the library's kernel": "gather, then dense",
        "block by block in PyTorch": "block by block in PyTorch",
        "one (sequence, head) at a time": "one program per (sequence, head)",
        "whole blocks, all heads (`kernels/attention_cpu.py`)": "whole blocks, all heads",
        "a contiguous slab, the library's kernel": "contiguous library kernel",
    }
    of = "cpu/kernels.csv", "batch=32 context=256 "
    rows = [
        f"{name} | {cells_of_settings(of[0], contender, 'KV bandwidth', of[1], 1)}"
        for name, contender in contenders.items()
    ]
    read_alone = cells_of_settings(of[0], "read, torch", "bandwidth", of[1], 1)
    rows.append(f"PyTorch's sum, which reads and computes nothing else | {read_alone}")
    return table(f"GB/s, read by | {OF_SETTINGS}", rows)


def against_the_slab() -> list[str]:
    """Our decode attention against the library's on a slab, and a prompt's own attention."""
    file, metric = "cpu/kernels.csv", "speed against contiguous"
    rows = []
    for batch, context in ((8, 256), (32, 256), (32, 1000)):
        workload = f"batch={batch} context={context} "
        cells = cells_of_settings(file, "whole blocks, all heads", metric, workload)
        rows.append(f"decode, {batch} sequences of {context} tokens | {cells}")
    cells = cells_of_settings(file, "paged", metric, "prefill batch=8 context=256 ")
    rows.append(f"prefill, 8 prompts of 256 tokens | {cells}")
    return table(f"times as fast as the slab | {OF_SETTINGS}", rows)


def peers() -> list[str]:
    """The engine against transformers' DynamicCache."""
    workloads = {
        "decode, batch 1": "decode batch=1 ",
        "decode, batch 8": "decode batch=8 ",
        "decode, batch 32": "decode batch=32 ",
        "prefill, 8 prompts of 256 tokens": "prefill batch=8 ",
    }
    rows = [
        f"{name} | {cells_of_settings('cpu/peers.csv', 'paged engine', DYNAMIC_CACHE, workload)}"
        for name, workload in workloads.items()
    ]
    most = cells_of_settings(
        "cpu/anatomy.csv", "at most: products and one read of KV", DYNAMIC_CACHE, "decode batch=32"
    )
    rows.append(f"batch 32, products and one read of K and V alone | {most}")
    return table(f"times as fast | {OF_SETTINGS}", rows)


def peers_avx2() -> list[str]:
    """The same on a processor without AVX-512."""
    folder, alone = "cpu-avx2", "products and attention alone"
    rows = [
        ("decode, batch 32", "peers", "paged engine", DYNAMIC_CACHE, "decode batch=32 "),
        ("batch 32, products and attention alone", "anatomy", alone, DYNAMIC_CACHE, "decode batch"),
        ("prefill, 8 prompts of 256 tokens", "peers", "paged engine", DYNAMIC_CACHE, "prefill ba"),
        ("decode attention, 32 x 256, against a slab", "kernels", "whole blocks, all heads",
         "speed against contiguous", "batch=32 context=256 "),
    ]  # fmt: skip
    lines = []
    for name, file, contender, metric, workload in rows:
        cells = []
        for dtype, threads in SETTINGS:
            try:
                path = f"{folder}/{file}.csv"
                cells.append(f"{newest(path, contender, metric, workload, dtype, threads):.2f}")
            except ValueError:
                cells.append("not measured")
        lines.append(f"{name} | {' | '.join(cells)}")
    return table(f"times as fast | {OF_SETTINGS}", lines)


HF = "cpu/hf.csv"
HF_PAGED = "PagedCache, paged"
HF_GATHER = "PagedCache, gather"


def hf_steps() -> list[str]:
    """transformers' step with each cache, against DynamicCache's."""
    works = {str(batch): f"decode batch={batch} " for batch in (1, 8, 32)}
    works |= {"8 prompts of 256 tokens": "prefill batch=8 prompt=256 "}
    rows = []
    for texts, workload in works.items():
        for cache in (HF_PAGED, HF_GATHER, "StaticCache"):
            cells = cells_of_settings(HF, cache, "time a step against DynamicCache", workload)
            rows.append(f"{texts} | {cache} | {cells}")
    return table(f"texts | step / DynamicCache's | {OF_SETTINGS}", rows)


def hf_memory() -> list[str]:
    """The bytes of K and V that transformers' caches and PagedCache hold."""
    alone = "PagedCache, one cache a text"
    names = ("DynamicCache", "StaticCache", HF_PAGED, alone)
    rows = []
    for words, workload in {
        "8 texts of 64 tokens": "grow tokens=64 batch=8 ",
        "8 texts of 1,024 tokens": "grow tokens=1024 batch=8 ",
        "8 texts of 128 to 1,024 tokens": "ragged batch=8 ",
        "4 beams, a prompt of 256, 64 new tokens": "beams step=64 beams=4 prompt=256 ",
    }.items():
        cells = []
        for name in names:
            try:
                cells.append(f"{newest(HF, name, 'KV memory', workload) / 1e6:,.1f}")
            except ValueError:
                cells.append("-")
        rows.append(f"{words} | {' | '.join(cells)}")
    return table(f"MB of K and V in float32 | {' | '.join(names)}", rows)


ENGINES = ("vLLM", "OpenVINO", "CTranslate2", "llama.cpp", "transformers")


def engines() -> list[str]:
    """Our speed / another engine's, with one thread and with two: "1.31 / 1.05"."""
    measured = {  # the newest row of each comparison
        (row["dtype"], row["contender"], row["workload"], row["metric"], row["threads"]): row
        for row in read(ROOT / "results/cpu/engines.csv")
        if row["unit"] == "x"
    }
    columns = [(f"batch={batch} ", "decode") for batch in (1, 4, 8, 32)] + [("batch=8 ", "prefill")]
    rows = []
    for dtype in ("float32", "bfloat16", "int8"):
        for engine in ENGINES:
            cells = []
            for workload, phase in columns:
                found = {
                    key[4]: f"{row['median']:.2f}"
                    for key, row in measured.items()
                    if key[:2] == (dtype, engine)
                    and key[2].startswith(workload)
                    and key[3].startswith(phase)
                }
                cells.append(" / ".join(found.get(threads, "-") for threads in (1, 2)))
            if set(cells) != {"- / -"}:
                rows.append(f"{engine}, {dtype} | {' | '.join(cells)}")
    head = "times as fast as | decode, 1 sequence | 4 | 8 | 32 | prefill, 8 prompts"
    return table(head, rows)


def without_a_cache() -> list[str]:
    """Paged and contiguous against no cache, on the 124M shape."""
    file, rows = "cpu/speed.csv", []
    for batch, new in ((1, 32), (8, 32), (1, 500)):
        cells = [
            newest(file, contender, "speed against no cache", f"batch={batch} prompt=64 new={new} ",
                   threads=2, model="random:gpt2")
            for contender in ("contiguous", "paged", "transformers DynamicCache")
        ]  # fmt: skip
        figures = " | ".join(f"{cell:.1f}" for cell in cells)
        rows.append(f"{batch} sequence{'s' * (batch > 1)}, {new} new tokens | {figures}")
    return table("times as fast as without a cache | contiguous slab | paged | transformers", rows)


PLANS = {
    "nothing ahead: paged": "paged",
    "its true length, in a buddy allocator": "oracle, buddies",
    "the next power of two, in a buddy allocator": "power of two, buddies",
    "the maximum": "maximum, buddies",
    "the maximum, in static batches": "static batches",
}


def equal_memory_figures() -> dict[str, dict[str, float]]:
    """Figures by plan: 8,134 conversations of a public trace, all waiting, in the same pool."""
    figures: dict[str, dict[str, float]] = {}
    for row in read(ROOT / "results/cpu/concurrency.csv"):
        if "Azure" in row["workload"] and row["workload"].endswith("all at once"):
            figures.setdefault(row["contender"], {})[row["metric"]] = row["median"]
    return figures


def equal_memory() -> list[str]:
    """How many requests run at once in the same memory, by what each reserves."""
    figures, rows = equal_memory_figures(), []
    paged = figures["paged"]["running at once, mean"]
    for name, plan in PLANS.items():
        at_once = figures[plan]["running at once, mean"]
        used = figures[plan]["share of the blocks held that is used"]
        bound = figures[plan].get("as many could run at once paged")
        cells = [f"{at_once:.0f}", f"{used:.1f}%", f"{paged / at_once:.2f}"]
        rows.append(" | ".join([name, *cells, f"{bound:.2f}" if bound else "-"]))
    head = "reserved when a request starts | run at once | utilisation | paged runs, times as many"
    return table(f"{head} | expected from the lengths", rows)


def token_budgets() -> list[str]:
    """The gap between two tokens while a long prompt joins, by the step's token budget."""
    joining, rows = "joining batch=8 context=64 prompt=896", []
    for budget in (64, 256, 2048):
        of = "cpu/latency.csv", f"budget={budget}"
        gap = newest(*of, "largest gap between tokens", joining)
        before = newest(*of, "gap before the prompt joins", joining)
        first = newest(*of, "time to first token", joining)
        rows.append(f"{budget:,} | {before:.1f} ms | {gap:.1f} ms | {first:.0f} ms")
    head = "`max_num_batched_tokens` | gap before it joins | largest gap while it joins"
    return table(f"{head} | the prompt's first token after", rows)


def host_work() -> list[str]:
    """The host's work in a step of both engines, and in whole runs."""
    engines, rows = ("the plain engine", "one step ahead"), []
    for running in (1, 64, 256):
        of = "time a step", f"running={running}"
        cells = [f"{newest('cpu/bookkeeping.csv', e, *of, dtype='none'):.2f} ms" for e in engines]
        rows.append(f"a step of {running} | {' | '.join(cells)}")
    of = "tokens of all texts", "256 requests"
    rates = [newest("cpu/bookkeeping.csv", e, *of, dtype="none") / 1e3 for e in engines]
    rows.append("256 requests | " + " | ".join(f"{rate:.0f} thousand tokens/s" for rate in rates))
    return table(f"sequences | {' | '.join(engines)}", rows)


def server_latency() -> list[str]:
    """What an open-loop client measures at the server, by the rate of its requests."""
    metrics = (
        ("time to first token p50", "{:.0f} ms"),
        ("time to first token p99", "{:.0f} ms"),
        ("between tokens p50", "{:.1f} ms"),
        ("between tokens p99", "{:.1f} ms"),
        ("tokens of all texts", "{:.0f}"),
        ("goodput", "{:.1f}"),
    )
    rows = []
    for rate in (8, 16, 32):
        of = f"rate={rate} "
        figures = [newest("cpu/serve.csv", "own server", metric, of) for metric, _ in metrics]
        cells = [form.format(figure) for (_, form), figure in zip(metrics, figures, strict=True)]
        rows.append(f"{rate} | {' | '.join(cells)}")
    head = "requests/s | first token, p50 | p99 | between tokens, p50 | p99 | tokens/s | goodput"
    return table(head, rows)


def block_sizes() -> list[str]:
    """Utilisation and speed for block sizes 1 to 256."""
    file, rows = "cpu/block_size.csv", []
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        of = file, f"block_size={size}"
        used = [
            newest(*of, "share of held memory filled", f"memory {texts}", dtype, threads)
            for texts in ("ShareGPT", "Alpaca")
            for dtype, threads in [dtype_and_threads(file, f"memory {texts}")]
        ]
        rows.append(f"{size} | " + " | ".join(f"{share:.1f}%" for share in used))
    return table("block_size | utilisation, chats of ShareGPT's lengths | of Alpaca's", rows)


# Blocks saved / blocks without sharing, in percent: figure 15 of the paper, OPT-13B, Alpaca.
PAPER_SAVED = {
    "texts": {2: 6.09, 4: 8.53, 6: 9.79},
    "beams": {2: 37.56, 4: 53.13, 6: 55.16},
}
CACHES = ("prefix cache", "no prefix cache")
SHARING = "cpu/sharing.csv"


def first_tokens(workload: str) -> str:
    """The time to the first token with the prefix cache and without it, and their ratio."""
    times_ms = [newest(SHARING, name, "time to first token", workload) for name in CACHES]
    times = newest(SHARING, CACHES[0], f"first token against {CACHES[1]}", workload)
    return " | ".join([*(f"{ms:.1f} ms" for ms in times_ms), f"{times:.2f}"])


def shared_prefix() -> list[str]:
    """Time to the first token of a prompt whose beginning was computed for another one."""
    rows = []
    for shared in (0, 100, 300, 500, 700, 900):
        workload = f"prefix shared={shared} "
        found = newest(SHARING, CACHES[0], "tokens not recomputed", workload)
        rows.append(f"{shared} | {found:.0f} | {first_tokens(workload)}")
    head = "tokens in common | found | first token with the prefix cache | without | times as soon"
    return table(head, rows)


def chat_turns() -> list[str]:
    """Time to the first token of each turn of a chat that sends its whole history."""
    rows = []
    for turn in range(1, 9):
        workload = f"chat MT-Bench turn={turn} "
        found = newest(SHARING, CACHES[0], "tokens not recomputed", workload)
        rows.append(f"{turn} | {found:.0f} | {first_tokens(workload)}")
    head = "turn | tokens found | first token with the prefix cache | without | times as soon"
    return table(head, rows)


def four_texts() -> list[str]:
    """Four texts of one prompt: one request that forks, or four."""
    rows = []
    for name in ("one request, n=4", *(f"4 requests, {cache}" for cache in CACHES)):
        of = SHARING, name
        computed, held, copied, ms, seconds = (
            newest(*of, metric, "forks ")
            for metric in ("tokens computed", "blocks held at most", "blocks copied",
                           "time to first token", "generation time")
        )  # fmt: skip
        figures = f"{computed:,.0f} | {held:.0f} | {copied:.0f}"
        rows.append(f"{name} | {figures} | {ms:.0f} ms | {seconds:.2f} s")
    head = "four texts | tokens computed | blocks at most | blocks copied | first tokens | all"
    return table(head, rows)


def blocks_saved() -> list[str]:
    """Blocks saved by sharing, beside the paper's figures."""
    rows = []
    for contender, paper in PAPER_SAVED.items():
        for width, theirs in paper.items():
            ours = [
                newest(SHARING, contender, "blocks saved", f"blocks {name} MT-Bench requests=16 "
                       f"width={width}")
                for name in ("Alpaca", "ShareGPT")
            ]  # fmt: skip
            figures = " | ".join(f"{percent:.1f}%" for percent in ours)
            rows.append(f"{width} {contender} | {figures} | {theirs:.1f}%")
    return table("blocks saved | Alpaca's lengths | ShareGPT's lengths | the paper, Alpaca", rows)


def shared_throughput() -> list[str]:
    """Requests with 500 common tokens, served with the prefix cache and without it."""
    of, rows = {"threads": 2, "model": "random:gpt2"}, []
    for name in CACHES:
        rate, computed, held = (
            newest(SHARING, name, metric, "throughput requests=32 ", **of)
            for metric in ("generated tokens", "tokens computed", "blocks held at most")
        )
        rows.append(f"{name} | {rate:.0f} | {computed:,.0f} | {held:,.0f}")
    metric = f"throughput against {CACHES[1]}"
    times = newest(SHARING, CACHES[0], metric, "throughput requests=32 ", **of)
    rows.append(f"times as many | {times:.2f} | |")
    return table("served with | generated tokens/s | tokens computed | blocks at most", rows)


def block_trace() -> list[str]:
    """Which share of the trace's blocks a pool finds."""
    rows = []
    for pool in ("1000 blocks", "3000 blocks", "10000 blocks", "30000 blocks", "100000 blocks"):
        of = SHARING, f"pool of {pool}"
        found, evicted = (
            newest(*of, metric, "trace ", dtype="none")
            for metric in ("blocks found", "blocks evicted")
        )
        rows.append(f"{int(pool.split()[0]):,} | {found:.1f}% | {evicted:,.0f}")
    found = newest(SHARING, "pool without end", "blocks found", "trace ", dtype="none")
    rows.append(f"without end | {found:.1f}% | 0")
    return table("blocks in the pool | blocks found | blocks evicted", rows)


FEWER_BITS = {  # how the page says it: contender, dtype of the arithmetic
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "pool in int8": ("int8 pool", "float32"),
    "bfloat16, pool in int8": ("bfloat16, int8 pool", "bfloat16"),
    "weights in int8": ("int8 weights", "float32"),
    "weights and pool in int8": ("int8 weights, int8 pool", "float32"),
}
QUALITY = "cpu/quality.csv"


def fewer_bits_quality() -> list[str]:
    """What fewer bits cost on the held-out tales."""
    rows = []
    for name, (contender, dtype) in FEWER_BITS.items():
        loss, above, distance, changed = (
            newest(QUALITY, contender, metric, "held-out ", dtype)
            for metric in ("loss", "loss above float32", "distance of the logits",
                           "most likely token changed")
        )  # fmt: skip
        kept = newest(QUALITY, contender, "tokens before the first difference", "greedy ", dtype)
        figures = f"{loss:.4f} | {above:+.5f} | {distance:.4f} | {changed:.2f}%"
        rows.append(f"{name} | {figures} | {kept:.0f}%")
    head = "weights, K and V in | nats per character | above float32 | logits' distance, rms"
    return table(f"{head} | another token is first | greedy tokens kept", rows)


def busy_neighbour() -> list[str]:
    """A decode step on the idle machine and beside a busy process, in three ways."""
    rows = []

    def cells(contender: str, metric: str, unit: str, digits: int) -> str:
        workloads = (f"decode batch={batch} " for batch in (1, 8, 32))
        figures = (
            newest("cpu/neighbour.csv", contender, metric, workload, threads=2)
            for workload in workloads
        )
        return " | ".join(f"{figure:.{digits}f}{unit}" for figure in figures)

    for way, name in (
        ("one thread fewer", "1 thread"),
        ("all threads", "2 threads at every step"),
        ("adapted", "2 threads, or 1 while it is faster"),
    ):
        for state, where in (("idle", "idle machine"), ("neighbour", "one core busy")):
            times = cells(f"{way}, {state}", "time a step", " ms", 1)
            rows.append(f"{name}, {where} | {times}")
    for way, state, base, words in (
        ("all threads", "neighbour", "one thread fewer, idle", "2 threads, busy / 1, idle"),
        ("adapted", "neighbour", "one thread fewer, idle", "2 or 1, busy / 1, idle"),
        ("adapted", "idle", "all threads, idle", "2 or 1, idle / 2, idle"),
    ):
        speeds = cells(f"{way}, {state}", f"speed against {base}", "", 2)
        rows.append(f"speed: {words} | {speeds}")
    return table("a decode step | 1 sequence | 8 | 32", rows)


SCALE = "cpu/scale.csv"
CLUSTER_ROUTERS = ("random", "round-robin", "least-loaded", "prefix")
P99 = "time to first token, 99th percentile"


def scale_figures(workload: str, metric: str) -> dict[tuple[str, int], float]:
    """(router, replicas) -> the newest figure of a workload that begins so."""
    found = {}
    for row in read(ROOT / "results" / SCALE):
        replicas = re.search(r" replicas=(\d+)$", row["workload"])
        if replicas and row["workload"].startswith(workload) and row["metric"] == metric:
            found[row["contender"], int(replicas[1])] = row["median"]
    return found


def by_router(workload: str, metric: str, unit: str, digits: int) -> list[str]:
    """A line for each number of replicas, a column for each router."""
    figures = scale_figures(workload, metric)
    rows = []
    for count in sorted({count for _, count in figures}):
        cells = [f"{figures[router, count]:,.{digits}f}{unit}" for router in CLUSTER_ROUTERS]
        rows.append(f"{count:,} | {' | '.join(cells)}")
    return table(f"replicas | {' | '.join(CLUSTER_ROUTERS)}", rows)


def replica_capacity() -> float:
    """Prompt tokens that one busy replica computes a second: what it serves and does not find."""
    alone = ("random", 1)
    found = scale_figures("trace ", "prompt tokens found")[alone]
    return scale_figures("trace ", "prompt tokens")[alone] * (1 - found / 100)


def replica_plan() -> list[str]:
    """Replicas for a million users: each sends a prompt of 12,000 tokens a minute."""
    tokens_per_s = 1_000_000 * 12_000 / 60
    figures, rows = scale_figures("trace ", "prompt tokens found"), []
    for name, router, count in (
        ("nothing is ever found", None, 0),
        ("what random routing finds in 16 pools", "random", 16),
        ("what random routing finds in 1,000 pools", "random", 1000),
        ("what prefix routing finds in 16 pools", "prefix", 16),
        ("what prefix routing finds in 1,000 pools", "prefix", 1000),
    ):
        found = figures[router, count] if router else 0.0
        computed = tokens_per_s * (1 - found / 100)
        replicas = computed / replica_capacity() / 0.7
        rows.append(f"{name} | {found:.1f}% | {computed / 1e6:,.0f} million | {replicas:,.0f}")
    return table("prompts' tokens | found | to compute a second | replicas, 70% busy", rows)


def wire() -> list[str]:
    """Bytes that a rank sends for a token, and the sums of a step on three links."""
    links, rows = ("NVLink of an H100", "PCIe 5.0 x16", "Ethernet, 100 Gbit/s"), []
    for model in ("GPT-2 XL", "70B"):
        for ranks in (2, 8):
            of = SCALE, model
            workload = f"tensor parallel, arithmetic, ranks={ranks}"
            sent = newest(*of, "bytes sent a token", workload, dtype="none")
            cells = [
                f"{newest(*of, f'sums of a step of {n} tokens, {link}', workload, 'none'):,.1f}"
                for link in links
                for n in (1, 8192)
            ]
            rows.append(f"{model}, {ranks} ranks | {sent / 1e3:,.0f} | {' | '.join(cells)}")
    head = " | ".join(f"{link}: 1 token | 8,192 tokens" for link in links)
    return table(f"a step's sums in ms | kB a token | {head}", rows)


def ranks() -> list[str]:
    """One model on two cores: in one process, and cut over two."""
    contenders = [("1 process, 1 thread", 1), ("1 process, 2 threads", 2)]
    contenders += [("2 ranks, 1 thread each", 2)]
    rows = []
    for name, threads in contenders:
        of = {"threads": threads, "model": "random:gpt2"}
        speeds = (
            newest("cpu/ranks.csv", name, "output tokens", f"batch={n} ", **of) for n in (1, 16)
        )
        sizes = (
            newest("cpu/ranks.csv", name, metric, "blocks", **of)
            for metric in ("weights a rank", "pool a rank")
        )
        cells = [*(f"{rate:.1f}" for rate in speeds), *(f"{size / 1e6:.1f} MB" for size in sizes)]
        rows.append(" | ".join([name, *cells]))
    head = "GPT-2 (124M), float32, two cores | tokens/s, 1 request | 16 requests"
    return table(f"{head} | weights a process | pool a process", rows)


def dtype_and_threads(file: str, workload: str) -> tuple[str, int]:
    """What a workload was run with; rows about memory have no dtype to choose."""
    row = next(r for r in read(ROOT / "results" / file) if r["workload"].startswith(workload))
    return row["dtype"], row["threads"]


def fewer_bits_speed() -> list[str]:
    """A decode step of GPT-2's shape in the same settings, and the memory of a token."""
    rows = []
    for name, (contender, dtype) in FEWER_BITS.items():
        cells = []
        for workload in ("batch=1 context=1000", "batch=8 context=1000", "batch=32 context=256"):
            of = QUALITY, contender
            ms = newest(*of, "time a step", f"decode {workload}", dtype)
            cells.append(f"{ms:.1f} ms")
        token_bytes = newest(QUALITY, contender, "KV of a token", "pool", dtype)
        rows.append(f"{name} | {' | '.join(cells)} | {token_bytes:,.0f}")
    head = "weights, K and V in | 1 sequence of 1,000 tokens | 8 of 1,000 | 32 of 256"
    return table(f"{head} | KV bytes of a token", rows)


def shipped_model() -> list[str]:
    """The losses that the training program wrote."""
    facts = json.loads((ROOT / "assets/tiny-gpt2/training.json").read_text(encoding="utf-8"))
    rows = [
        f"nats per character | {facts['nats_per_character']:.3f}",
        f"nats per token, positions 0 to 255 | {facts['nats_per_token_at_0_to_255']:.2f}",
        f"nats per token, positions 512 to 1,023 | {facts['nats_per_token_at_512_to_1023']:.2f}",
    ]
    return table("held-out loss over 22 whole tales | ", rows)


def of_gpu(name: str) -> list[str]:
    """A table of the GPU's rows; without a row the command that measures it."""
    make, file, stage = gpu.TABLES[name]
    head, rows = make(gpu.rows_of(file))
    return table(head, rows) if rows else [f"Not measured yet: `{gpu.COMMAND} --only {stage}`."]


TABLES: dict[str, Callable[[], list[str]]] = {
    "lesson": lesson,
    "wings": wings,
    "files-of-wings": files_of_wings,
    "reaches": reaches,
    "kernels": kernels,
    "against-the-slab": against_the_slab,
    "peers": peers,
    "peers-avx2": peers_avx2,
    "hf-steps": hf_steps,
    "hf-memory": hf_memory,
    "engines": engines,
    "without-a-cache": without_a_cache,
    "equal-memory": equal_memory,
    "token-budgets": token_budgets,
    "server-latency": server_latency,
    "host-work": host_work,
    "block-sizes": block_sizes,
    "shared-prefix": shared_prefix,
    "chat-turns": chat_turns,
    "four-texts": four_texts,
    "blocks-saved": blocks_saved,
    "shared-throughput": shared_throughput,
    "block-trace": block_trace,
    "fewer-bits-quality": fewer_bits_quality,
    "fewer-bits-speed": fewer_bits_speed,
    "busy-neighbour": busy_neighbour,
    "shipped-model": shipped_model,
    "ranks": ranks,
    "scale-found": lambda: by_router("trace ", "prompt tokens found", "%", 1),
    "scale-wait": lambda: by_router("trace ", P99, " s", 1),
    "scale-rate": lambda: by_router("trace ", "prompt tokens", "", 0),
    "scale-median": lambda: by_router("trace ", "time to first token", " s", 2),
    "scale-conversations": lambda: by_router("conversations", "prompt tokens found", "%", 1),
    "scale-conversations-wait": lambda: by_router("conversations", P99, " s", 3),
    "scale-plan": replica_plan,
    "scale-wire": wire,
    "gpu-runs": gpu.runs,
    "gpu-findings": gpu.findings,
    **{name: partial(of_gpu, name) for name in gpu.TABLES},
}


def rewritten(text: str) -> str:
    """The same page with every marked table made anew. KeyError for a name no table has."""

    def replace(match: re.Match) -> str:
        lines = "\n".join(TABLES[match[1]]())
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end of table -->"

    return MARKED.sub(replace, text)


def pages() -> list[Path]:
    """The files that may hold marked tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Write every page anew, all together: an error leaves them as they were."""
    with replacing(*pages()) as parts:
        for path, part in zip(pages(), parts, strict=True):
            part.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
