"""One line of JSON a step, written from outside the engine: all that is drawn comes from it.

An engine forgets each step with the next: who was preempted in step 40, and which blocks were free
then, nobody can say in step 41. A `Recorder` stands around the engine, passes every call on, and
after each step writes down who ran, how far each one is and which blocks it holds:

    {"format": "PagedGPT recording", "num_blocks": 60, "block_size": 8, ...}          the header
    {"step": 1, "num_free": 39, "sequences": [{"request": "0", "phase": "prefill",
     "new_tokens": 14, "num_computed_tokens": 14, "block_table": [0, 1], ...}, ...], ...}
    {"step": 2, ...          <- cut off here by Ctrl-C: the lines before it are whole

A line says what holds between its step and the next: whoever ended in it has given its blocks back.
Each holds the whole tables of those who run, so that one line alone is a picture of the pool; of
those who wait only the comings and goings, for 100,000 may wait. `holders` and `strips` turn lines
into what pictures show. What a production engine does beyond this: counters for a monitoring
system, and traces that span several machines.

vLLM counts the same things of a step in its V1 engine's SchedulerStats and IterationStats.
Run: python -m watch.recorder
Try: num_blocks=7 in the demo (three requests are preempted), or `print(lines[3])` in it.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

from block_allocator import BlockAllocator
from engine import InferenceEngine
from kv_cache import Batch, KVCache
from outputs import StepOutput
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import FINISHED, Sequence

FORMAT, VERSION = "PagedGPT recording", 1

# What every line has, and of which kind; `int` is never a bool and never negative.
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
SEQUENCE_FIELDS = {
    "request": str,
    "index": int,
    "phase": str | None,  # "prefill", "decode", or None: it ran nothing in this step
    "new_tokens": int,
    "num_computed_tokens": int,
    "finish_reason": str | None,  # None while it runs
    "block_table": list,
}


# ---- writing -------------------------------------------------------------------------------------
class Recorder:
    """An engine with a diary: `step`, `add_request`, `abort`, `has_unfinished` as the engine's.

    What stood at `path` is replaced. `about` are further words of the header, for example
    `model="assets/tiny-gpt2"`. A request that was queued before the recorder came is recorded
    from its first step on. Raises OSError where the file cannot be written, ValueError for an
    engine that plans ahead: what is seen after its steps belongs to the next ones.
    """

    steps_overlap = False

    def __init__(self, engine: InferenceEngine, path: str | Path, **about: str):
        if engine.steps_overlap:
            raise ValueError("steps that were planned ahead overlap: record without plan_ahead")
        self.engine, self.path = engine, Path(path)
        self._num_steps = 0
        self._added: list[tuple[str, int]] = []
        self._aborted: list[str] = []
        allocator = engine.scheduler.allocator
        sizes = {"num_blocks": allocator.num_blocks, "block_size": allocator.block_size}
        self.path.write_text("", encoding="utf-8")
        self._write({"format": FORMAT, "version": VERSION} | about | sizes)

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def has_unfinished(self) -> bool:
        return self.engine.has_unfinished()

    def add_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options
    ) -> str:
        """Queue a prompt as the engine does; a refused one is not recorded."""
        request_id = self.engine.add_request(prompt, params, **options)
        self._added.append((request_id, 1 if params is None else params.n))
        return request_id

    def abort(self, request_id: str) -> bool:
        """End a request as the engine does; the line of the next step says so."""
        is_known = self.engine.abort(request_id)
        if is_known:
            self._aborted.append(request_id)
        return is_known

    def step(self) -> StepOutput:
        """Run one step and write its line. A step that raised has no line."""
        output = self.engine.step()
        self._num_steps += 1
        self._write(self._line(output))
        self._added, self._aborted = [], []
        return output

    def _line(self, output: StepOutput) -> dict:
        """What `STEP_FIELDS` names."""
        scheduled = {seq: num_new_tokens for seq, _, num_new_tokens in output.plan.scheduled}
        # Those who ran, and those who hold blocks without having run: fresh forks, and whoever
        # the step's budget did not reach.
        everybody = scheduled | {s: 0 for s in self.scheduler.running if s not in scheduled}
        return {
            "step": self._num_steps,
            "milliseconds": round(output.milliseconds, 3),
            "sequences": [_entry(seq, num) for seq, num in everybody.items()],
            "added": self._added,
            "aborted": self._aborted,
            "preempted": [(seq.request.request_id, seq.index) for seq in output.plan.preempted],
            "num_waiting": self.scheduler.num_waiting,
            "num_free": self.scheduler.allocator.num_free,
            "blocks_taken": output.blocks_taken,
            "blocks_freed": output.blocks_freed,
            "blocks_copied": output.blocks_copied,
            "blocks_hit": output.blocks_hit,
            "blocks_evicted": output.blocks_evicted,
            "blocks_swapped": output.blocks_swapped,
        }

    def _write(self, record: dict) -> None:
        # Opened for each line and closed behind it, so that nobody has to close a recorder, and
        # whatever happens next, the steps that were run are in the file.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def _entry(seq: Sequence, num_new_tokens: int) -> dict:
    """What `SEQUENCE_FIELDS` names."""
    # As in the glossary: many new tokens are a prefill, also after a preemption; one is a decode.
    phase = "prefill" if num_new_tokens > 1 else "decode" if num_new_tokens else None
    # A sequence without future, a beam say, is ended by its strategy, which gives no reason.
    ended = (seq.finish_reason or "dropped") if seq.status == FINISHED else None
    return {
        "request": seq.request.request_id,
        "index": seq.index,
        "phase": phase,
        "new_tokens": num_new_tokens,
        "num_computed_tokens": seq.num_computed_tokens,
        "finish_reason": ended,
        "block_table": seq.block_table,
    }


# ---- reading -------------------------------------------------------------------------------------
def read_recording(path: str | Path) -> tuple[dict, list[dict]]:
    """The header and the steps of a recording, as dicts.

    A last line that was cut off is left out. Raises ValueError with the file, the line and the
    reason for anything else that a recorder would not have written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    *lines, rest = text.split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _check_step(record, records) if records else _check_header(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        records.append(record)
    if not records:
        found = "the file is empty" if not rest else "its only line is cut off"
        raise ValueError(f"{path}, line 1: {found}: a recording begins with its header")
    return records[0], records[1:]


def _check_header(header: object) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"no header: a recording's first line names the format {FORMAT!r}")
    if header.get("version") != VERSION:
        found = header.get("version")
        raise ValueError(
            f"version {found!r} of the format, this reader knows {VERSION}: record anew"
        )
    for name in ("num_blocks", "block_size"):
        if type(header.get(name)) is not int or header[name] < 1:
            raise ValueError(f"{name} is {header.get(name)!r}: it must be an integer of at least 1")


