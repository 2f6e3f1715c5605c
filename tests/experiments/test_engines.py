"""Engines in processes of their own: turns, what is left out, and what is refused.

No engine of others is needed. Stand-ins take their places: scripts that answer in the same words.
"""

import importlib
import sys
from itertools import count

import pytest
from conftest import ROOT
from rows import pick, run

from experiments import engines
from experiments.engines import OURS, Peer
from experiments.peer_engines import protocol

STAND_IN = """
import os
from pathlib import Path
from protocol import Unsupported, serve

class StandIn:
    def __init__(self, task):
        if task.dtype == "int8":
            raise Unsupported("no int8 here")
        self.version, self.settings = "1.2", f"cores={len(os.sched_getaffinity(0))}"
        self.runs = 0

    def prepare(self, prompts):
        pass

    def generate(self, prompts, new_tokens, on_token):
        with open(Path(__file__).parent / "turns", "a") as file:
            file.write(f"{Path(__file__).stem} {len(prompts)} x {new_tokens}\\n")
        print("an engine that prints")
        self.runs += 1
        if self.runs == DIES_IN_RUN:
            raise RuntimeError("out of memory")
        for _ in range(new_tokens):
            for number in range(len(prompts)):
                on_token(number)
        return [[TOKEN, *range(1, new_tokens)] for _ in prompts]

serve(StandIn)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts an engine in place of the real ones."""
    (tmp_path / "protocol.py").write_text((engines.SCRIPTS / "protocol.py").read_text())
    monkeypatch.setattr(engines, "SCRIPTS", tmp_path)
    monkeypatch.setattr(engines, "PAUSE_S", 0)
    monkeypatch.setattr(engines, "PEERS", {})

    def add(name, token=5, dies_in_run=0):
        script = STAND_IN.replace("TOKEN", str(token)).replace("DIES_IN_RUN", str(dies_in_run))
        (tmp_path / f"{name}.py").write_text(script)
        python = tmp_path / "environments" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        engines.PEERS[name] = Peer(name, name)

    return add


SMALL = "--dtypes float32 --threads 1 --prompt-tokens 3 --new-tokens 4 --rounds 2"


def words(tmp_path, flags=SMALL):
    model = ROOT / "assets" / "tiny-gpt2"
    return f"engines --model {model} --environments {tmp_path / 'environments'} {flags}"


def test_each_engine_runs_once_a_round_and_warms_up_before(tmp_path, stand_in):
    stand_in(OURS)
    stand_in("other")
    rows = run(tmp_path, words(tmp_path, f"{SMALL} --batches 2 1"))
    turns = (tmp_path / "turns").read_text().splitlines()
    assert turns == [f"{name} {batch} x 4" for batch in (2, 1) for _ in range(3) for name in
                     (OURS, "other")]  # fmt: skip
    (ours, others) = pick(rows, workload="batch=2 prompt=3 new=4", metric="generated tokens")
    assert (ours["contender"], others["contender"], others["repeats"]) == (OURS, "other", 2)
    assert others["backend"] == "1.2: cores=1"  # its version, its settings; one thread, one core
    (times,) = pick(rows, workload="batch=2 prompt=3 new=4", metric="decode: ours against it")
    assert times["median"] == pytest.approx(ours["median"] / others["median"])
    (equal,) = pick(rows, workload="batch=1 prompt=3 new=4", metric="tokens equal to ours")
    assert equal["median"] == 100


def test_an_engine_with_other_tokens_is_refused_in_float32_and_counted_in_bfloat16(
    tmp_path, stand_in
):
    stand_in(OURS)
    stand_in("other", token=6)
    with pytest.raises(SystemExit, match="other: 0% of its sequences begin with our token"):
        run(tmp_path, words(tmp_path, f"{SMALL} --batches 2"))
    bfloat16 = SMALL.replace("float32", "bfloat16")
    rows = run(tmp_path, words(tmp_path, f"{bfloat16} --batches 2"))
    (equal,) = pick(rows, metric="tokens equal to ours")
    assert equal["median"] == 75  # 3 of 4 tokens


