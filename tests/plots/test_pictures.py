"""Pictures of runs: what is drawn is what the recording says, block by block and step by step.

The numbers behind each picture are compared with the dumbest count that is right; then the colours
that stand in the figure with the owners that the tables name.
"""

from collections import Counter

import pytest
from conftest import ROOT
from matplotlib.colors import to_hex
from matplotlib.patches import ConnectionPatch, Rectangle

from block_allocator import BlockAllocator
from plots.palette import (
    CARD,
    FAINT,
    INK,
    PALETTE,
    card,
    colour_of,
    contrast,
    save,
    text_on,
)
from plots.pictures import (
    BOXES,
    Holding,
    RowUse,
    draw_batching,
    draw_pool,
    draw_table,
    find_holdings,
    record,
    two_batchings,
)
from scheduler import Scheduler
from watch.recorder import holders, read_recording


def scheduler(num_blocks=8, max_num_seqs=4):
    return Scheduler(BlockAllocator(num_blocks, 4), max_num_seqs, 16, max_seq_len=64)


@pytest.fixture(scope="module")
def five():
    """Five requests in 8 blocks of 4, with preemptions."""
    return record(scheduler(), [[(6, 9), (10, 12), (3, 4), (5, 6), (8, 5)]])


@pytest.fixture(scope="module")
def tales():
    """The recording that the committed pictures are drawn from."""
    return read_recording(ROOT / "results/recordings/demo.jsonl")


def line(number, tables, num_waiting=0, computed=None, preempted=()):
    """A step by hand: `tables` maps a request to its block_table."""
    computed = computed or {}
    sequences = [
        {
            "request": request,
            "index": 0,
            "phase": "decode",
            "new_tokens": 1,
            "num_computed_tokens": computed.get(request, 4 * len(table)),
            "finish_reason": None,
            "block_table": table,
        }
        for request, table in tables.items()
    ]
    events = {"added": [], "aborted": [], "preempted": [[request, 0] for request in preempted]}
    return {"step": number, "sequences": sequences, "num_waiting": num_waiting} | events


# ---- palette -------------------------------------------------------------------------------------


def test_text_is_read_on_the_card_and_on_every_colour():
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # as in WCAG
    assert contrast(INK, CARD) >= 4.5 and contrast(FAINT, CARD) >= 4.5
    assert all(contrast(text_on(colour), colour) >= 4.5 for colour in PALETTE)


def test_the_same_figure_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib

    def draw():
        figure = card(2, "a title", "and words")
        figure.add_axes([0.1, 0.1, 0.8, 0.4]).bar([1, 2], [3, 4], hatch="//")
        return figure

    save(draw, tmp_path / "one.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.grid": True}):
        save(draw, tmp_path / "folder" / "two.svg")
        assert matplotlib.rcParams["font.size"] == 30
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "folder" / "two.svg").read_text()
    assert "<text" not in text and "<date" not in text.lower() and "dc:date" not in text


# ---- the parts of the engine ---------------------------------------------------------------------
def test_the_architecture_names_files_that_exist():
    for part in [part for box in BOXES for part in (box.upper, box.lower)]:
        assert all((ROOT / file).exists() for file in part.files.split(", ")), part.files


# ---- the pool over time --------------------------------------------------------------------------
def test_a_holding_ends_where_the_holders_of_a_block_change_and_a_shared_one_is_hatched():
    header = {"num_blocks": 3, "block_size": 4}
    steps = [line(1, {"0": [0]}), line(2, {"0": [0, 2]}), line(3, {"0": [0], "1": [0, 2]})]
    assert find_holdings(header, steps) == [
        Holding(0, 1, 3, ("0",)),
        Holding(0, 3, 4, ("0", "1")),
        Holding(2, 2, 3, ("0",)),
        Holding(2, 3, 4, ("1",)),
    ]
    bars = draw_pool(header, steps).axes[0].patches
    assert sorted(bar.get_hatch() for bar in bars) == ["", "", "", "////"]  # the shared one


@pytest.mark.parametrize("recording", ["five", "tales"])
def test_every_held_block_of_every_step_stands_in_the_picture_in_its_owners_colour(
    recording, request
):
    header, steps = request.getfixturevalue(recording)
    drawn = {}
    for bar in draw_pool(header, steps).axes[0].patches:
        block_id, first = bar.get_y(), bar.get_x() + 0.5
        for number in range(round(first), round(first + bar.get_width())):
            assert (round(block_id), number) not in drawn, "two bars lie over each other"
            drawn[round(block_id), number] = to_hex(bar.get_facecolor())
    owners = {
        (block_id, step["step"]): colour_of(requests[0])
        for step in steps
        for block_id, requests in enumerate(holders(header, step))
        if requests
    }
    assert drawn == owners


def test_each_block_that_a_preemption_took_ends_with_a_cross(five):
    header, steps = five
    (crosses,) = draw_pool(header, steps).axes[0].lines
    expected = set()
    for before, step in zip(steps, steps[1:], strict=False):
        for request, _ in step["preempted"]:
            tables = {s["request"]: s["block_table"] for s in before["sequences"]}
            expected |= {(step["step"] - 0.5, block_id + 0.5) for block_id in tables[request]}
    assert set(map(tuple, crosses.get_xydata().tolist())) == expected and len(expected) == 9


