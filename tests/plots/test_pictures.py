"""Pictures of runs: what is drawn is what the recording says, block by block and step by step.

The numbers behind each picture are compared with the dumbest count that is right; then the colours
that stand in the figure with the owners that the tables name.
"""

from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.colors import to_hex
from matplotlib.patches import ConnectionPatch, Rectangle

from block_allocator import BlockAllocator
from experiments.reservations import BuddyAllocator, reserve_maximum
from plots.palette import (
    CARD,
    FAINT,
    INK,
    PALETTE,
    card,
    colour_of,
    contrast,
    letter_of,
    save,
    text_on,
)
from plots.pictures import (
    Stay,
    Stretch,
    draw_batching,
    draw_memory,
    draw_pool,
    draw_table,
    four_plans,
    places,
    random_lengths,
    record,
    shares,
    stretches,
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
def test_a_request_has_one_colour_and_one_letter():
    assert [colour_of(str(n)) for n in range(12)] == PALETTE and len(set(PALETTE)) == 12
    assert colour_of("12") == colour_of("0") and letter_of("3") == "D" and letter_of("26") == "A"


@pytest.mark.parametrize(
    "one, other, times",
    [("#000000", "#ffffff", 21.0), ("#777777", "#ffffff", 4.48), ("#ff0000", "#ff0000", 1.0)],
)
def test_contrast_is_that_of_the_accessibility_guidelines(one, other, times):
    assert contrast(one, other) == contrast(other, one) == pytest.approx(times, abs=0.005)


def test_text_is_read_on_the_card_and_on_every_colour():
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


# ---- the pool over time --------------------------------------------------------------------------
def test_a_block_kept_over_three_steps_is_one_stretch_and_a_change_of_hands_two():
    header = {"num_blocks": 3, "block_size": 4}
    steps = [line(1, {"0": [0]}), line(2, {"0": [0, 2]}), line(3, {"0": [0], "1": [2]})]
    assert stretches(header, steps) == [
        Stretch(0, 1, 4, ("0",)),
        Stretch(2, 2, 3, ("0",)),
        Stretch(2, 3, 4, ("1",)),
    ]


def test_a_shared_block_is_a_stretch_of_all_its_holders():
    header = {"num_blocks": 1, "block_size": 4}
    steps = [line(1, {"0": [0], "1": [0]}), line(2, {"1": [0]})]
    assert stretches(header, steps) == [Stretch(0, 1, 2, ("0", "1")), Stretch(0, 2, 3, ("1",))]


@pytest.mark.parametrize("recording", ["five", "tales"])
def test_stretches_cover_every_held_block_of_every_step_and_nothing_else(recording, request):
    header, steps = request.getfixturevalue(recording)
    drawn = {
        (part.block_id, number): part.requests
        for part in stretches(header, steps)
        for number in range(part.first, part.end)
    }
    held = {
        (block_id, step["step"]): tuple(requests)
        for step in steps
        for block_id, requests in enumerate(holders(header, step))
        if requests
    }
    assert drawn == held and len(held) == sum(
        header["num_blocks"] - step["num_free"] for step in steps
    )


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


def test_a_shared_block_is_hatched():
    header = {"num_blocks": 2, "block_size": 4}
    steps = [line(1, {"0": [0], "1": [0, 1]})]
    assert [bar.get_hatch() for bar in draw_pool(header, steps).axes[0].patches] == ["////", ""]


# ---- a block table -------------------------------------------------------------------------------
def middle(steps):
    """The step that is drawn: the middle one of those behind which somebody holds a block."""
    busy = [step for step in steps if any(s["block_table"] for s in step["sequences"])]
    return busy[len(busy) // 2]


def test_each_arrow_leads_from_a_table_to_the_block_that_it_names(tales):
    header, steps = tales
    step = middle(steps)
    drawn = draw_table(header, steps).axes[0].patches
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
    with pytest.raises(ValueError, match="nobody holds a block"):
        draw_table(*recorded)


# ---- where memory goes ---------------------------------------------------------------------------
def test_shares_of_a_pool_by_hand():
    header = {"num_blocks": 8, "block_size": 4}
    steps = [
        line(1, {"0": [0, 1, 2, 3]}, num_waiting=1, computed={"0": 5}),
        line(2, {"0": [0, 1, 2, 3]}, num_waiting=1, computed={"0": 6}),
        line(3, {"0": []}, num_waiting=0, computed={"0": 9}),  # it came to 9 tokens
    ]
    # Of 2 x 32 places in the two steps with a queue: 5 + 6 used, 4 + 3 later, 2 x 7 never.
    expected = {"used": 11, "later": 7, "never": 14, "free": 32}
    percent = {name: 100 * number / 64 for name, number in expected.items()}
    assert shares(header, steps) == pytest.approx(percent | {"running": 1.0})


def test_a_run_in_which_nobody_waits_says_nothing_of_memory():
    with pytest.raises(ValueError, match="nobody waits"):
        shares({"num_blocks": 8, "block_size": 4}, [line(1, {"0": [0]})])


def test_the_parts_of_the_pool_add_up_to_all_of_it(five):
    found = shares(*five)
    assert found["used"] + found["later"] + found["never"] + found["free"] == pytest.approx(100)


def test_reserving_the_maximum_of_64_tokens_lets_two_run_in_128():
    plan = Scheduler(BuddyAllocator(32, 4), 9, 64, 64, reserve_maximum(64))
    found = shares(*record(plan, [[(8, 8)] * 6]))
    # Each pair takes 8 steps, and behind the last of them nobody holds anything: 7 of 8 count.
    assert found["running"] == 2 * 7 / 8 and found["free"] == pytest.approx(100 / 8)
    # Each holds 16 blocks of 4 whatever it fills, and comes to 15 tokens: the 16th is not written.
    assert found["never"] == pytest.approx(100 * 7 / 8 * (64 - 15) / 64)
    assert found["used"] == pytest.approx(100 * 7 / 8 * (8 + 9 + 10 + 11 + 12 + 13 + 14) / 7 / 64)


@pytest.fixture(scope="module")
def plans():
    return four_plans(random_lengths(24), num_blocks=64)


def test_the_four_plans_serve_the_same_requests_in_the_same_memory(plans):
    finals, sizes = [], set()
    for header, steps in plans.values():
        sizes.add((header["num_blocks"], header["block_size"]))
        ended = [s for step in steps for s in step["sequences"] if s["finish_reason"]]
        finals.append({s["request"]: s["num_computed_tokens"] for s in ended})
        assert {s["finish_reason"] for s in ended} == {"length"}
    # The K and V of each one's last token are never written.
    lengths = random_lengths(24)
    assert finals == [{str(i): sum(n) - 1 for i, n in enumerate(lengths)}] * 4
    assert sizes == {(64, 16)}


def test_what_is_reserved_is_a_slab_of_adjacent_blocks_and_what_is_paged_is_not(plans):
    def are_slabs(steps):
        tables = [s["block_table"] for step in steps for s in step["sequences"] if s["block_table"]]
        return all(table == list(range(table[0], table[0] + len(table))) for table in tables)

    slabs = {name: are_slabs(steps) for name, (_, steps) in plans.items()}
    reserved = {"the maximum": True, "a power of two": True, "the true length": True}
    assert slabs == reserved | {"paged": False}


def test_the_less_is_reserved_the_more_is_used_and_the_fewer_steps_it_takes(plans):
    used = [shares(*recording)["used"] for recording in plans.values()]
    steps = [len(recording[1]) for recording in plans.values()]
    assert list(plans)[0] == "the maximum" and list(plans)[-1] == "paged"
    assert used == sorted(used) and steps == sorted(steps, reverse=True)


def test_the_bars_of_memory_are_the_shares(plans):
    ax = draw_memory(plans).axes[0]
    expected = [shares(*recording) for recording in plans.values()][::-1]  # the first on top
    for part, bars in zip(("used", "later", "never", "free"), ax.containers, strict=True):
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx([share[part] for share in expected])
    ends = [bar.get_x() + bar.get_width() for bar in ax.containers[-1]]
    assert ends == pytest.approx([100] * 4)


# ---- static and continuous batching --------------------------------------------------------------
def test_four_requests_in_two_places_by_hand():
    static, continuous = two_batchings([(3, 5), (3, 2), (3, 4), (3, 1)], 2)
    # Static: 0 and 1 start together; 1 is done after 2 steps and keeps its place until 0 is.
    assert static == [
        Stay(place=0, request="0", first=1, end=6, left=6),
        Stay(place=1, request="1", first=1, end=3, left=6),
        Stay(place=0, request="2", first=6, end=10, left=10),
        Stay(place=1, request="3", first=6, end=7, left=10),
    ]
    assert continuous == [
        Stay(place=0, request="0", first=1, end=6, left=6),
        Stay(place=1, request="1", first=1, end=3, left=3),
        Stay(place=1, request="2", first=3, end=7, left=7),
        Stay(place=0, request="3", first=6, end=7, left=7),
    ]


def test_a_static_batch_takes_the_sum_of_its_longest_and_no_place_is_taken_twice():
    lengths = random_lengths(13, seed=3)
    static, continuous = two_batchings(lengths, 4)
    longest = [max(written for _, written in lengths[i : i + 4]) for i in range(0, 13, 4)]
    assert max(stay.left for stay in static) - 1 == sum(longest)
    for stays in (static, continuous):
        taken = Counter((s.place, t) for s in stays for t in range(s.first, s.left))
        assert set(taken.values()) == {1} and {stay.place for stay in stays} == {0, 1, 2, 3}
        assert [s.end - s.first for s in stays] == [written for _, written in lengths]


def test_the_bars_of_batching_are_the_stays_in_their_requests_colours():
    batchings = two_batchings(random_lengths(6, seed=1), 2)
    for ax, stays in zip(draw_batching(*batchings).axes, batchings, strict=True):
        runs, idle = ax.patches[::2], ax.patches[1::2]
        drawn = [(b.get_x() + 0.5, b.get_width(), to_hex(b.get_facecolor())) for b in runs]
        assert drawn == [(s.first, s.end - s.first, colour_of(s.request)) for s in stays]
        assert [bar.get_width() for bar in idle] == [s.left - s.end for s in stays]


def test_the_title_says_how_many_steps_each_took():
    static, continuous = two_batchings([(3, 5), (3, 2), (3, 4), (3, 1)], 2)
    title = draw_batching(static, continuous).texts[0].get_text()
    assert title == "Continuous batching: 4 requests in 6 steps instead of 9"


def test_places_are_given_in_the_order_of_arrival(tmp_path):
    header, steps = record(scheduler(num_blocks=16, max_num_seqs=2), [[(2, 1), (2, 3), (2, 1)]])
    assert [(s.request, s.place, s.first) for s in places(steps)] == [
        ("0", 0, 1),
        ("1", 1, 1),
        ("2", 0, 2),
    ]
    assert isinstance(header, dict) and not list(Path(tmp_path).iterdir())