@pytest.mark.parametrize("dies_in_run", [1, 3])
def test_an_engine_that_dies_is_one_line_and_the_others_go_on(
    tmp_path, stand_in, capsys, dies_in_run
):
    stand_in(OURS)
    stand_in("other", dies_in_run=dies_in_run)
    stand_in("third")
    rows = run(tmp_path, words(tmp_path, f"{SMALL} --batches 2"))
    line = "other is left out: its process ended with 1: RuntimeError: out of memory\n"
    assert line in capsys.readouterr().err
    assert {row["contender"] for row in rows} == {OURS, "third"}


def test_a_dtype_that_an_engine_lacks_is_one_line(tmp_path, stand_in, capsys):
    stand_in(OURS)
    flags = SMALL.replace("float32", "int8 float32")
    rows = run(tmp_path, words(tmp_path, f"{flags} --batches 1"))
    assert f"{OURS} is left out: int8, no int8 here\n" in capsys.readouterr().err
    assert {row["dtype"] for row in rows} == {"float32"}


def test_without_any_environment_our_engine_runs_and_each_missing_one_is_one_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engines, "PAUSE_S", 0)
    rows = run(tmp_path, words(tmp_path, f"{SMALL} --batches 2"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    reason = "is no virtual environment (see: make engines)"
    assert lines == [
        *(
            f"{name} is left out: {tmp_path / 'environments' / folder} {reason}"
            for name, folder in {
                "vLLM": "vllm",
                "OpenVINO": "openvino",
                "CTranslate2": "ctranslate2",
                "llama.cpp": "llama_cpp",
                "transformers": "transformers",
            }.items()
        ),
        "PageBrain is left out: no package of it can be installed",
    ]
    assert {row["contender"] for row in rows} == {OURS}
    assert {row["metric"] for row in rows} == {"generated tokens", "prompt tokens"}


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path):
    flags = "--prompt-tokens 1000 --new-tokens 25"
    with pytest.raises(SystemExit, match="1025 tokens a sequence: the model has 1024 positions"):
        run(tmp_path, words(tmp_path, flags))


# ---- an engine's own form of the weights ---------------------------------------------------------
def test_the_half_that_a_stopped_process_has_written_is_not_read(tmp_path):
    def write_half(folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.bin").write_text("half")
        raise KeyboardInterrupt

    def write_all(folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.bin").write_text("whole")

    path = tmp_path / "models" / "own"
    with pytest.raises(KeyboardInterrupt):
        protocol.written_once(path, write_half)
    assert protocol.written_once(path, write_all) == str(path)
    assert protocol.written_once(path, write_half) == str(path), "it is there"
    assert (path / "model.bin").read_text() == "whole"


# ---- what a process counts -----------------------------------------------------------------------
def test_the_decode_begins_when_every_sequence_has_its_first_token(monkeypatch):
    seconds = count(100)
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: float(next(seconds)))
    clock = protocol.Clock(2)  # 100
    clock.on_token(0)  # 101
    clock.on_token(0)
    clock.on_token(0)
    clock.on_token(1)  # 102: the clock is read for first tokens only
    clock.on_token(1)
    assert (clock.first_s, clock.first_tokens, clock.num_tokens) == (2.0, 4, 5)


def test_rates_take_the_prefill_and_the_decode_apart():
    answer = {"first_s": 2.0, "first_tokens": 4, "total_s": 5.0, "tokens": [[0] * 8, [0] * 8]}
    # 2 prompts of 10 tokens in 2 seconds; 12 of 16 tokens in the 3 seconds after
    assert engines.rates([answer], 10) == {"decode": [4.0], "prefill": [10.0]}


@pytest.mark.parametrize(
    "name, written",
    [
        ("transformer.wte.weight", "token_embd.weight"),
        ("transformer.ln_f.bias", "output_norm.bias"),
        ("transformer.h.3.attn.c_proj.bias", "blk.3.attn_output.bias"),
        ("transformer.h.11.mlp.c_proj.weight", "blk.11.ffn_down.weight"),
    ],
)
def test_weights_have_their_names_in_gguf(name, written, monkeypatch):
    monkeypatch.syspath_prepend(engines.SCRIPTS)
    assert importlib.import_module("run_llama_cpp").gguf_name(name) == written
