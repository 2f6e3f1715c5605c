"""Pictures of blocks that sequences share: the prefix tree, the beam tree, what a fork copies.

A recording (watch/recorder.py) has the block tables after each step, the texts of the tokens, and
which block was copied to which. Tables that begin with the same blocks meet in a tree:

    tables [0, 1, 4] [0, 1, 5] [0, 2]      0 ─┬─ 1 ─┬─ 4      a column for each logical block,
                                              │     └─ 5      a line for each sequence
                                              └─ 2

    step of a recording ─> find_nodes ─> draw_nodes ─> draw_tree    one step
                                                       draw_copies  two steps: before and after

A block with one holder has its request's colour. A block with several is grey, and a disc at its
corner says how many tables name it: its reference count. A block that was copied in the step has a
dark edge.

Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, figures 8, 9 and 10.
"""

from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from plots.palette import CARD, INK, LIGHT, axes_on, card, colour_of, text_on

MAX_COLUMNS = 6  # logical blocks that a card has room for
LINE_HEIGHT = 0.44  # inches, of one table
LONGEST_TEXT = 19  # characters in a box


class Node(NamedTuple):
    """A block in the tree: where it stands, who holds it and what it holds."""

    block_id: int
    column: int  # its logical block in each table
    lines: tuple[int, ...]  # of the tables that name it; equal tables have one line
    num_holders: int  # tables
    request: str  # of its first holder
    text: str  # of its tokens
    num_filled: int  # slots with a token
    parent: int | None  # the block before it


def texts_until(steps: list[dict], number: int) -> dict[tuple[str, int], list[str]]:
    """The texts of each sequence's tokens, by (request, index), after step `number`, from 1 on."""
    texts: dict[tuple[str, int], list[str]] = {}
    for step in steps[:number]:
        for request, index, first, tokens in step["tokens"]:
            known = texts.setdefault((request, index), [])
            known[first:] = tokens
    return texts


def find_nodes(header: dict, steps: list[dict], number: int) -> list[Node]:
    """The tree of blocks after step `number`: sequences in the order of their tables."""
    block_size = header["block_size"]
    texts = texts_until(steps, number)
    held = [seq for seq in steps[number - 1]["sequences"] if seq["block_table"]]
    held.sort(key=lambda seq: seq["block_table"])  # tables that begin alike stand side by side
    tables = sorted({tuple(seq["block_table"]) for seq in held})
    nodes: dict[int, Node] = {}
    for seq in held:
        table = seq["block_table"]
        for column, block_id in enumerate(table):
            start = column * block_size
            end = min(start + block_size, seq["num_computed_tokens"])
            nodes.setdefault(
                block_id,
                Node(
                    block_id,
                    column,
                    tuple(line for line, other in enumerate(tables) if block_id in other),
                    sum(block_id in other["block_table"] for other in held),
                    seq["request"],
                    "".join(texts[seq["request"], seq["index"]][start:end]),
                    max(0, end - start),
                    table[column - 1] if column else None,
                ),
            )
    return list(nodes.values())


def num_entries(nodes: Iterable[Node]) -> int:
    """Entries of all block tables: the blocks that would be held without sharing."""
    return sum(node.num_holders for node in nodes)


def num_lines(nodes: Iterable[Node]) -> int:
    """Lines of the drawing: different tables."""
    return 1 + max(line for node in nodes for line in node.lines)


def num_columns(nodes: Iterable[Node]) -> int:
    """Blocks of the longest table."""
    return 1 + max((node.column for node in nodes), default=-1)


def step_to_draw(header: dict, steps: list[dict]) -> int:
    """The number of the step to draw: many shared blocks, and many different reference counts.

    Only steps whose tables fit on a card count. Raises ValueError if no block is ever shared.
    """
    best, chosen = (0, 0), 0
    for step in steps:
        nodes = find_nodes(header, steps, step["step"])
        counts = {node.num_holders for node in nodes}
        shared = [node for node in nodes if node.num_holders > 1]
        size = len(counts) * len(shared), len(nodes)
        if shared and num_columns(nodes) <= MAX_COLUMNS and size > best:
            best, chosen = size, step["step"]
    if not chosen:
        raise ValueError("no block of this recording has two holders, in tables that fit")
    return chosen


