"""The pages in headless Chromium: what they show is what the recording says."""

import base64
import gzip
import json
import re

import pytest
import torch
from browser import PROGRAM, Browser
from conftest import ROOT
from servers import running, wait_for

from block_allocator import BlockAllocator
from engine import InferenceEngine
from kv_cache import KVCache
from llm import LLM
from plots.palette import PALETTE, contrast
from prefix_cache import PrefixCache
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import Continuation
from serving.replay import inlined, main, policy, replay_page
from watch.recorder import Recorder, holders, read_recording, strips

EMPTY = "#e1e5ea"  # the colour of free blocks on a light page
DEMO = ROOT / "results/recordings/demo.jsonl"
in_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="Chromium is not installed: apt-get install chromium"
)


# ---- the files -----------------------------------------------------------------------------------
def recording_in(page):
    packed = re.search(r'id="recording">([^<]*)<', page).group(1)
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_the_committed_page_replays_the_committed_recording_with_the_code_that_is_here():
    """They differ? `python -m serving.replay results/recordings/demo.jsonl docs/replay.html`"""
    page = (ROOT / "docs/replay.html").read_text(encoding="utf-8")
    assert recording_in(page) == DEMO.read_text(encoding="utf-8")
    # Another version of zlib may pack the same text into other bytes.
    without_data = lambda text: re.sub(r'id="recording">[^<]*<', "", text)  # noqa: E731
    assert without_data(page) == without_data(replay_page(DEMO))
    assert len(page) < 200_000


def test_a_page_links_no_file_and_its_policy_allows_only_its_own_scripts():
    page = replay_page(DEMO)
    assert re.findall(r"\bsrc=|https?:|@import|url\(", page) == []
    assert re.findall(r'<link [^>]*href="([^"]*)"', page) == ["data:,"]
    allowed = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in allowed and "unsafe" not in allowed
    # A changed script has another hash, so the browser would refuse it.
    assert policy(page.replace("function play", "function pay")) != policy(page)


