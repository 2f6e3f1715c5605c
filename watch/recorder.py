"""A recording of a run: one line of JSON a step. The pictures are drawn from it.

An engine keeps no history. After step 41 it cannot say which request was preempted in step 40, and
which blocks were free then. A `Recorder` is a watcher: the engine calls it after each step. It
writes a line: who ran, how many tokens each sequence has in the cache, and which blocks it holds:

    {"format": "PagedGPT recording", "num_blocks": 60, "block_size": 8, ...}          the header
    {"step": 1, "num_free": 39, "sequences": [{"request": "0", "phase": "prefill",
     "new_tokens": 14, "num_computed_tokens": 14, "block_table": [0, 1], ...}, ...],
     "tokens": [["0", 0, 0, ["Once", " upon", " a", ...]], ...], ...}
    {"step": 2, ...          <- cut off here by Ctrl-C: the lines above are complete

A line is the state between its step and the next one: a sequence that ended in the step has no
blocks any more. An engine that plans ahead has planned the next step by then, so the next step's
tokens and blocks are in the line already. A line holds the block tables of all running sequences,
so it is enough to draw the pool. Of the waiting requests a line names only those that arrived or
were aborted, because many thousands may wait. A token is written once, in the first line in which
its sequence runs: a recording holds the texts of prompts and answers. `holders` and `strips` turn
lines into what the pictures show; `serving/view.js` does the same for the pages.

The tests compare each line with the scheduler's state after the step, and read recordings that
were damaged. vLLM counts the same things of a step in SchedulerStats and IterationStats.
"""

import json
import math
from pathlib import Path
from typing import Any

from outputs import StepOutput, Tokenizer
from scheduler import Scheduler
from sequence import FINISHED, Sequence

FORMAT, VERSION = "PagedGPT recording", 1
BLOCKS_A_LINE = 128  # how many cached blocks are listed a line, on average

# The fields of a line and their types. An `int` is at least 0, and not a bool.
STEP_FIELDS = {
    "step": int,
    "milliseconds": float,
    "sequences": list,
    "added": list,  # [request, number of sequences], since the step before
    "aborted": list,  # requests, since the step before
    "preempted": list,  # [request, index]
    "num_waiting": int,
    "num_free": int,
    "blocks_taken": int,
    "blocks_freed": int,
    "blocks_copied": int,
    "blocks_hit": int,
    "blocks_evicted": int,
    "blocks_swapped": int,
}
# Fields that older recordings lack. Each is a list.
NEWER_FIELDS = {
    "tokens",  # [request, index, first position, texts of the tokens from there on]
    "copies",  # [from block, to block], before the forward: copy-on-write
    # Blocks that are cached and have no holder. They count as free. A line without it: see below.
    "cached",
}
SEQUENCE_FIELDS = {
    "request": str,
    "index": int,
    "phase": str | None,  # "prefill", "decode", or None: it was not in this step
    "new_tokens": int,
    "num_computed_tokens": int,
    "finish_reason": str | None,  # None while it runs
    "block_table": list,
}


