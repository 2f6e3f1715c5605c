"""The tree of shared blocks: drawn as by hand, at the steps that change it, and its sums."""

import io

import pytest

from block_allocator import BlockAllocator
from llm import LLM, SamplingParams
from watch.tree import SharingMeter, TreeScreen, draw_tree


def held(*tables):
    """An allocator in which these tables are held, as forks of one another."""
    allocator = BlockAllocator(16, 4)
    allocator.allocate(16)
    for block_id in range(16):
        count = sum(block_id in table for table in tables)
        for _ in range(count - 1):
            allocator.fork([block_id])
    return allocator


@pytest.mark.parametrize(
    "tables, lines",
    [
        ([[3, 1]], ["[3 1]x1  a"]),
        ([[0], [0]], ["[0]x2┬  a", "     └  b"]),
        ([[0, 1], [2, 3]], ["[0 1]x1  a", "[2 3]x1  b"]),
        (
            [[0, 1, 4], [0, 2], [0, 1, 5]],
            ["[0]x3┬[1]x2┬[4]x1  a", "     │     └[5]x1  c", "     └[2]x1  b"],
        ),
        (
            [[0, 1], [0, 1, 2], [0, 1]],
            ["[0 1]x3┬  a", "       ├[2]x1  b", "       └  c"],
        ),
        ([[0, 1, 2, 3, 4, 5]], ["[0 1 2 .. 5]x1  a"]),
    ],
    ids=["one", "just forked", "apart", "two levels", "one has more blocks", "many in a row"],
)
def test_a_tree_is_the_one_drawn_by_hand(tables, lines):
    leaves = [(table, "abc"[i]) for i, table in enumerate(tables)]
    assert draw_tree(leaves, held(*tables)) == lines


@pytest.fixture
def engine(tiny_gpt):
    """Over 16 blocks of 4 tokens, without a tokenizer."""
    return LLM(tiny_gpt(), num_blocks=16, block_size=4).engine


def serve(engine, watcher, prompt_tokens, **params):
    engine.watchers.append(watcher)
    engine.add_request([1] * prompt_tokens, SamplingParams(seed=3, ignore_eos=True, **params))
    while engine.has_unfinished():
        engine.step()


def test_the_blocks_of_a_fork_are_those_counted_by_hand(engine):
    """A prompt of 6 tokens, 3 texts of 4 tokens.

    Step 1 computes 6 tokens: 2 blocks in 3 tables. Step 2 writes position 6, so the second block
    becomes 3: 4 blocks. Step 3 writes position 7: still 4. In step 4 all have their 4 tokens.
    """
    meter = SharingMeter(engine.scheduler)
    serve(engine, meter, 6, n=3, max_tokens=4)
    assert (meter.num_held, meter.num_unshared) == (2 + 4 + 4, 6 + 6 + 6)
    assert meter.percent_saved == pytest.approx(100 * 8 / 18)


def test_it_is_drawn_when_sequences_fork_and_when_blocks_are_copied(engine):
    stream = io.StringIO()
    screen = TreeScreen(engine.scheduler, stream)
    serve(engine, screen, 6, n=3, max_tokens=4)
    lines = stream.getvalue().splitlines()
    heads = [line for line in lines if line.startswith("step")]
    assert heads == [
        "step 1: 2 blocks held / 6 without sharing",
        "step 2: 4 blocks held / 6 without sharing, 2 copied",
    ]
    assert [line[:7] for line in lines[1:4]] == ["[0 1]x3", "       ", "       "]
    assert [line[:5] for line in lines[5:]] == ["[0]x3", "     ", "     "]
    assert screen.summary() == "all steps: 10 blocks held / 18 without sharing: 44.4% saved"


def test_full_blocks_are_not_copied(engine):
    """8 tokens fill two blocks of 4: the texts write into new blocks."""
    stream = io.StringIO()
    serve(engine, TreeScreen(engine.scheduler, stream), 8, n=2, max_tokens=4)
    assert stream.getvalue().count("step") == 1 and "copied" not in stream.getvalue()


def test_where_the_encoding_has_no_branches_the_tree_is_plain(engine):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    serve(engine, TreeScreen(engine.scheduler, stream), 6, n=3, max_tokens=3)
    text = stream.buffer.getvalue().decode("ascii")
    assert "[0 1]x3+  " in text and "[0]x3+[" in text
