"""The tree of blocks that sequences share, drawn as it forks, with reference counts.

Four texts of one prompt have four block tables. They name the same blocks until one of them writes:
then the writer gets a copy of that block, and later blocks of its own. A `TreeScreen` is a watcher
that draws the tree after each step in which a sequence forked or ended, or a block was copied:

    step 1: 2 blocks held / 8 without sharing
    [0 1]x4┬  ' a king'                  [block ids]x reference count, and the end of each text.
           ├  ' a poor'                  The blocks 0 and 1 stand in four tables.
           ├  ' an old'
           └  ' a wolf'
    step 2: 5 blocks held / 8 without sharing, 3 copied
    [0]x4┬[2]x1  ' a king who'           Block 1 was not full. Three texts write into copies of it,
         ├[3]x1  ' a poor man'           and the last one keeps it.
         ├[4]x1  ' an old woman'
         └[1]x1  ' a wolf and'

The first number is what paging holds. The second one is what it would hold if each table had blocks
of its own. Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, figures 8, 9 and 15. The tests
compare trees with some that were drawn by hand. Run: python generate.py "The wolf" --n 4
"""

from typing import TextIO

from block_allocator import BlockAllocator
from outputs import StepOutput, Tokenizer
from scheduler import Scheduler
from sequence import Sequence
from watch.terminal import can_hold

SHOWN_TOKENS = 8  # at the end of a text
SHOWN_IDS = 4  # of more blocks in a row only the first ones and the last one are named
BRANCHES = "┬├└│"
PLAIN_BRANCHES = "+++|"  # for an encoding without those

Leaf = tuple[list[int], str]  # a sequence: its block table, and its text


class SharingMeter:
    """A watcher that counts the blocks held after each step, and those without any sharing."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        # Sums over all steps so far:
        self.num_held = 0
        self.num_unshared = 0  # entries of all block tables

    def __call__(self, output: StepOutput) -> None:
        """Count the blocks after a step. (A sequence that ended in it holds none any more.)"""
        num_held, num_unshared = self.count()
        self.num_held += num_held
        self.num_unshared += num_unshared

    def count(self) -> tuple[int, int]:
        """(blocks held, blocks without sharing) now."""
        allocator = self.scheduler.allocator
        num_entries = sum(len(seq.block_table) for seq in self.scheduler.running)
        return allocator.num_blocks - allocator.num_free, num_entries

    @property
    def percent_saved(self) -> float:
        """Blocks saved / blocks without sharing, over all steps, in percent."""
        return 100 * (1 - self.num_held / max(self.num_unshared, 1))


# ---- the tree ------------------------------------------------------------------------------------
def draw_tree(leaves: list[Leaf], allocator: BlockAllocator) -> list[str]:
    """The tree of all tables that hold blocks, one text a line.

    Tables that begin with the same blocks stand together. Example: `[([0, 1], "a"), ([0, 2], "b")]`
    gives `["[0]x2┬[1]x1  a", "     └[2]x1  b"]`.
    """
    roots = _groups(leaves, 0)
    return [line for group in roots for line in _draw(group, 0, allocator)]


def _groups(leaves: list[Leaf], depth: int) -> list[list[Leaf]]:
    """The leaves by their block at `depth`; one whose table is shorter is a group of its own."""
    groups: dict[tuple, list[Leaf]] = {}
    for number, leaf in enumerate(leaves):
        table = leaf[0]
        key = ("block", table[depth]) if depth < len(table) else ("leaf", number)
        groups.setdefault(key, []).append(leaf)
    return list(groups.values())


def _draw(leaves: list[Leaf], depth: int, allocator: BlockAllocator) -> list[str]:
    """The lines of tables that have their first `depth` blocks in common, from there on."""
    table, text = leaves[0]
    end = depth  # they have the blocks [depth, end) in common, too
    while end < len(table) and all(other[end : end + 1] == [table[end]] for other, _ in leaves):
        end += 1
    cell = ""
    if end > depth:
        # Nobody else holds these blocks, so they have the same reference count.
        ids = [str(block_id) for block_id in table[depth:end]]
        if len(ids) > SHOWN_IDS:
            ids = [*ids[: SHOWN_IDS - 1], "..", ids[-1]]
        cell = f"[{' '.join(ids)}]x{allocator.ref_count(table[depth])}"
    if len(leaves) == 1:
        return [f"{cell}  {text}"]
    first, middle, last, beside = BRANCHES
    lines = []
    groups = _groups(leaves, end)
    for number, group in enumerate(groups):
        is_last = number == len(groups) - 1
        branch = first if number == 0 else last if is_last else middle
        head, *rest = _draw(group, end, allocator)
        lines.append((cell if number == 0 else " " * len(cell)) + branch + head)
        lines += [" " * len(cell) + (" " if is_last else beside) + line for line in rest]
    return lines


class TreeScreen:
    """A watcher that draws the tree of all running sequences when it has changed its shape."""

    def __init__(self, scheduler: Scheduler, stream: TextIO):
        self.meter = SharingMeter(scheduler)
        self.stream = stream
        self.num_steps = 0
        self.has_branches = can_hold(stream, BRANCHES)

    def __call__(self, output: StepOutput) -> None:
        """Draw after a step in which a sequence forked or ended, or a block was copied."""
        self.num_steps += 1
        self.meter(output)
        scheduler = self.meter.scheduler
        plan = output.plan
        if not (plan.forked or plan.copies or plan.ended) or not scheduler.running:
            return
        num_held, num_unshared = self.meter.count()
        line = f"step {self.num_steps}: {num_held} blocks held / {num_unshared} without sharing"
        if plan.copies:
            line += f", {len(plan.copies)} copied"
        leaves = [
            (seq.block_table, end_of_text(seq, output.tokenizer)) for seq in scheduler.running
        ]
        text = "\n".join([line, *draw_tree(leaves, scheduler.allocator)])
        if not self.has_branches:
            text = text.translate(str.maketrans(BRANCHES, PLAIN_BRANCHES))
            text = text.encode("ascii", "backslashreplace").decode()
        print(text, file=self.stream, flush=True)

    def summary(self) -> str:
        """The blocks of the whole run in a line."""
        meter = self.meter
        sums = f"{meter.num_held} blocks held / {meter.num_unshared} without sharing"
        return f"all steps: {sums}: {meter.percent_saved:.1f}% saved"


def end_of_text(seq: Sequence, tokenizer: Tokenizer | None) -> str:
    """The last tokens of a sequence, in quotes; their ids without a tokenizer."""
    token_ids = seq.token_ids[seq.num_prompt_tokens :][-SHOWN_TOKENS:]
    if tokenizer is None:
        return " ".join(map(str, token_ids))
    return repr(b"".join(map(tokenizer.token_bytes, token_ids)).decode(errors="replace"))
