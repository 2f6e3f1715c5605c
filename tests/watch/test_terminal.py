"""The strip, the line of figures, and how often both are drawn."""

import io
import re

import pytest

from beam_search import BeamSearchParams, add_beam_search
from llm import LLM
from sampling import SamplingParams
from watch import terminal
from watch.terminal import Meter, Screen, letter_of, pool_strip


@pytest.fixture
def engine(tiny_gpt):
    """Over 7 blocks of 4 tokens."""
    return LLM(tiny_gpt(), num_blocks=7, block_size=4).engine


def greedy(num_tokens):
    return SamplingParams(temperature=0, max_tokens=num_tokens)


def test_the_strip_shows_whose_a_block_is_and_whether_it_is_full(engine):
    assert [letter_of(n) for n in ("0", "25", "26", "28")] == ["A", "Z", "A", "C"]
    engine.add_request([1] * 6, greedy(9))
    engine.add_request([2] * 4, greedy(9))
    engine.step()
    assert pool_strip(engine.scheduler, in_colour=False) == ["|AaB····|"]
    assert pool_strip(engine.scheduler, in_colour=False, width=4) == ["|AaB·|", "|···|"]
    coloured = pool_strip(engine.scheduler, in_colour=True)
    assert coloured == ["|\033[31mA\033[0m\033[31ma\033[0m\033[32mB\033[0m····|"]


def test_the_peak_counts_blocks_that_are_freed_in_the_same_step(engine):
    """Both requests end in the step in which they hold most."""
    meter = Meter(engine.scheduler, "")
    for prompt in ([1] * 6, [2] * 4):
        engine.add_request(prompt, greedy(1))
    meter(engine.step())
    assert not engine.has_unfinished() and meter.peak_blocks == 3


def test_utilisation_is_the_share_of_held_slots_that_hold_a_token(engine):
    meter = Meter(engine.scheduler, "")
    engine.add_request([1] * 6, greedy(4))
    for _ in range(3):  # 6, 7 and 8 tokens in 2 blocks of 4
        meter(engine.step())
    assert meter.utilisation == (6 + 7 + 8) / (3 * 8)


def test_what_beams_share_is_counted_once(engine):
    """6 tokens in 2 blocks. Then 3 beams of 7 tokens share the first, and each has its second."""
    meter = Meter(engine.scheduler, "")
    add_beam_search(engine, [1] * 6, BeamSearchParams(3, 2))
    meter(engine.step())
    assert meter.utilisation == 6 / 8
    assert meter.peak_blocks == 2
    meter(engine.step())  # the search ends, and frees 1 + 3 blocks
    assert not engine.has_unfinished() and meter.peak_blocks == 4


def test_a_shared_block_is_counted_once(engine):
    meter = Meter(engine.scheduler, "")
    engine.add_request([1] * 9, greedy(1))
    engine.add_request([1] * 9, greedy(1))
    meter(engine.step())  # the second waits for the blocks of the first: 9 tokens in 3 blocks
    assert meter.peak_blocks == 3
    engine.add_request([1] * 9, greedy(4))
    meter(engine.step())  # both share two full blocks, and the second ends
    assert meter.utilisation == (8 + 1) / (3 * 4) and meter.peak_blocks == 4
    while engine.has_unfinished():
        meter(engine.step())
    said = "prefix cache: 16 tokens in 4 blocks were not computed, 0 blocks evicted"
    assert meter.summary().splitlines()[2] == said


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(engine, monkeypatch, stream, seconds):
    """What is drawn when a run's steps end at these seconds."""
    meter = Meter(engine.scheduler, "")
    screen = Screen(meter, has_strip=True, stream=stream)
    engine.add_request([1] * 6, greedy(len(seconds)))
    for second in seconds:
        output = engine.step()
        meter(output)
        monkeypatch.setattr(terminal.time, "monotonic", lambda now=second: now)
        screen(output)
        monkeypatch.undo()
    return stream.getvalue()


def test_without_a_terminal_there_is_a_strip_a_second_and_one_at_the_end(engine, monkeypatch):
    text = drawn(engine, monkeypatch, io.StringIO(), [100.0, 100.4, 100.9, 101.1, 101.2])
    strips = [line for line in text.splitlines() if line.startswith("|")]
    assert strips == ["|Aa·····|", "|AAa····|", "|·······|"]
    assert "\033" not in text


def test_a_terminal_is_drawn_over_in_place_20_times_a_second(engine, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("TERM", raising=False)
    text = drawn(engine, monkeypatch, Terminal(), [100.0, 100.04, 100.06, 100.07])
    up_two_lines = "\033[2A"
    assert text.count(up_two_lines) == 2  # three times drawn, the first time over nothing
    assert text.count("\033[31m") == 4 and text.count("\r\033[K") == 6


# ---- terminals as they are -----------------------------------------------------------------------
@pytest.fixture
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_no_line_reaches_the_last_column_of_a_narrow_terminal(
    engine, monkeypatch, plain_environment
):
    size = terminal.os.terminal_size((8, 24))
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda descriptor: size)
    monkeypatch.setattr(Terminal, "fileno", lambda self: 2, raising=False)
    text = drawn(engine, monkeypatch, Terminal(), [100.0])
    plain = re.sub("\033\\[[0-9]*[mKA]", "", text).replace("\r", "")
    # A request that has ended: 7 free blocks, 5 of them in a line of 7 characters.
    assert plain.splitlines() == ["|·····|", "|··|", "step   "]


def test_no_color_draws_in_place_without_colours(engine, monkeypatch, plain_environment):
    monkeypatch.setenv("NO_COLOR", "1")
    text = drawn(engine, monkeypatch, Terminal(), [100.0, 100.1, 100.2])
    assert text.count("\033[2A") == 2 and "|Aa·····|" in text
    assert not re.search("\033\\[[0-9]+m", text)


def test_a_dumb_terminal_gets_plain_lines(engine, monkeypatch, plain_environment):
    monkeypatch.setenv("TERM", "dumb")
    text = drawn(engine, monkeypatch, Terminal(), [100.0, 100.1])
    assert "\033" not in text and "\r" not in text
    assert text.startswith("|Aa·····|\nstep    1 ")


def test_where_the_encoding_has_no_middle_dot_a_free_block_is_a_full_stop(engine, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    stream.getvalue = lambda: stream.buffer.getvalue().decode("ascii")
    assert drawn(engine, monkeypatch, stream, [100.0, 100.1]).startswith("|Aa.....|\n")