# ---- writing -------------------------------------------------------------------------------------
class Describer:
    """Turns the output of each step into the fields of a line. It remembers what it told.

    It is a part of a watcher: call it once a step, in the thread that steps. To list the cached
    blocks of a large pool takes as long as a small step, so only every 8th line of a pool of 1,024
    blocks does it. In between, those that nobody has taken are still cached.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.num_steps = 0
        # How many of its tokens were told, for each sequence that runs or waits. A fork is a
        # sequence of its own, so all of its tokens are told with its first line.
        self.num_told: dict[Sequence, int] = {}
        self._lists_cached_from = 0  # the next step with a list of the cached blocks

    def tell_all_again(self) -> None:
        """For a new reader: the next line has all tokens of its sequences, and cached blocks."""
        self.num_told.clear()
        self._lists_cached_from = 0

    @property
    def header(self) -> dict:
        """The fields of the first line."""
        allocator = self.scheduler.allocator
        sizes = {"num_blocks": allocator.num_blocks, "block_size": allocator.block_size}
        return {"format": FORMAT, "version": VERSION} | sizes

    def __call__(self, output: StepOutput) -> dict:
        """The fields of STEP_FIELDS and NEWER_FIELDS after a step."""
        self.num_steps += 1
        scheduled = {seq: num_new_tokens for seq, _, num_new_tokens in output.plan.scheduled}
        # Other running sequences hold blocks too: forks made in this step, and sequences that got
        # no tokens because the step's budget was used up.
        others = {seq: 0 for seq in self.scheduler.running if seq not in scheduled}
        num_new_tokens_of = scheduled | others
        for request in output.aborted:
            for seq in request.sequences:
                self.num_told.pop(seq, None)
        return {
            "step": self.num_steps,
            "milliseconds": round(output.timings.total, 3),
            "sequences": [_entry(seq, num) for seq, num in num_new_tokens_of.items()],
            "added": [(request.request_id, 1) for request in output.added],  # its forks come later
            "aborted": [request.request_id for request in output.aborted],
            "preempted": [(seq.request.request_id, seq.index) for seq in output.plan.preempted],
            "num_waiting": self.scheduler.num_waiting,
            "num_free": self.scheduler.allocator.num_free,
            **{f"blocks_{name}": num for name, num in output.blocks._asdict().items()},
            "tokens": self._new_tokens(list(num_new_tokens_of), output.tokenizer),
            "copies": output.plan.copies,
            **self._cached(),
        }

    def _cached(self) -> dict:
        """The field "cached", if this line has it; the last line of a run always has."""
        allocator = self.scheduler.allocator
        if self.num_steps < self._lists_cached_from and self.scheduler.has_unfinished():
            return {}
        self._lists_cached_from = self.num_steps + allocator.num_blocks // BLOCKS_A_LINE
        return {"cached": allocator.unused_cached_blocks}

    def _new_tokens(self, sequences: list[Sequence], tokenizer: Tokenizer | None) -> list[tuple]:
        """The tokens that were not told yet; without a tokenizer their ids as text."""
        as_text = str if tokenizer is None else tokenizer.token_text
        entries = []
        for seq in sequences:
            first = self.num_told.get(seq, 0)
            texts = [as_text(token_id) for token_id in seq.token_ids[first:]]
            self.num_told[seq] = first + len(texts)
            if texts:
                entries.append((seq.request.request_id, seq.index, first, texts))
            if seq.status == FINISHED:
                del self.num_told[seq]
        return entries


class Recorder:
    """A watcher that writes a line after each step: `engine.watchers.append(recorder)`.

    A file at `path` is replaced. `about` are more fields of the header, for example
    `model="assets/tiny-gpt2"`. A request that ran before the recorder was made appears with its
    next step. Raises OSError if the file cannot be written. (If that happens during a run, the
    engine removes the recorder with a warning and goes on.)
    """

    def __init__(self, scheduler: Scheduler, path: str | Path, **about: str):
        self.path = Path(path)
        self.describe = Describer(scheduler)
        # Opening a file takes longer than writing a line, so it stays open. It has no buffer: each
        # finished step is in the file even if the process is killed, and there is no close().
        self._file = self.path.open("wb", buffering=0)
        self._write(self.describe.header | about)

    def __call__(self, output: StepOutput) -> None:
        """Write the line of a step that has just run."""
        self._write(self.describe(output))

    def _write(self, record: dict) -> None:
        line = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        while line:  # a disk that is nearly full takes a part of it, then raises
            line = line[self._file.write(line) :]


def _entry(seq: Sequence, num_new_tokens: int) -> dict:
    """The fields of SEQUENCE_FIELDS after a step."""
    phase = None
    if num_new_tokens > 1:  # a prompt, or all tokens again after a preemption
        phase = "prefill"
    elif num_new_tokens == 1:
        phase = "decode"
    # A strategy may drop a sequence, as beam search does with a bad beam: it has no finish_reason.
    finish_reason = (seq.finish_reason or "dropped") if seq.status == FINISHED else None
    return {
        "request": seq.request.request_id,
        "index": seq.index,
        "phase": phase,
        "new_tokens": num_new_tokens,
        "num_computed_tokens": seq.num_computed_tokens,
        "finish_reason": finish_reason,
        "block_table": seq.block_table,
    }


# ---- reading -------------------------------------------------------------------------------------
def read_recording(path: str | Path) -> tuple[dict, list[dict]]:
    """The header and the steps of a recording.

    A last line without its end is left out. Raises ValueError with the file, the line and the
    reason if anything else differs from what a recorder writes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    *lines, unfinished = text.split("\n")
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if records:
                _check_step(record, records)
            else:
                _check_header(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        records.append(record)
    if not records:
        found = "its only line is cut off" if unfinished else "the file is empty"
        raise ValueError(f"{path}, line 1: {found}: a recording begins with its header")
    return records[0], records[1:]


def _check_header(header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"no header: a recording's first line names the format {FORMAT!r}")
    if header.get("version") != VERSION:
        found = header.get("version")
        raise ValueError(
            f"version {found!r} of the format, this reader knows {VERSION}: record again"
        )
    for name in ("num_blocks", "block_size"):
        if type(header.get(name)) is not int or header[name] < 1:
            raise ValueError(f"{name} is {header.get(name)!r}: it must be an integer of at least 1")


def _check_step(step: Any, records: list[dict]) -> None:
    """Raise ValueError with the reason if a line cannot follow `records`, the header and steps."""
    _check_fields(step, STEP_FIELDS)
    if step["step"] != len(records):
        raise ValueError(f"step {step['step']} stands where step {len(records)} belongs")
    aborted = [[request, 0] for request in step["aborted"]]
    for pair in [*step["added"], *step["preempted"], *aborted]:
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, int]:
            raise ValueError(f"{pair!r} where a request and a number belong")
    for name in NEWER_FIELDS & step.keys():
        if not isinstance(step[name], list):
            raise ValueError(f"{name!r} is {step[name]!r}")
    num_blocks = records[0]["num_blocks"]
    held: set[int] = set()
    for sequence in step["sequences"]:
        _check_fields(sequence, SEQUENCE_FIELDS)
        if sequence["phase"] not in ("prefill", "decode", None):
            raise ValueError(f"'phase' is {sequence['phase']!r}")
        for block_id in sequence["block_table"]:
            if type(block_id) is not int or not 0 <= block_id < num_blocks:
                raise ValueError(f"block {block_id!r} in a table, the pool has {num_blocks}")
        held.update(sequence["block_table"])
    if len(held) + step["num_free"] > num_blocks:
        counts = f"{len(held)} blocks are held and {step['num_free']} free"
        raise ValueError(f"{counts}, the pool has {num_blocks}")


