"""The strip, the line of figures, and how often both are drawn."""

import io

from llm import LLM
from sampling import SamplingParams
from watch import terminal
from watch.terminal import Meter, Screen, letter_of, pool_strip


def test_the_letters_begin_again_after_26():
    assert [letter_of(n) for n in ("0", "25", "26", "28")] == ["A", "Z", "A", "C"]


def test_the_strip_shows_whose_a_block_is_and_whether_it_is_full(tiny_gpt):
    llm = LLM(tiny_gpt(), num_blocks=7, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=9)
    llm.engine.add_request([1] * 6, params)
    llm.engine.add_request([2] * 4, params)
    llm.engine.step()
    assert pool_strip(llm.engine.scheduler, colour=False) == ["|AaB····|"]
    assert pool_strip(llm.engine.scheduler, colour=False, width=4) == ["|AaB·|", "|···|"]
    coloured = pool_strip(llm.engine.scheduler, colour=True)
    assert coloured == ["|\033[31mA\033[0m\033[31ma\033[0m\033[32mB\033[0m····|"]


def test_the_peak_counts_blocks_that_were_given_back_in_the_same_step(tiny_gpt):
    """Both requests end in the step in which they hold most; and what is taken away from one and
    given to the other within a step is not counted twice."""
    llm = LLM(tiny_gpt(), num_blocks=7, block_size=4)
    meter = Meter(llm)
    for prompt in ([1] * 6, [2] * 4):
        llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=1))
    meter.add(llm.engine.step())
    assert not llm.engine.has_unfinished() and meter.peak_blocks == 3

    llm = LLM(tiny_gpt(), num_blocks=7, block_size=4)
    meter = Meter(llm)
    for prompt in ([1] * 9, [2] * 12):
        llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=15))
    while llm.engine.has_unfinished():
        meter.add(llm.engine.step())
    assert llm.engine.scheduler.num_preemptions > 0 and meter.peak_blocks == 7
    assert meter.generated == 30


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(tiny_gpt, monkeypatch, stream, seconds):
    """What is drawn when a run's steps end at these seconds."""
    llm = LLM(tiny_gpt(), num_blocks=7, block_size=4)
    screen = Screen(Meter(llm), strip=True, stream=stream)
    llm.engine.add_request([1] * 6, SamplingParams(temperature=0, max_tokens=len(seconds)))
    for second in seconds:
        screen.meter.add(llm.engine.step())
        monkeypatch.setattr(terminal.time, "monotonic", lambda now=second: now)
        screen.show(last=not llm.engine.has_unfinished())
        monkeypatch.undo()
    return stream.getvalue()


def test_without_a_terminal_there_is_a_strip_a_second_and_one_at_the_end(tiny_gpt, monkeypatch):
    text = shown(tiny_gpt, monkeypatch, io.StringIO(), [100.0, 100.4, 100.9, 101.1, 101.2])
    strips = [line for line in text.splitlines() if line.startswith("|")]
    assert strips == ["|Aa·····|", "|AAa····|", "|·······|"]
    assert "\033" not in text


def test_a_terminal_is_drawn_over_in_place_20_times_a_second(tiny_gpt, monkeypatch):
    text = shown(tiny_gpt, monkeypatch, Terminal(), [100.0, 100.04, 100.06, 100.07])
    up_two_lines = "\033[2A"
    assert text.count(up_two_lines) == 2  # three times drawn, the first time over nothing
    assert text.count("\033[31m") == 4 and text.count("\r\033[K") == 6
