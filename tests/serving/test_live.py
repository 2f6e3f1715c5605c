"""The live page's events: a recorder's lines for each open page, and no cost without one."""

import asyncio
import json
import time

import httpx2
import pytest
from servers import running
from traffic import Pieces, build, fork_once

import serving.live
from llm import LLM
from sampling import SamplingParams
from serving.live import MAX_FRAMES, MAX_LISTENERS, Feed
from serving.server import ServerConfig
from watch.recorder import Describer, Recorder, read_recording


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(serving.live, "SECONDS_BETWEEN_LOOKS", 0.002)


def busy_engine(max_tokens=20):
    """An engine whose five requests fork, and preempt each other."""
    engine = build(num_blocks=14)
    for i in range(5):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add_request([i] * (3 + i), params, strategy=fork_once)
    return engine


def parse(text):
    """(name, data) of each event in a piece of a stream."""
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        *name, data = event.split("\n")
        name = name[0].removeprefix("event: ") if name else "message"
        events.append((name, json.loads(data.removeprefix("data: "))))
    return events


def listen(engine, feed, has_text=True, sleeps=()):
    """All events of a listener while the engine runs to its end.

    `sleeps` are the steps after which it does not read.
    """

    async def run():
        listener = feed.join(has_text)
        stream = listener.events(asyncio.Event())
        events = parse(await anext(stream))
        number = 0
        while engine.has_unfinished():
            engine.step()
            number += 1
            if number not in sleeps:
                events += parse(await anext(stream))
        listener.leave()
        return events

    return asyncio.run(run())


# ---- what is sent --------------------------------------------------------------------------------
def test_the_events_are_the_lines_that_a_recorder_writes(tmp_path):
    engine = busy_engine()
    path = tmp_path / "run.jsonl"
    engine.watchers.append(Recorder(engine.scheduler, path, model="a stand-in"))
    events = listen(engine, Feed(engine, model="a stand-in"))
    header, steps = read_recording(path)
    names = [name for name, _ in events]
    assert names == ["header"] + ["message"] * len(steps)
    assert without_times(events) == without_times([("header", header), *(("", s) for s in steps)])
    assert engine.scheduler.num_preemptions > 0 and any(step["copies"] for step in steps)


def without_times(events):
    return [data | {"milliseconds": 0} for _, data in events]


def test_a_listener_that_may_not_see_texts_gets_everything_else():
    engines = busy_engine(), busy_engine()
    with_text, without = [listen(e, Feed(e), i == 0) for i, e in enumerate(engines)]
    assert all("tokens" in line for _, line in with_text[1:])
    stripped = [(name, line | {"tokens": []}) for name, line in with_text]
    assert without_times(stripped)[1:] == without_times(without)[1:]
    assert '"tokens":["' not in json.dumps(without).replace(" ", "")


def told(events):
    """The tokens of each sequence that ran to the end, as the page puts them together."""
    texts = {}
    for name, line in events:
        for request, index, first, new in line["tokens"] if name == "message" else []:
            known = texts.setdefault((request, index), [])
            assert first <= len(known), "a token is missing"
            known[first:] = new
    return texts


def written_by(engine):
    requests = list(engine.requests.values())
    return lambda: {
        (request.request_id, seq.index): [Pieces().token_text(i) for i in seq.token_ids]
        for request in requests
        for seq in request.sequences
    }


def test_who_comes_in_the_middle_gets_all_tokens_of_what_runs():
    engine = busy_engine()
    texts = written_by(engine)
    for _ in range(12):
        engine.step()
    running = {(s.request.request_id, s.index) for s in engine.scheduler.running}
    events = listen(engine, Feed(engine))
    assert running and {key: texts()[key] for key in told(events)} == told(events)
    assert running <= set(told(events))