def _check_fields(record: Any, kinds: dict) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} where an object with {', '.join(kinds)} belongs")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"there is no {name!r}")
        value = record[name]
        # JSON has one type of number: 3.0 milliseconds may be written as 3.
        has_kind = isinstance(value, int | float if kind is float else kind)
        if not has_kind or isinstance(value, bool):
            raise ValueError(f"{name!r} is {value!r}")
        if kind in (int, float) and not 0 <= value < math.inf:
            raise ValueError(f"{name!r} is {value}: it must be at least 0, and finite")


# ---- what pictures show --------------------------------------------------------------------------
def holders(header: dict, step: dict) -> list[list[str]]:
    """For each block of the pool, the request of each sequence that has it in its table.

    Example: `[["0"], [], ["0", "0"]]`: block 1 is free, two sequences of request 0 share block 2.
    """
    held: list[list[str]] = [[] for _ in range(header["num_blocks"])]
    for sequence in step["sequences"]:
        for block_id in sequence["block_table"]:
            held[block_id].append(sequence["request"])
    return held


def strips(steps: list[dict]) -> dict[tuple[str, int], str]:
    """One letter a step for each sequence, by (request, index), in the order of arrival.

    `P` prefill, `d` decode, `.` waiting, `x` preempted; blank before its arrival and after its end.
    Example: a request that waits one step, writes three tokens and ends: `".Pdd "`.
    """
    rows: dict[tuple[str, int], str] = {}
    ended: set[tuple[str, int]] = set()
    for number, step in enumerate(steps):
        letters = {tuple(key): "x" for key in step["preempted"]}
        for sequence in step["sequences"]:
            letter = {"prefill": "P", "decode": "d", None: "."}[sequence["phase"]]
            letters[sequence["request"], sequence["index"]] = letter
        added = [(request, i) for request, n in step["added"] for i in range(n)]
        # A fork is never in "added", nor is a request that was there before the recorder.
        for key in [*added, *letters]:
            rows.setdefault(key, " " * number)
        ended |= {key for key in rows if key[0] in step["aborted"]}
        for key in rows:
            rows[key] += letters.get(key, " " if key in ended else ".")
        for sequence in step["sequences"]:
            if sequence["finish_reason"] is not None:
                ended.add((sequence["request"], sequence["index"]))
    return rows