def test_the_lower_panel_counts_those_who_run_and_those_who_wait(five):
    header, steps = five
    both, running = draw_pool(header, steps).axes[1].patches
    values = [stairs.get_data().values.tolist() for stairs in (both, running)]
    ran = [sum(s["phase"] is not None for s in step["sequences"]) for step in steps]
    assert values[1] == ran
    assert values[0] == [a + step["num_waiting"] for a, step in zip(ran, steps, strict=True)]


# ---- a block table -------------------------------------------------------------------------------
def middle(steps):
    """The step that is drawn: the middle one of those after which a request holds a block."""
    busy = [step for step in steps if any(s["block_table"] for s in step["sequences"])]
    return busy[len(busy) // 2]


def test_each_arrow_leads_from_a_table_to_the_block_that_it_names(tales):
    header, steps = tales
    step = middle(steps)
    drawn = draw_table(header, steps).axes[0].get_children()
    arrows = [patch for patch in drawn if isinstance(patch, ConnectionPatch)]
    tables = {colour_of(s["request"]): s["block_table"] for s in step["sequences"]}
    for colour in {to_hex(arrow.get_edgecolor()) for arrow in arrows}:
        mine = [arrow for arrow in arrows if to_hex(arrow.get_edgecolor()) == colour]
        mine.sort(key=lambda arrow: arrow.xy1[0])  # left to right: logical blocks 0, 1, 2, ..
        assert [arrow.xy2[0] - 0.5 for arrow in mine] == tables[colour]
        assert tables[colour] != sorted(tables[colour])
    assert len({to_hex(arrow.get_edgecolor()) for arrow in arrows}) == 2


def test_the_pool_under_the_tables_has_a_cell_a_block_in_its_owners_colour(tales):
    header, steps = tales
    step = middle(steps)
    drawn = draw_table(header, steps).axes[0].patches
    cells = [bar for bar in drawn if isinstance(bar, Rectangle) and bar.get_y() < 0.2]
    owners = [colour_of(requests[0]) if requests else "free" for requests in holders(header, step)]
    drawn = [to_hex(cell.get_facecolor()) for cell in cells]
    assert [b if a != "free" else a for a, b in zip(owners, drawn, strict=True)] == owners
    assert {b for a, b in zip(owners, drawn, strict=True) if a == "free"}.isdisjoint(PALETTE)


def test_the_worked_example_names_the_tokens_slot():
    header = {"num_blocks": 9, "block_size": 4}
    figure = draw_table(header, [line(1, {"0": [7, 2, 5]}, computed={"0": 10})])
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    # The newest token, 9, is the second of logical block 2, which is block 5: slot 5 * 4 + 1.
    assert "token 9 of A" in words and "9 // 4 = 2" in words and "5 x 4 + 9 % 4 = 21." in words


def test_a_run_without_a_held_block_has_no_table_to_draw():
    recorded = record(scheduler(), [[(6, 1)]])
    assert len(recorded[1]) == 1
    with pytest.raises(ValueError, match="no request holds a block"):
        draw_table(*recorded)


# ---- static and continuous batching --------------------------------------------------------------
def test_four_requests_in_two_rows_by_hand():
    static, continuous = two_batchings([(3, 5), (3, 2), (3, 4), (3, 1)], 2)
    # Static: 0 and 1 start together; 1 is done after 2 steps and keeps its row until 0 is.
    assert static == [
        RowUse(row=0, request="0", first=1, end=6, released=6),
        RowUse(row=1, request="1", first=1, end=3, released=6),
        RowUse(row=0, request="2", first=6, end=10, released=10),
        RowUse(row=1, request="3", first=6, end=7, released=10),
    ]
    assert continuous == [
        RowUse(row=0, request="0", first=1, end=6, released=6),
        RowUse(row=1, request="1", first=1, end=3, released=3),
        RowUse(row=1, request="2", first=3, end=7, released=7),
        RowUse(row=0, request="3", first=6, end=7, released=7),
    ]
    title = draw_batching(static, continuous).texts[0].get_text()
    assert title == "Continuous batching: 4 requests in 6 steps instead of 9"


def test_a_static_batch_takes_the_sum_of_its_longest_and_no_row_is_used_twice():
    lengths = [(16, (7 * i) % 23 + 1) for i in range(13)]
    static, continuous = two_batchings(lengths, 4)
    longest = [max(written for _, written in lengths[i : i + 4]) for i in range(0, 13, 4)]
    assert max(use.released for use in static) - 1 == sum(longest)
    for uses in (static, continuous):
        taken = Counter((use.row, t) for use in uses for t in range(use.first, use.released))
        assert set(taken.values()) == {1} and {use.row for use in uses} == {0, 1, 2, 3}
        assert [use.end - use.first for use in uses] == [written for _, written in lengths]
    for ax, uses in zip(draw_batching(static, continuous).axes, (static, continuous), strict=True):
        runs, idle = ax.patches[::2], ax.patches[1::2]
        drawn = [(b.get_x() + 0.5, b.get_width(), to_hex(b.get_facecolor())) for b in runs]
        assert drawn == [(u.first, u.end - u.first, colour_of(u.request)) for u in uses]
        assert [bar.get_width() for bar in idle] == [u.released - u.end for u in uses]