def test_a_slow_listener_loses_frames_is_told_and_delays_no_step():
    engine = busy_engine(max_tokens=30)
    texts = written_by(engine)
    feed = Feed(engine)
    feed._frames = type(feed._frames)(maxlen=4)
    events = listen(engine, feed, sleeps=range(5, 20))
    lost = [data["frames"] for name, data in events if name == "lost"]
    assert lost == [12]  # 16 steps since it read last, and the ring has 4 of them
    num_lines = sum(name == "message" for name, _ in events)
    assert num_lines + 12 == feed.num_frames
    # What it has missed of the tokens comes again with the next step.
    after = events[events.index(("lost", {"frames": 12})) + 5 :]
    assert {key: texts()[key] for key in told(after)} == told(after) != {}


def test_the_ring_is_bounded_and_without_listeners_the_feed_is_not_called(monkeypatch):
    engine = build()
    feed = Feed(engine)
    calls = []
    describe = Describer.__call__
    monkeypatch.setattr(Describer, "__call__", lambda *args: calls.append(args) or describe(*args))
    engine.add_request([1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(9):
        engine.step()
    assert engine.watchers == [] and calls == []
    with_text = feed.join(True)
    assert engine.watchers == [feed]
    without_text = feed.join(False)
    for _ in range(5):
        engine.step()
    assert len(calls) == 5
    with_text.leave()
    engine.step()
    assert feed.frames_since(5) == (0, [feed._frames[-1]])
    assert feed._frames[-1].with_text == "" and feed._frames[-1].without_text
    without_text.leave()
    engine.step()
    assert engine.watchers == [] and len(calls) == 6 and feed._frames.maxlen == MAX_FRAMES


def test_who_listens_while_nothing_runs_sees_an_empty_pool_at_once():
    async def run():
        stream = Feed(build(num_blocks=40)).join(True).events(asyncio.Event())
        return [parse(await anext(stream))[0] for _ in range(2)]

    header, (name, line) = asyncio.run(run())
    assert header[1]["num_blocks"] == 40
    assert (name, line["num_free"], line["sequences"], line["tokens"]) == ("message", 40, [], [])


# ---- over HTTP -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llm(shipped_model_folder):
    return LLM(shipped_model_folder, num_blocks=60, block_size=8)


def test_with_a_key_the_page_and_its_events_want_it_as_a_browser_can_send_it(llm):
    with running(llm, api_key="secret") as server:
        for path in ("/", "/events"):
            answer = server.client.get(path)
            assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
        page = server.client.get("/", auth=("anyone", "secret"))
        assert page.status_code == 200 and "<h1>The pool, live</h1>" in page.text
        allowed = page.headers["content-security-policy"]
        assert "default-src 'none'" in allowed and "connect-src 'self'" in allowed
        assert "frame-ancestors 'none'" in allowed and "unsafe" not in allowed


@pytest.mark.parametrize(
    "config, shows_text",
    [
        ({}, True),  # 127.0.0.1
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "api_key": "secret"}, True),  # the Guard asks everybody for it
        ({"allowed_hosts": ("example.org",)}, False),  # a proxy of this machine stands before it
    ],
)
def test_texts_are_for_this_machine_or_for_who_has_the_key(config, shows_text):
    assert ServerConfig(**config).shows_text == shows_text


def test_too_many_windows_are_refused_and_a_server_with_open_ones_stops_at_once(llm):
    with running(llm, host="0.0.0.0") as server:
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            streams = [client.stream("GET", "/events") for _ in range(MAX_LISTENERS)]
            lines = [iter(stream.__enter__().iter_lines()) for stream in streams]
            assert [next(each) for each in lines] == ["event: header"] * MAX_LISTENERS
            answer = server.client.get("/events")
            assert answer.status_code == 429 and "close one" in answer.json()["error"]["message"]
            streams.pop().__exit__(None, None, None)
            server.complete(prompt="The wolf", max_tokens=3)
            texts = [line for line in take(lines[0], 10) if line.startswith("data: {")]
            assert all('"tokens":[]' in text for text in texts[1:]) and len(texts) > 2
            started = time.monotonic()
            server.app.state.engine_thread.closing.set()
            assert list(lines[0]) is not None  # the stream ends
    assert time.monotonic() - started < 5


def take(lines, count):
    return [line for line, _ in zip(lines, range(count))]
