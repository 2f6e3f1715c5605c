"""How the process of an engine talks to `benchmark.py engines`: one line of JSON a run.

    benchmark.py                             the engine's process
    starts it with a Task            ──────> loads the weights
                                     <────── {"version": "0.32.0", "settings": "..."}
    {"prompts": [[5, 17], ..],       ──────> generates
     "new_tokens": 32}               <────── {"first_s": 0.4, "first_tokens": 8, "total_s": 2.1,
                                              "tokens": [[..], ..]}
    closes its standard input        ──────> ends

A process that cannot do what the task asks answers {"unsupported": "why"} instead of the first
line. Between two runs it waits for a line, so it takes no time from the other engines.

`first_s` are the seconds until every sequence has its first token: the prefill. The decode is what
comes after it: `total_s - first_s` seconds for all tokens but the `first_tokens` that were there by
then. An engine that computes some prompts later than others is measured rightly too.

Only the standard library is imported here: the file runs in every engine's environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """What a process is started for."""

    model: str  # a folder: config.json and model.safetensors, float32, as transformers writes them
    own_files: str  # a folder for the engine's own form of the weights
    dtype: str  # float32, bfloat16 or int8
    threads: int
    max_batch: int  # sequences at once, at most
    prompt_tokens: int  # of each sequence
    new_tokens: int  # of each sequence, at most

    @property
    def max_seq_len(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_tokens + self.new_tokens

    def as_json(self) -> str:
        """The argument that `serve` reads."""
        return json.dumps(asdict(self))


def written_once(path: Path, write: Callable[[Path], None]) -> str:
    """A file or a folder, written if it does not exist.

    It is written under another name: the half that a stopped process leaves is never read.
    """
    if not path.exists():
        part = path.with_name(f".new-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    return str(path)


class Unsupported(Exception):
    """The engine cannot do this task; the message says why."""


class Engine(Protocol):
    """What a script defines. It is made with a Task."""

    version: str
    settings: str  # in words: what a reader needs to repeat the run

    def prepare(self, prompts: list[list[int]]) -> None:
        """Make ready for as many prompts as these. Not timed."""

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, never ending early; call on_token(i) for a new token of prompt i."""


class Clock:
    """Notes when each of `num_sequences` sequences had its first token. It starts when made."""

    def __init__(self, num_sequences: int):
        self.without_token = set(range(num_sequences))
        self.num_tokens = 0
        self.first_s = 0.0
        self.first_tokens = 0
        self.started = time.perf_counter()

    def on_token(self, sequence: int) -> None:
        """A token of a sequence is there."""
        self.num_tokens += 1
        if sequence in self.without_token:
            self.without_token.remove(sequence)
            # Overwritten until the last sequence has its first token.
            self.first_s = time.perf_counter() - self.started
        if not self.without_token and not self.first_tokens:
            self.first_tokens = self.num_tokens


def measure(engine: Engine, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """One run, as the answer that the module's docstring shows."""
    clock = Clock(len(prompts))
    tokens = engine.generate(prompts, new_tokens, clock.on_token)
    total_s = time.perf_counter() - clock.started
    lengths = {len(sequence) for sequence in tokens}
    assert lengths == {new_tokens}, f"sequences of {lengths} new tokens instead of {new_tokens}"
    assert clock.num_tokens == len(prompts) * new_tokens, "tokens were not counted"
    counted = {"first_s": clock.first_s, "first_tokens": clock.first_tokens}
    return counted | {"total_s": total_s, "tokens": tokens}


def serve(make_engine: Callable[[Task], Engine]) -> None:
    """Answer one line a run until standard input ends."""
    # Libraries print to standard output. From here on that goes to standard error, and the answers
    # go to a copy of the old standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        engine = make_engine(Task(**json.loads(sys.argv[1])))
    except (Unsupported, ImportError) as error:
        answer({"unsupported": str(error)})
        return
    answer({"version": engine.version, "settings": engine.settings})
    batch = 0
    for line in sys.stdin:
        request = json.loads(line)
        if len(request["prompts"]) != batch:
            engine.prepare(request["prompts"])
            batch = len(request["prompts"])
        answer(measure(engine, request["prompts"], request["new_tokens"]))