def test_a_file_that_is_no_recording_gives_a_sentence_and_no_page(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(SystemExit, match="serving.replay: .*notes.txt, line 1: "):
        main([str(tmp_path / "notes.txt"), str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_a_request_has_the_colour_that_it_has_in_the_pictures():
    colours = re.search(r"const PALETTE = \[(.*?)\]", inlined("replay.html"), re.DOTALL).group(1)
    assert json.loads(f"[{colours.strip().rstrip(',')}]") == PALETTE


def test_all_texts_can_be_read_on_light_and_on_dark():
    light, dark = [
        dict(re.findall(r"--(\w+): (#\w{6});", part))
        for part in inlined("replay.html").split("prefers-color-scheme: dark")
    ][:2]
    for theme in (light, dark):
        for ink in ("ink", "faint", "accent"):
            assert contrast(theme[ink], theme["ground"]) >= 4.5, ink
        assert contrast(theme["faint"], theme["card"]) >= 4.5


# ---- in the browser ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def replay(browser, tmp_path):
    """Opens the page of a recording; afterwards nothing in it has failed."""

    def open_page(recording=DEMO):
        page = tmp_path / "replay.html"
        page.write_text(replay_page(recording), encoding="utf-8")
        browser.open(page.as_uri())
        browser.wait_for("typeof run === 'object' && run?.lines.length")
        drawn(browser)
        return browser

    browser.log.clear()
    browser.resize(1200, 900)
    yield open_page
    assert browser.log == []


def slide_to(browser, step):
    """Move the slider as a user does: its value, then the event."""
    browser.run(f"find('slider').value = {step - 1}")
    browser.run("find('slider').dispatchEvent(new Event('input'))")
    drawn(browser)


def drawn(browser):
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def counters(browser):
    script = "Object.fromEntries([...document.querySelectorAll('dd')].map((each) => "
    return browser.run(script + "[each.dataset.name, each.textContent]))")


def colours(browser):
    """The colour of each block in the grid, near its upper left corner."""
    script = "[...Array(run.header.num_blocks).keys()].map((block) => { const { size, columns } = "
    script += "view.shape; const at = [block % columns, Math.floor(block / columns)].map((each) => "
    script += "each * size + 5); const context = view.grid.getContext('2d'); "
    script += "return [...context.getImageData(...at, 1, 1).data].slice(0, 3); })"
    return ["#" + "".join(f"{part:02x}" for part in pixel) for pixel in browser.run(script)]


def click_block(browser, block):
    size, columns = browser.run("[view.shape.size, view.shape.columns]")
    x, y = block % columns * size + size / 2, block // columns * size + size / 2
    browser.click("#grid", x, y)
    drawn(browser)
    return browser.run("view.detail.innerText")


@in_chromium
def test_the_slider_moves_the_grid_and_the_counters_to_what_the_recording_says(replay):
    browser = replay()
    header, steps = read_recording(DEMO)
    grids = set()
    for step in (steps[0], steps[47], steps[-1]):
        slide_to(browser, step["step"])
        assert browser.run("find('step').textContent") == f"step {step['step']} of 116"
        held = holders(header, step)
        shown = counters(browser)
        assert shown["blocks held"] == str(sum(map(bool, held)))
        assert int(shown["cached"]) == len(step["cached"])
        assert int(shown["cached"]) + int(shown["free"]) == step["num_free"]
        assert shown["waiting"] == str(step["num_waiting"])
        preempted = sum(len(each["preempted"]) for each in steps[: step["step"]])
        assert shown["preemptions"] == str(preempted)
        # A full block has the colour of its request, a free one that of the empty ones.
        seen = colours(browser)
        free = {block for block in range(60) if not held[block]} - set(step["cached"])
        assert {seen[block] for block in free} <= {EMPTY}
        assert not {seen[block] for block in step["cached"]} & {EMPTY, *PALETTE}  # dim
        for seq in step["sequences"]:
            full = seq["block_table"][: seq["num_computed_tokens"] // 8]
            assert {seen[block] for block in full} <= {PALETTE[int(seq["request"])]}
        grids.add(browser.run("view.grid.toDataURL()"))
    assert len(grids) == 3


@in_chromium
def test_the_rows_of_the_requests_are_the_strips_of_the_recorder(replay):
    browser = replay()
    letters = {"prefill": "P", "decode": "d", "idle": ".", "waiting": ".", "preempted": "x"}
    script = "[...run.lanes.values()].map((lane) => [lane.request, lane.index, lane.runs])"
    rows = {}
    for request, index, runs in browser.run(script):
        row = [" "] * 116
        for state, first, end in runs:
            row[first:end] = letters[state] * (end - first)
        rows[request, index] = "".join(row)
    assert rows == strips(read_recording(DEMO)[1])
    assert browser.run("find('queue').textContent") == "queue: empty"
    slide_to(browser, 48)
    assert browser.run("find('queue').textContent") == "queue: JKL"
    # A click into the rows goes to that step: 44 pixels of labels, then 116 columns.
    width = browser.run("view.plot.width")
    browser.click("#lanes", 44 + width * 99.5 / 116, 60)
    assert browser.run("find('step').textContent") == "step 100 of 116"


@in_chromium
def test_a_click_on_a_block_shows_its_tokens_and_who_holds_it(replay):
    browser = replay()
    slide_to(browser, 48)
    lines = click_block(browser, 5).split("\n")
    assert lines[0] == "Block 5: held by 1 sequence"
    assert "slots 40 to 47, reference count 1" in lines
    # The prompt of D, "There was once a poor miller", and what D wrote first.
    tokens = browser.run("[...document.querySelectorAll('.tokens li')].map((x) => x.textContent)")
    assert tokens == ["There", "·was", "·once", "·a", "·poor", "·miller", "·who", "·had"]
    assert any(line.endswith("logical block 0: tokens [0, 8)") for line in lines)
    table = browser.run("[...document.querySelectorAll('.table button')].map((x) => x.innerText)")
    assert table == ["5", "22", "34", "46", "58", "19", "57"]
    browser.click(".table button:nth-of-type(7)")  # the last block of D has empty slots
    assert browser.run("document.querySelectorAll('.no-token').length") == 3
    # J was preempted in this step, and its blocks keep their contents.
    lines = click_block(browser, 44)
    assert "Block 44: cached: kept, without a holder" in lines and "reference count 0" in lines


@in_chromium
def test_keys_play_step_and_choose(replay):
    browser = replay()
    shown = "find('step').textContent"
    browser.press("ArrowRight", 39)
    assert browser.run(shown) == "step 2 of 116"
    browser.press("ArrowLeft", 37)
    assert browser.run(shown) == "step 1 of 116"
    browser.run("find('speed').value = '60'")
    browser.press(" ", 32)
    browser.wait_for("number > 5")
    browser.press(" ", 32)
    stopped_at = browser.run("number")
    browser.run("find('grid').focus()")
    browser.press("ArrowRight", 39)
    browser.press("ArrowRight", 39)
    assert browser.run("[view.selected, number]") == [1, stopped_at]
    assert browser.run("view.spoken.textContent").startswith("Block 1: held by")
    browser.press("Escape", 27)
    assert browser.run("view.selected") is None


@in_chromium
def test_the_trace_is_json_with_a_bar_for_each_state_and_counters(replay, tmp_path):
    browser = replay()
    folder = tmp_path / "saved"
    folder.mkdir()
    browser.save_downloads(folder)
    browser.click("#export")
    trace = json.loads(browser.downloaded(folder / "trace.json"))
    header, steps = read_recording(DEMO)
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in bars)
    assert end == pytest.approx(1000 * sum(step["milliseconds"] for step in steps))
    assert {event["name"] for event in bars} == {"prefill", "decode", "waiting", "preempted"}
    assert sum(event["name"] == "preempted" for event in bars) == 7
    blocks = [event["args"] for event in trace["traceEvents"] if event["name"] == "blocks"]
    assert [b["free"] + b["cached"] for b in blocks] == [step["num_free"] for step in steps]
    assert [b["cached"] for b in blocks] == [len(step["cached"]) for step in steps]
    names = [event for event in trace["traceEvents"] if event["name"] == "thread_name"]
    assert len(names) == 12 and names[3]["args"]["name"] == "D (request 3, text 0)"


# ---- other recordings ----------------------------------------------------------------------------
class Letters:
    """Token 0 is text that would be markup if a page took it for such."""

    def token_bytes(self, token_id):
        return self.token_text(token_id).encode()

    def token_text(self, token_id):
        return "</script><img src=x onerror=alert(1)>" if token_id == 0 else "b"

    def encode(self, text):
        return [1] * len(text)


def fork_once(sequences, logits):
    seq, *others = sequences
    if len(seq.request.sequences) == 1:
        return [Continuation(seq, [0]), Continuation(seq, [1])]
    return [Continuation(each, [0]) for each in [seq, *others]]


@pytest.fixture
def forked(tmp_path):
    """A recording of one request that forks after its prompt of 6, in a pool of 8 blocks of 4."""
    scheduler = Scheduler(BlockAllocator(8, 4), 4, 16, max_seq_len=64)
    cache = KVCache(1, 8, 4, num_kv_heads=1, head_dim=1)
    forward = lambda batch: torch.zeros(len(batch.sample_rows), 2)  # noqa: E731
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=2, tokenizer=Letters())
    path = tmp_path / "forked.jsonl"
    engine.watchers.append(Recorder(scheduler, path, model="<b>a stand-in</b>"))
    engine.add_request([1] * 6, SamplingParams(max_tokens=4), strategy=fork_once)
    while engine.has_unfinished():
        engine.step()
    return path


@in_chromium
def test_a_shared_block_is_hatched_and_names_both_holders(replay, forked):
    browser = replay(forked)
    shown = counters(browser)
    assert (shown["blocks held"], shown["shared"], shown["copied blocks"]) == ("2", "2", "0")
    slide_to(browser, 2)  # the first to write into the shared tail has copied it
    shown = counters(browser)
    assert (shown["blocks held"], shown["shared"], shown["copied blocks"]) == ("3", "1", "1")
    text = click_block(browser, 0)
    assert "Block 0: held by 2 sequences" in text and "reference count 2" in text
    assert browser.run("document.querySelectorAll('.holder').length") == 2
    assert "reference count 1, copied from block 1 in this step" in click_block(browser, 2)
    # A strip above the label, which has colours of its own.
    colours = "new Set(new Uint32Array(view.grid.getContext('2d').getImageData(%d, 4, 30, 6)"
    colours += ".data.buffer)).size"
    hatched, plain = browser.run(colours % 6), browser.run(colours % (1 * 46 + 6))
    assert plain == 2  # filled and unfilled slots
    assert hatched > 5


@pytest.fixture
def cached(tmp_path):
    """A recording of two equal prompts of 9, one after the other, in a pool that caches blocks."""
    scheduler = Scheduler(PrefixCache(8, 4), 4, 16, max_seq_len=64)
    cache = KVCache(1, 8, 4, num_kv_heads=1, head_dim=1)
    forward = lambda batch: torch.zeros(len(batch.sample_rows), 2)  # noqa: E731
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=2, tokenizer=Letters())
    path = tmp_path / "cached.jsonl"
    engine.watchers.append(Recorder(scheduler, path))
    for _ in range(2):
        engine.add_request([1] * 9, SamplingParams(max_tokens=2, temperature=0))
        while engine.has_unfinished():
            engine.step()
    return path


@in_chromium
@pytest.mark.parametrize("is_listed", [True, False], ids=["in each line", "not in each line"])
def test_a_cached_block_is_dim_until_somebody_takes_it(replay, cached, is_listed):
    lines = [json.loads(line) for line in cached.read_text().splitlines()]
    if not is_listed:  # as in a large pool: in step 3 the two blocks that were cached are taken
        del lines[3]["cached"]
    cached.write_text("".join(json.dumps(line) + "\n" for line in lines))
    browser = replay(cached)
    name = ("blocks held", "cached", "free", "cached blocks found")
    seen = []
    for step in (1, 2, 3, 4):
        slide_to(browser, step)
        seen.append([int(counters(browser)[each]) for each in name])
        if step == 2:
            assert colours(browser)[0] not in (PALETTE[0], EMPTY)  # its colour, but dim
            text = click_block(browser, 0)
            assert "Block 0: cached: kept, without a holder" in text and "b\nb\nb\nb" in text
    # Two of three blocks are full, so they stay; the second prompt finds them.
    assert seen == [[3, 0, 5, 0], [0, 2, 6, 0], [3, 0, 5, 2], [0, 2, 6, 2]]
    assert "Block 0: cached" in browser.run("view.detail.innerText")


@in_chromium
def test_text_from_a_run_is_text_and_never_markup(replay, forked):
    browser = replay(forked)
    slide_to(browser, 3)
    text = click_block(browser, 1)
    assert "</script><img·src=x·onerror=alert(1)>" in text
    assert "<b>a stand-in</b>, 8 blocks of 4 tokens" == browser.run("find('about').textContent")
    assert browser.run("document.querySelectorAll('img, b').length") == 0


@in_chromium
def test_the_page_without_a_recording_takes_one_that_is_chosen_or_dropped(browser, forked):
    browser.open((ROOT / "serving/replay.html").as_uri())
    assert browser.run("find('controls').hidden")
    browser.choose_file("#file", forked)
    browser.wait_for("run?.lines.length === 4")
    drop = "(text) => { const data = new DataTransfer(); data.items.add(new File([text], 'x')); "
    drop += "document.dispatchEvent(new DragEvent('drop', { dataTransfer: data })); }"
    browser.run(f"({drop})({json.dumps(DEMO.read_text())})")
    browser.wait_for("run.lines.length === 116")
    lines = forked.read_text().splitlines(keepends=True)
    for text, words in [
        ("hello\n", "line 1: Unexpected token"),
        ("", "the file holds no whole step"),
        ('{"format": "diary"}\n', "line 1: this is no recording"),
        (lines[0].replace('"version":1', '"version":2'), "line 1: version 2"),
        (lines[0] + lines[1].replace("[0,1]", "[0,8]"), "line 2: sequence 0 has no valid"),
        (lines[0].replace('"num_blocks":8', '"num_blocks":99999999'), "draws at most 65536"),
    ]:
        browser.run(f"({drop})({json.dumps(text)})")
        browser.wait_for(f"find('error').innerText.includes({json.dumps(words)})")
        assert browser.run("run.lines.length") == 116  # the last good one stays
    # A run that was killed: its last line is cut, and the lines above it are shown.
    browser.run(f"({drop})({json.dumps(''.join(lines)[:-9])})")
    browser.wait_for("run.lines.length === 3 && find('error').hidden")


@in_chromium
def test_a_recording_without_texts_shows_its_blocks(replay, forked):
    records = [json.loads(line) for line in forked.read_text().splitlines()]
    for step in records[1:]:
        del step["tokens"], step["copies"], step["cached"]
    forked.write_text("".join(json.dumps(record) + "\n" for record in records))
    browser = replay(forked)
    assert "Block 0: held by 2 sequences" in click_block(browser, 0)
    assert browser.run("document.querySelector('.tokens').textContent") == "????"


@in_chromium
def test_of_a_large_pool_the_blocks_that_were_held_are_drawn(replay, forked):
    forked.write_text(forked.read_text().replace('"num_blocks":8', '"num_blocks":5000', 1))
    browser = replay(forked)
    assert browser.run("view.rest.textContent") == "and 4,744 blocks that nobody has held yet"
    assert counters(browser)["free"] == "4,998"
    browser.run("run.lastHolder[700] = run.lastHolder[0]")  # as if block 700 had been held
    slide_to(browser, 2)
    assert browser.run("[run.numShown, view.rest.textContent.slice(0, 9)]") == [1024, "and 3,976"]
    assert "Block 1000: free" in click_block(browser, 1000)


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(replay, scheme):
    browser = replay()
    browser.resize(390, 844, scheme)
    slide_to(browser, 48)
    click_block(browser, 5)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


# ---- the live page -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server(shipped_model_folder):
    with running(LLM(shipped_model_folder, num_blocks=60, block_size=8)) as server:
        yield server


@pytest.fixture
def live(browser, server):
    """The live page, open; afterwards nothing in it has failed and all blocks are free."""
    browser.log.clear()
    browser.resize(1200, 900)
    browser.open(server.url)
    browser.wait_for("run?.lines.length === 1")  # the pool while nothing runs
    yield browser
    assert browser.log == []
    browser.open("about:blank")
    server.wait_until_free()
    wait_for(lambda: server.app.state.service.feed not in server.llm.engine.watchers)


def send(browser, prompt, **numbers):
    """Fill in the form as a user does, and send it with the keyboard."""
    for name, value in numbers.items():
        browser.run(f"find('{name}').value = {value}")
    browser.run("find('prompt').select()")
    browser.type(prompt)
    browser.press("Enter", 13, ctrl=True)


STATES = "[...document.querySelectorAll('.state')].map((each) => each.textContent.trim())"
WRITTEN = "[...document.querySelectorAll('.written')].map((each) => each.textContent)"


@in_chromium
def test_a_prompt_is_typed_text_streams_the_grid_changes_and_the_blocks_go_back(live, server):
    body = {"prompt": "The old woman said", "max_tokens": 60, "temperature": 0}
    drawn(live)
    assert not set(colours(live)) & set(PALETTE)
    send(live, body["prompt"], max_tokens=60, temperature=0)
    live.wait_for(f"{STATES}[0] === 'writing'")
    part = live.wait_for(f"{WRITTEN}[0]")
    wait_for(lambda: set(colours(live)) & set(PALETTE))
    live.wait_for(f"{STATES}[0] === 'done'", 30)
    text = live.run(f"{WRITTEN}[0]")
    assert text.startswith(part) and len(part) < len(text)
    live.wait_for("run.lines.at(-1).num_free === 60")
    wait_for(lambda: not set(colours(live)) & set(PALETTE))
    held = live.run("run.lines.map((line) => 60 - line.num_free)")
    assert held[0] == 0 and max(held) >= 8
    shown = counters(live)
    assert shown["blocks held"] == "0" and int(shown["cached"]) + int(shown["free"]) == 60
    assert text == server.complete(**body)["choices"][0]["text"]
    # The chip before the text names the engine's request, so it has the colour of its blocks.
    request = live.run("[...run.lanes.values()][0].request")
    letter = live.run("document.querySelector('.answer .chip').textContent")
    assert letter == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[int(request) % 26]


@in_chromium
def test_several_texts_wait_are_preempted_and_all_end(live):
    for number in range(3):
        send(live, f"Chapter {number}", n=4, max_tokens=60)
    live.wait_for(f"{STATES}.length === 3 && {STATES}.every((state) => state === 'done')", 60)
    texts = live.run(WRITTEN)
    assert len(texts) == 12 and all(texts) and len(set(texts)) > 9
    assert int(counters(live)["preemptions"]) > 0
    rows = live.run("[...run.lanes.values()].map((lane) => lane.runs.map((each) => each[0]))")
    assert len(rows) == 12 and any("preempted" in row for row in rows)


@in_chromium
def test_stop_ends_a_text_and_frees_its_blocks_and_a_mistake_is_a_sentence(live):
    send(live, "Once", n=1, max_tokens=400, temperature=1)
    live.wait_for(f"{WRITTEN}[0]")
    live.click(".answer button")
    live.wait_for(f"{STATES}[0] === 'stopped'")
    live.wait_for("run.lines.at(-1).num_free === 60")
    send(live, "Once", max_tokens=5000)
    live.wait_for(f"{STATES}[0].startsWith('failed: ')")
    assert "max_tokens is 5000" in live.run(f"{STATES}[0]")
    live.log.clear()  # the browser itself logs the 400


@in_chromium
def test_the_view_can_be_paused_and_goes_back(live):
    send(live, "The wolf", max_tokens=60, temperature=1)
    live.wait_for("run.end > 10")
    live.run("find('follow').focus()")
    live.press(" ", 32)
    at = live.run("view.number")
    live.wait_for(f"run.end > {at} + 5")
    assert live.run("view.number") == at and live.run("find('follow').textContent") == "Follow"
    live.run("find('slider').focus()")
    live.press("ArrowLeft", 37)
    assert live.run("view.number") == at - 1
    live.click("#follow")
    live.wait_for("view.number === run.end - 1")


@in_chromium
def test_the_live_page_fits_a_phone(live):
    live.resize(390, 844, "dark")
    send(live, "The " + "very" * 40 + " long word", max_tokens=20)
    live.wait_for(f"{STATES}[0] === 'done'")
    click_block(live, 0)
    assert live.run("document.documentElement.scrollWidth") <= 390
