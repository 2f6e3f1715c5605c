"""2, 3 and 4 processes, each with a part of the model, do what one process does; or all end.

The processes are those of tests/ranked.py. Each has its own hash seed and its own addresses, so an
order that depends on either is found. (Ranks that differ end with a sentence: no test hangs.)
"""

import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx2
import pytest
import ranked
import torch
from conftest import ROOT

from kernels.packed_linear import is_packed, pack
from llm import LLM, EngineConfig
from model import GPT, GPTConfig, attend_one_sequence
from sampling import SamplingParams
from speedups.tensor_parallel import connect, cut, share


@contextmanager
def started(folder, size: int, *whichs: str, more: tuple = ()):
    """Processes [python tests/ranked.py FOLDER SIZE WHICH ..]; neither they nor forks survive."""
    program = [sys.executable, str(ROOT / "tests" / "ranked.py"), str(folder), str(size)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*program, which, *more], env=env, start_new_session=True, **options)
        for which in whichs
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own is a group, too
            process.communicate()


def printed_by(folder) -> dict[int, str]:
    """What each fork has printed."""
    return {int(path.stem): path.read_text() for path in folder.glob("*.txt")}


@functools.cache
def alone(case: str) -> dict:
    """What one process does with a case."""
    shape, options = ranked.CASES[case]
    return ranked.serve(LLM(ranked.model_of(shape), **ranked.POOL, **options))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_write_the_tokens_of_one_process(size, tmp_path):
    which = ["0", "1"] if size == 2 else ["all"]
    with started(tmp_path, size, *which) as processes:
        said = [process.communicate(timeout=100)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(which), "\n".join(said)
    if size > 2:
        ends = pickle.loads((tmp_path / "ends.pkl").read_bytes())
        assert [code for _, code, _ in ends] == [0] * size, printed_by(tmp_path)
    results = pickle.loads((tmp_path / "results.pkl").read_bytes())
    assert set(results) == set(ranked.CASES)
    for case, got in results.items():
        want = alone(case)
        assert got["outputs"].keys() == want["outputs"].keys()
        for name, texts in want["outputs"].items():
            if "together" in name and case == "25 heads":
                continue  # which of the two wait for the other is drawn by lot
            for theirs, ours in zip(texts, got["outputs"][name], strict=True):
                assert ours[:2] == theirs[:2], f"{case}, {name}"
                assert ours[2] == pytest.approx(theirs[2], abs=1e-9), f"{case}, {name}"
                assert ours[3] is theirs[3] is None
    got, want = results["12 heads"], alone("12 heads")  # whose order is the same in both
    for ours, theirs in zip(got["logits"], want["logits"], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert got["states"] == want["states"]
    assert got["pool bytes"] * size == want["pool bytes"]


def test_the_traffic_is_of_every_kind():
    got = alone("12 heads")
    assert got["states"] == {
        "aborted at once": False,
        "aborted while it waits": "waiting",
        "aborted while it runs": "running",
    }
    assert len(got["outputs"]) == 13 and got["preemptions"] > 3 and got["hits"] > 5
    assert len(got["outputs"]["three texts"]) == len(got["outputs"]["beams"]) == 3
    texts = [c[0] for texts in got["outputs"].values() for c in texts]
    assert len({token for text in texts for token in text}) > 40, "many different tokens"
    assert {len(logits) for logits in got["logits"]} >= {0, 1, 5}, "no row, one row, many"
    together = [got["outputs"][f"together {i}"][0][0] for i in (1, 2)]
    assert set(together[0][2:]) & set(together[1])


# ---- without processes ---------------------------------------------------------------------------
class Together:
    """Ranks of one process: the parts run one after the other, and meet in lists."""

    def __init__(self, size):
        self.size = size

    def of(self, rank):
        return SimpleNamespace(rank=rank, size=self.size, sum=lambda x: x, gather=lambda x: x)


@pytest.mark.parametrize("n_head, size", [(12, 2), (12, 3), (12, 4), (25, 2)])
def test_a_rank_keeps_its_share_of_the_weights_and_one_copy_of_the_positions(n_head, size):
    config = GPTConfig(n_head=n_head, n_embd=n_head * 64)
    with torch.device("meta"):
        whole = GPT(config)
    positions = whole.wpe.weight.nbytes
    num_bytes = sum(parameter.nbytes for parameter in whole.parameters()) - positions
    for rank in range(size):
        with torch.device("meta"):
            part = cut(GPT(config), Together(size).of(rank))
        kept = sum(parameter.nbytes for parameter in set(part.parameters())) - positions
        assert kept == pytest.approx(num_bytes / size, rel=0.05)
        assert part.h[0].attn.n_head in (n_head // size, n_head // size + 1)


def test_the_weights_of_the_other_ranks_are_not_kept():
    model = ranked.model_of(ranked.TWELVE)
    whole = [weakref.ref(parameter) for name, parameter in model.named_parameters() if "h." in name]
    norms = sum("ln_" in name for name, _ in model.named_parameters() if "h." in name)
    cut(model, Together(2).of(0))
    assert sum(reference() is not None for reference in whole) == norms
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, "a view of a whole"


def test_packed_layers_compute_what_the_plain_parts_compute():
    shape = {"vocab_size": 97, "max_seq_len": 32, "n_layer": 1, "n_head": 12, "n_embd": 768}
    ids = torch.arange(20)
    for rank in range(5):  # 2 and 3 heads, and columns that fill no whole panel
        plain, packed = (
            cut(GPT(GPTConfig(**shape)).init_weights(0.1).eval(), Together(5).of(rank))
            for _ in range(2)
        )
        with torch.inference_mode():
            pack(packed)
            got, want = (x.logits(x(ids, ids, attend_one_sequence)) for x in (packed, plain))
        assert is_packed(packed) and not is_packed(plain)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("total, size", [(25, 2), (25, 3), (25, 4), (12, 5), (7, 7), (3072, 4)])
def test_the_shares_are_all_heads_once_and_differ_by_one_at_most(total, size):
    shares = [share(total, rank, size) for rank in range(size)]
    assert [i for part in shares for i in range(total)[part]] == list(range(total))
    lengths = {part.stop - part.start for part in shares}
    assert max(lengths) - min(lengths) <= 1 and min(lengths) > 0


def test_one_rank_alone_is_the_whole_model():
    model, part = ranked.model_of(ranked.ODD), ranked.model_of(ranked.ODD)
    ranks = Together(1).of(0)
    connect(cut(part, ranks), ranks)
    ids = torch.arange(20)
    with torch.inference_mode():
        want = model.logits(model(ids, ids, attend_one_sequence))
        assert torch.equal(part.logits(part(ids, ids, attend_one_sequence)), want)


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(ValueError, match="13 ranks, and the model has 12 heads"):
        cut(ranked.model_of(ranked.TWELVE), Together(13).of(0))


def test_options_that_do_not_go_together_are_refused():
    for option in ("plan_ahead", "fused"):
        with pytest.raises(ValueError, match="goes neither with plan_ahead nor with fused"):
            EngineConfig(tensor_parallel=True, **{option: True})
    with pytest.raises(ValueError, match="needs several processes: start them with torchrun"):
        LLM(ranked.model_of(ranked.TWELVE), tensor_parallel=True)


# ---- the end -------------------------------------------------------------------------------------
ENDS = {"step": -signal.SIGKILL, "idle": -signal.SIGALRM, "interrupt": 130, "differ": 1}


@pytest.mark.parametrize(
    "victim, moment", [(0, "interrupt"), (2, "step"), (1, "idle"), (1, "differ")]
)
def test_if_one_rank_ends_all_end_within_10_seconds(victim, moment, tmp_path):
    with started(tmp_path, 3, "all", more=("die", str(victim), moment)) as (process,):
        process.communicate(timeout=60)
        assert process.returncode == 0
    ends = pickle.loads((tmp_path / "ends.pkl").read_bytes())
    printed = printed_by(tmp_path)
    (first, code, ended_first), *others = ends
    assert (first, code) == (victim, ENDS[moment]), printed
    if moment == "differ":
        assert "rank 1 did something else than rank 0 in step 1:" in printed[victim]
    for rank, code, ended in others:
        assert code == 1 and ended - ended_first < 10, printed
        sentence = printed[rank].splitlines()
        assert len(sentence) == 1 and sentence[0].startswith("tensor parallel: rank ")
        assert sentence[0].endswith(f" has ended, so rank {rank} ends too")


# ---- the programs --------------------------------------------------------------------------------
@contextmanager
def torchrun(*arguments: str):
    """Two ranks of a program, as a user starts them."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", "2", *arguments, "--tensor-parallel"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen(program, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


PROMPT = "Once upon a time there was a"


@functools.cache
def written_alone() -> str:
    """What one process writes after the prompt."""
    return LLM().generate(PROMPT, SamplingParams(seed=3, max_tokens=20))[0].outputs[0].text


@pytest.mark.slow
def test_the_command_line_on_two_ranks_writes_what_one_process_writes():
    with torchrun("generate.py", PROMPT, "--seed", "3", "--max-tokens", "20") as process:
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed == f"{PROMPT}{written_alone()}\n"


@pytest.mark.slow
def test_the_server_on_two_ranks_writes_what_one_process_writes():
    with torchrun("-m", "serving.server", "--port", "0") as process:
        lines = iter(process.stderr.readline, "")
        address = next(
            filter(None, (re.search(r"running on (http://\S+)", line) for line in lines))
        )
        body = {"prompt": PROMPT, "seed": 3, "max_tokens": 20}
        answer = httpx2.post(f"{address[1]}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == written_alone()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)  # the pipe is closed when the last rank has ended
