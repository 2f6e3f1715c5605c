"""Pictures of shared blocks: the nodes are those of the tables, the numbers those of the step."""

import pytest
from conftest import ROOT
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch

from plots import trees
from plots.palette import INK, LIGHT, PALETTE
from plots.trees import draw_copies, draw_tree, find_nodes, quote, step_to_draw
from watch.recorder import read_recording

HEADER = {"num_blocks": 9, "block_size": 2}


def step(number, tables, computed, tokens=(), copies=()):
    """A step by hand: `tables` has the block table of each (request, index)."""
    sequences = [
        {"request": request, "index": index, "num_computed_tokens": computed, "block_table": table}
        for (request, index), table in tables.items()
    ]
    entries = [[*key, first, list(text)] for key, first, text in tokens]
    return {"step": number, "sequences": sequences, "tokens": entries, "copies": list(copies)}


A, B, C = ("0", 0), ("0", 1), ("0", 2)
FORKED = [
    step(1, {A: [0, 1], B: [0, 1], C: [0, 1]}, 3, [(key, 0, "abcd") for key in (A, B, C)]),
    step(2, {A: [0, 2], B: [0, 3], C: [0, 1]}, 4, [(A, 4, "x"), (B, 3, "ey")], [[1, 2], [1, 3]]),
]


def test_a_node_says_who_holds_its_block_and_which_tokens_are_in_it():
    nodes = {node.block_id: node for node in find_nodes(HEADER, FORKED, 1)}
    assert [nodes[i].num_holders for i in (0, 1)] == [3, 3]
    assert (nodes[1].text, nodes[1].num_filled, nodes[1].parent) == ("c", 1, 0)
    assert nodes[0].lines == (0,)  # equal tables are one line

    nodes = {node.block_id: node for node in find_nodes(HEADER, FORKED, 2)}
    assert nodes[0].lines == (0, 1, 2) and nodes[0].parent is None
    # The newer text of B's token 3 replaced the older one.
    assert {i: nodes[i].text for i in (1, 2, 3)} == {1: "cd", 2: "cd", 3: "ce"}
    assert [nodes[i].lines for i in (1, 2, 3)] == [(0,), (1,), (2,)]


def boxes(figure):
    """Edge and face of each block's box."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    return [(to_hex(box.get_edgecolor(), True), to_hex(box.get_facecolor())) for box in found]


def test_copies_have_a_dark_edge_and_shared_blocks_are_grey():
    figure = draw_copies(HEADER, FORKED)
    before, after = boxes(figure)[:2], boxes(figure)[2:]
    assert [face for _, face in before] == [LIGHT, LIGHT]
    assert sorted(face for _, face in after) == sorted([LIGHT, PALETTE[0], PALETTE[0], PALETTE[0]])
    assert [edge for edge, _ in [*before, *after]].count(f"{INK}ff") == 2
    title = "Copy-on-write: 2 copies of one block, 1 blocks stay shared"
    assert figure.texts[0].get_text() == title
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "block 2, a copy of block 1" in texts and texts.count("3") == 3  # three discs


def test_the_step_to_draw_shares_most_and_fits_a_card():
    assert step_to_draw(HEADER, FORKED) == 2
    with pytest.raises(ValueError, match="no block of this recording has two holders"):
        step_to_draw(HEADER, [step(1, {A: [0, 1], B: [2, 3]}, 3, [(A, 0, "abc"), (B, 0, "abd")])])
    wide = step(1, {A: list(range(7)), B: list(range(7))}, 2, [(A, 0, "abc"), (B, 0, "abc")])
    with pytest.raises(ValueError, match="in tables that fit"):
        step_to_draw(HEADER, [wide])


def test_a_recording_without_a_copy_and_one_too_wide_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="no block of this recording was copied"):
        draw_copies(HEADER, FORKED[:1])
    monkeypatch.setattr(trees, "MAX_COLUMNS", 3)
    with pytest.raises(ValueError, match="too wide to draw"):
        draw_copies(HEADER, FORKED)


def test_a_text_too_long_for_a_box_is_cut():
    assert quote("a\nb") == "“a b”" and quote("x" * 19) == f"“{'x' * 19}”"
    assert quote("x" * 20) == f"“{'x' * 16}...”"


@pytest.mark.parametrize("name, who", [("prefixes", "prompts"), ("beams", "beams")])
def test_the_committed_trees_say_how_many_blocks_the_tables_would_need(name, who):
    header, steps = read_recording(ROOT / f"results/recordings/{name}.jsonl")
    number = step_to_draw(header, steps)
    tables = [seq["block_table"] for seq in steps[number - 1]["sequences"] if seq["block_table"]]
    held = len({block_id for table in tables for block_id in table})
    title = draw_tree(header, steps, who).texts[0].get_text()
    entries = sum(map(len, tables))
    expected = f"{len(tables)} {who} hold {held} blocks; without sharing they would hold {entries}"
    assert title == expected and held < entries