def _check_step(step: object, before: list[dict]) -> None:
    """Raise ValueError with the reason if a line cannot follow the header and steps `before` it."""
    _check_fields(step, STEP_FIELDS)
    if step["step"] != len(before):
        raise ValueError(f"step {step['step']} stands where step {len(before)} belongs")
    pairs = [*step["added"], *step["preempted"], *([request, 0] for request in step["aborted"])]
    for pair in pairs:
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, int]:
            raise ValueError(f"{pair!r} where a request and a number belong")
    num_blocks, held = before[0]["num_blocks"], set()
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


def _check_fields(record: object, kinds: dict) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} where an object with {', '.join(kinds)} belongs")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"there is no {name!r}")
        value = record[name]
        # JSON has one kind of number: 3 milliseconds are 3.0 and 3.
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or isinstance(value, bool):
            raise ValueError(f"{name!r} is {value!r}")
        if kind in (int, float) and not 0 <= value < math.inf:
            raise ValueError(f"{name!r} is {value}: it must be at least 0, and finite")


# ---- what lines say ------------------------------------------------------------------------------
def holders(header: dict, step: dict) -> list[list[str]]:
    """For each block of the pool the requests whose tables name it, once for each sequence.

    Example: `[["0"], [], ["0", "0"]]`: block 1 is free, two sequences of a request share block 2.
    """
    held: list[list[str]] = [[] for _ in range(header["num_blocks"])]
    for sequence in step["sequences"]:
        for block_id in sequence["block_table"]:
            held[block_id].append(sequence["request"])
    return held