# ---- drawing -------------------------------------------------------------------------------------
def draw_nodes(
    ax: Axes, nodes: list[Node], header: dict, copies: dict[int, int], left: int = 0
) -> None:
    """The tree from column `left` on. `copies` is copy -> source: a copy has a dark edge."""
    middle = {node.block_id: -sum(node.lines) / len(node.lines) for node in nodes}
    for node in nodes:
        x, y = left + node.column, middle[node.block_id]
        if node.parent is not None:
            above = middle[node.parent]
            line = {"color": INK, "linewidth": 0.9, "zorder": 1}
            ax.plot([x - 0.1, x - 0.05, x - 0.05, x], [above, above, y, y], **line)
        is_shared = node.num_holders > 1
        colour = LIGHT if is_shared else colour_of(node.request)
        style = {"boxstyle": "round,pad=0,rounding_size=0.04", "fc": colour, "zorder": 2}
        style |= {"ec": INK if node.block_id in copies else "none", "linewidth": 1.6}
        style |= {"mutation_aspect": 3.0, "clip_on": False}
        ax.add_patch(FancyBboxPatch((x, y - 0.36), 0.9, 0.72, **style))
        name = f"block {node.block_id}"
        if node.block_id in copies:
            name += f", a copy of block {copies[node.block_id]}"
        ink = {"color": text_on(colour), "va": "center", "zorder": 3}
        free = "·" * (header["block_size"] - node.num_filled)
        ax.text(x + 0.04, y + 0.16, name, size=6, **ink)
        ax.text(x + 0.04, y - 0.14, quote(node.text) + free, size=7, **ink)
        if is_shared:
            disc = {"boxstyle": "circle,pad=0.22", "fc": INK, "ec": CARD}
            words = {"color": CARD, "size": 7, "weight": "bold", "ha": "center", "va": "center"}
            ax.text(x + 0.83, y + 0.28, node.num_holders, bbox=disc, zorder=4, **words)


def quote(text: str) -> str:
    """A text in quotes that fits into a box: "..." stands for what is left out."""
    text = text.replace("\n", " ")
    return f"“{text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + '...'}”"


def axes_of(figure: Figure, lines: int) -> Axes:
    """Axes for trees: one unit is a column to the right, and a line of the tree upwards."""
    limits = {"xlim": (0, MAX_COLUMNS), "ylim": (0.5 - lines, 0.5)}
    ax = axes_on(figure, 0.3, 0.2, 0.25, lines * LINE_HEIGHT, **limits)
    ax.axis("off")
    return ax


def draw_tree(header: dict, steps: list[dict], who: str) -> Figure:
    """One step of a recording; `who` are its sequences, for the title: "prompts", "beams"."""
    number = step_to_draw(header, steps)
    nodes = find_nodes(header, steps, number)
    running = sum(bool(seq["block_table"]) for seq in steps[number - 1]["sequences"])
    title = f"{running} {who} hold {len(nodes)} blocks; without sharing they would hold "
    title += str(num_entries(nodes))
    words = (
        f"Step {number} of a run, blocks of {header['block_size']} tokens. A line from left to "
        "right is a text. Grey blocks stand in several block tables:\nthe number in the disc is "
        "their reference count. A coloured block has one holder. A dot is a slot without a token."
    )
    figure = card(1.25 + num_lines(nodes) * LINE_HEIGHT, title, words)
    draw_nodes(axes_of(figure, num_lines(nodes)), nodes, header, {})
    return figure


def draw_copies(header: dict, steps: list[dict]) -> Figure:
    """The first copies of a recording: the step before them on the left, their step on the right.

    Raises ValueError if nothing was copied, or if the two trees are too wide for a card.
    """
    after = next((step["step"] for step in steps if step["copies"]), 0)
    if after < 2:
        raise ValueError("no block of this recording was copied after its first step")
    pairs = steps[after - 1]["copies"]
    copies = {copy: source for source, copy in pairs}
    before_nodes, nodes = (find_nodes(header, steps, number) for number in (after - 1, after))
    if num_columns(before_nodes) + num_columns(nodes) > MAX_COLUMNS:
        raise ValueError(f"the tables are longer than {MAX_COLUMNS // 2} blocks: too wide to draw")
    num_shared = sum(node.num_holders > 1 for node in nodes)
    title = f"Copy-on-write: {len(copies)} copies of one block, {num_shared} blocks stay shared"
    words = (
        f"Left, step {after - 1}: a prompt is computed once, and all its texts share its blocks. "
        f"Right, step {after}: each text writes a token. The last\nblock has room for it, so all "
        "but one of the writers get a copy (dark edge). A full block is never written again."
    )
    lines = max(num_lines(before_nodes), num_lines(nodes))
    figure = card(1.25 + lines * LINE_HEIGHT, title, words)
    ax = axes_of(figure, lines)
    draw_nodes(ax, before_nodes, header, {})
    draw_nodes(ax, nodes, header, copies, left=MAX_COLUMNS - num_columns(nodes))
    return figure
