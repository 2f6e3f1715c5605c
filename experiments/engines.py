"""The engine beside the engines that a user would pick: vLLM, OpenVINO, CTranslate2, llama.cpp ..

    decode   tokens a second of all sequences together, after each has its first token
    prefill  prompt tokens a second until then

All compute the same prompts with the same weights, greedily, and none ends early. Each engine runs
in a process of its own (peer_engines/), in a virtual environment of its own, on the same cores with
the same number of threads. `make engines` builds the environments under `.engines/`; --environments
names another folder. An engine that is not there is left out, and a line says so.

The processes stay alive through a setting (a dtype and a number of threads), and one of them works
at a time: in each round every engine runs once (A B C A B C), after a round that warms up. Settings
are chosen to favour the others; each row holds an engine's version and settings in the column
`backend`. The tokens are compared with ours. In float32 they must begin alike, else the engine
has other weights. In 16 and 8 bits nearly equal logits order differently, and the row "tokens equal
to ours" says how often.

`make engines` takes some minutes, llama.cpp is compiled there. A setting takes about a minute to
start, and then 3 rounds of 4 batch sizes about 8 minutes with one thread. So choose pieces:
--engines, --dtypes, --threads, --batches. PageBrain cannot be compared here: it has no package.

How it is checked: tests/experiments/test_engines.py runs our own engine twice, in two processes,
and stand-ins that are missing, die, or generate other tokens.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.load import load_model, weights_kind
from experiments.ceilings import Columns
from experiments.peer_engines.protocol import Task
from experiments.results import ROOT, Measurement, device_name

OURS = "PagedGPT"
SCRIPTS = Path(__file__).parent / "peer_engines"
WARM_UP_TOKENS = 6  # the first comes from the prefill, so 5 steps
PAUSE_S = 0.3  # between two engines: threads that have just worked still wait actively for a while
MUST_BEGIN_ALIKE = 0.9  # share of the sequences with our first token, in float32


@dataclass(frozen=True)
class Peer:
    """Where an engine runs, and what is loaded before its process starts."""

    script: str  # of peer_engines/; "" if the engine cannot be installed
    folder: str  # its virtual environment, in the folder of --environments
    preload: tuple[str, ...] = ()  # libraries, where the environment or the system has them
    package: str = ""  # in our own environment it may be too


PEERS = {
    OURS: Peer("run_ours", ""),
    "vLLM": Peer("run_vllm", "vllm", ("libtcmalloc_minimal.so.4", "libiomp5.so")),
    "OpenVINO": Peer("run_openvino", "openvino"),
    "CTranslate2": Peer("run_ctranslate2", "ctranslate2"),
    "llama.cpp": Peer("run_llama_cpp", "llama_cpp"),
    "transformers": Peer("run_transformers", "transformers", package="transformers"),
    "PageBrain": Peer("", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `engines`."""
    add = parser.add_argument
    add("--environments", type=Path, default=ROOT / ".engines", help="folder of the environments")
    add(
        "--engines",
        nargs="+",
        default=[*PEERS],
        choices=[*PEERS],
        metavar="ENGINE",
        help=", ".join(PEERS),
    )
    add("--model", default="random:gpt2", help="a folder or a name, or random:gpt2")
    dtypes = ["float32", "bfloat16", "int8"]
    add("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="in turn")
    add("--threads", type=int, nargs="+", default=[1, 2], help="of each engine, pinned; in turn")
    add("--batches", type=int, nargs="+", default=[1, 4, 8, 32], help="sequences at once")
    add("--prompt-tokens", type=int, default=256, help="tokens of each prompt, at random")
    add("--new-tokens", type=int, default=32, help="tokens that each sequence adds")
    add("--rounds", type=int, default=3, help="each measures every engine once")
    add("--seed", type=int, default=0, help="of the prompts")


# ---- a process for each engine -------------------------------------------------------------------
class LeftOut(Exception):
    """An engine does not run here; the message says why."""


def python_of(peer: Peer, environments: Path) -> str:
    """The interpreter that has the engine's packages. Raises LeftOut if there is none."""
    if not peer.script:
        raise LeftOut("no package of it can be installed")
    if not peer.folder:
        return sys.executable
    python = environments / peer.folder / "bin" / "python"
    if python.exists():
        return str(python)
    if peer.package and importlib.util.find_spec(peer.package):
        return sys.executable
    raise LeftOut(f"{environments / peer.folder} is no virtual environment (see: make engines)")


def environment_of(peer: Peer, python: str, threads: int) -> dict[str, str]:
    """The variables of an engine's process."""
    count = str(threads)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    folders = [Path(python).parent.parent / "lib", *map(Path, ("/usr/lib/x86_64-linux-gnu",))]
    found = [
        next((str(folder / name) for folder in folders if (folder / name).exists()), "")
        for name in peer.preload
    ]
    if preload := ":".join(filter(None, found)):
        env["LD_PRELOAD"] = preload
    return env


class Process:
    """The process of an engine. It answers one run at a time. Use it as a context manager."""

    def __init__(self, name: str, task: Task, environments: Path):
        """Start it and wait until its weights are loaded. Raises LeftOut if it cannot run."""
        peer = PEERS[name]
        python = python_of(peer, environments)
        script = SCRIPTS / f"{peer.script}.py"
        ours = ["-m", f"experiments.peer_engines.{peer.script}"]
        self.log = tempfile.TemporaryFile()  # what the engine prints
        self.process = subprocess.Popen(
            [python, *([str(script)] if peer.folder else ours), task.as_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env=environment_of(peer, python, task.threads),
            encoding="utf-8",
            preexec_fn=lambda: pin(task.threads),
        )
        try:
            greeting = self.read()
            if "unsupported" in greeting:
                raise LeftOut(greeting["unsupported"])
        except BaseException:
            self.close()
            raise
        self.backend = f"{greeting['version']}: {greeting['settings']}"

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One run; the answer is described in protocol.py. Raises LeftOut if the process dies."""
        with suppress(BrokenPipeError):  # then `read` says how it ended
            request = json.dumps({"prompts": prompts, "new_tokens": new_tokens})
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer. Raises LeftOut with the engine's last words if there is none."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        words = self.log.read().decode("utf-8", "replace").strip().splitlines()
        raise LeftOut(f"its process ended with {code}: {words[-1] if words else 'no word'}")

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def pin(threads: int) -> None:
    """Bind this process to the first cores that it may use, one a thread. Linux only."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


# ---- measuring -----------------------------------------------------------------------------------
Answers = dict[str, list[dict[str, Any]]]  # engine -> its answers, one a round


def say(name: str, reason: object) -> None:
    """One line about an engine that is left out."""
    print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)


def installed(args: argparse.Namespace) -> list[str]:
    """The engines that have an environment here; the others are named, a line each."""
    names = []
    for name in args.engines:
        try:
            python_of(PEERS[name], args.environments)
            names.append(name)
        except LeftOut as reason:
            say(name, reason)
    return names


def start_all(
    names: list[str], args: argparse.Namespace, dtype: str, threads: int, stack: ExitStack
) -> dict[str, Process]:
    """The processes of the engines that can do this, by name; the others are named."""
    processes = {}
    for name in names:
        own_files = args.environments / "models" / f"{file_name(args.model)}-{PEERS[name].script}"
        task = Task(
            model=str(args.environments / "models" / file_name(args.model)),
            own_files=f"{own_files}{'-int8' if dtype == 'int8' else ''}",
            dtype=dtype,
            threads=threads,
            max_batch=max(args.batches),
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
        )
        try:
            processes[name] = stack.enter_context(Process(name, task, args.environments))
        except LeftOut as reason:
            say(name, f"{dtype}, {reason}")
    return processes


def rounds(
    processes: dict[str, Process], prompts: list[list[int]], args: argparse.Namespace
) -> Answers:
    """All engines in turn, after a round that warms them up. One that dies is left out."""
    answers: Answers = {name: [] for name in processes}
    for number in range(args.rounds + 1):
        for name in [*answers]:
            time.sleep(PAUSE_S)
            try:
                new_tokens = args.new_tokens if number else min(WARM_UP_TOKENS, args.new_tokens)
                answer = processes[name].run(prompts, new_tokens)
            except LeftOut as reason:
                say(name, reason)
                del answers[name]
            else:
                if number:
                    answers[name].append(answer)
    return answers


def share_equal(ours: list[list[int]], theirs: list[list[int]], first: int | None = None) -> float:
    """The share of equal tokens at equal places, of all or of the `first` ones of each sequence."""
    pairs = [
        a == b
        for own, other in zip(ours, theirs, strict=True)
        for a, b in zip(own[:first], other[:first], strict=True)
    ]
    return sum(pairs) / len(pairs)


def rates(answers: list[dict[str, Any]], prompt_tokens: int) -> dict[str, list[float]]:
    """Tokens a second of the decode and of the prefill, one of each a round."""
    batch = len(answers[0]["tokens"])
    all_tokens = batch * len(answers[0]["tokens"][0])
    return {
        "decode": [
            (all_tokens - answer["first_tokens"]) / (answer["total_s"] - answer["first_s"])
            for answer in answers
        ],
        "prefill": [batch * prompt_tokens / answer["first_s"] for answer in answers],
    }


METRICS = {"decode": "generated tokens", "prefill": "prompt tokens"}


def rows_of(
    answers: Answers, backends: dict[str, str], args: argparse.Namespace, common: Columns
) -> Iterator[Measurement]:
    """The rates of each engine, ours divided by theirs, and the share of equal tokens."""
    measured = {name: rates(runs, args.prompt_tokens) for name, runs in answers.items()}
    for name, phases in measured.items():
        columns = common | {"contender": name, "backend": backends[name]}
        for phase, values in phases.items():
            yield Measurement.of(values, metric=METRICS[phase], unit="tokens/s", **columns)
        if name == OURS or OURS not in measured:
            continue
        for phase, values in phases.items():
            against = {"metric": f"{phase}: ours against it", "unit": "x"}
            yield Measurement.ratio_of(measured[OURS][phase], values, **against, **columns)
        equal = share_equal(answers[OURS][0]["tokens"], answers[name][0]["tokens"])
        yield Measurement.of([100 * equal], metric="tokens equal to ours", unit="%", **columns)


def check_same_weights(answers: Answers, dtype: str) -> None:
    """Raise ValueError if an engine does not begin as ours does, in float32."""
    for name in answers:
        if dtype != "float32" or OURS not in answers:
            return
        alike = share_equal(answers[OURS][0]["tokens"], answers[name][0]["tokens"], first=1)
        if alike < MUST_BEGIN_ALIKE:
            found = f"{alike:.0%} of its sequences begin with our token"
            raise ValueError(f"{name}: {found}: it has other weights, or computes otherwise")


def random_prompts(vocab_size: int, batch: int, args: argparse.Namespace) -> list[list[int]]:
    """Token ids, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(vocab_size, (batch, args.prompt_tokens), generator=generator).tolist()


def file_name(model: str) -> str:
    """A model's name as the name of a folder. Example: "random:gpt2" -> "random-gpt2"."""
    return "".join(letter if letter.isalnum() else "-" for letter in model.strip("/"))


def save_weights(args: argparse.Namespace) -> int:
    """Write the weights once, for all engines to read; return the size of the vocabulary."""
    from checkpoints.train_tiny import save_model

    folder = args.environments / "models" / file_name(args.model)
    if not (folder / "model.safetensors").exists():  # the last that is written
        save_model(load_model(args.model), folder, torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = args.prompt_tokens + args.new_tokens
    if length > config["n_positions"]:
        raise ValueError(
            f"{length} tokens a sequence: the model has {config['n_positions']} positions"
        )
    return config["vocab_size"]


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `engines`."""
    names = installed(args)
    vocab_size = save_weights(args)
    common = {"experiment": "engines", "device": device_name(), "seed": args.seed}
    common |= {"model": args.model, "weights": weights_kind(args.model)}
    for dtype in args.dtypes:
        for threads in args.threads:
            with ExitStack() as stack:
                processes = start_all(names, args, dtype, threads, stack)
                for batch in args.batches:
                    prompts = random_prompts(vocab_size, batch, args)
                    answers = rounds(processes, prompts, args)
                    check_same_weights(answers, dtype)
                    workload = f"batch={batch} prompt={args.prompt_tokens} new={args.new_tokens}"
                    columns = common | {"dtype": dtype, "threads": threads, "workload": workload}
                    backends = {name: processes[name].backend for name in answers}
                    yield from rows_of(answers, backends, args, columns)