def strips(steps: list[dict]) -> dict[tuple[str, int], str]:
    """A sequence's life, one letter a step, by (request, index), in the order of arrival.

    `P` many new tokens, `d` one, `.` waits, `x` preempted, a blank before and after its life.
    """
    rows: dict[tuple[str, int], str] = {}
    ended: set[tuple[str, int]] = set()
    for number, step in enumerate(steps):
        marks = {tuple(key): "x" for key in step["preempted"]}
        for sequence in step["sequences"]:
            mark = {"prefill": "P", "decode": "d", None: "."}[sequence["phase"]]
            marks[sequence["request"], sequence["index"]] = mark
        added = [(request, i) for request, n in step["added"] for i in range(n)]
        for key in [*added, *marks]:  # forks, and who came before the recorder, were never added
            rows.setdefault(key, " " * number)
        ended |= {key for key in rows if key[0] in step["aborted"]}
        for key in rows:
            rows[key] += marks.get(key, " " if key in ended else ".")
        for sequence in step["sequences"]:
            if sequence["finish_reason"] is not None:
                ended.add((sequence["request"], sequence["index"]))
    return rows


# --------------------------------------------------------------------------------------------------
def demo():
    """Five requests through a pool of 8 blocks of 4, recorded, read back, and cut off."""

    def forward(batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.sample_rows), 2)  # a stand-in for the model: always token 0

    cache = KVCache(num_layers=1, num_blocks=8, block_size=4, num_kv_heads=1, head_dim=1)
    scheduler = Scheduler(BlockAllocator(8, 4), 4, max_num_batched_tokens=16, max_seq_len=64)
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.jsonl"
        recorder = Recorder(engine, path, model="a stand-in")
        for prompt, wanted in ((6, 9), (10, 12), (3, 4), (5, 6), (8, 5)):
            recorder.add_request([1] * prompt, SamplingParams(temperature=0, max_tokens=wanted))
        while recorder.has_unfinished():
            recorder.step()
        lines = path.read_text().splitlines()
        header, steps = read_recording(path)
        path.write_text("\n".join(lines)[:-9])  # as if interrupted while the last line was written
        whole = read_recording(path)[1]

    print(f"{lines[0]}\n{lines[1][:90]}...\n{len(lines) - 1} steps, {len(lines[1])} bytes a line\n")
    print("step  pool        taken freed free waiting")
    for step in steps[:6]:
        held = holders(header, step)
        cells = "".join("ABCDE"[int(requests[0])] if requests else "." for requests in held)
        counts = step["blocks_taken"], step["blocks_freed"], step["num_free"], step["num_waiting"]
        print("{:4}  |{}|  {:5} {:5} {:4} {:7}".format(step["step"], cells, *counts))
        assert sum(1 for requests in held if requests) == 8 - step["num_free"]
    print("\nP many new tokens, d one, . waits, x preempted")
    for (request, _), strip in strips(steps).items():
        print(f"{'ABCDE'[int(request)]} {strip}")
    marks = "".join(strips(steps).values())
    assert marks.count("x") == scheduler.num_preemptions > 0
    assert whole == steps[:-1] and all(step["milliseconds"] > 0 for step in steps)
    print(
        "ok: every block of every step has the owner that the tables name; a cut line costs a line"
    )


if __name__ == "__main__":
    demo()
