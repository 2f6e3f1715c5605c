"""Simulated replicas: runs that are worked out by hand, and the bytes on the wire."""

import pytest
from conftest import ROOT
from rows import pick, run

from experiments import scale
from experiments.scale import STEP_MS, TOKEN_MS, Cluster, Prompt, allreduced_bytes, serve
from plots import tables
from serving.routing import KEY_BYTES


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)


def step_s(num_blocks: int) -> float:
    """Seconds of a step that computes so many blocks of 64 tokens."""
    return (STEP_MS + num_blocks * 64 * TOKEN_MS) / 1e3


# ---- one replica ---------------------------------------------------------------------------------
def test_a_second_turn_computes_what_is_new_and_its_last_block():
    prompts = [Prompt(0.0, [1, 2, 3]), Prompt(100.0, [1, 2, 3, 4, 5])]
    result = serve(prompts, 1, "prefix", block_tokens=64)
    assert result.found_percent == pytest.approx(100 * 3 / 8)
    assert result.median_s == pytest.approx(step_s(2))  # 5 blocks, 3 of them found
    assert result.p99_s == pytest.approx(step_s(3))
    assert result.tokens_per_s == pytest.approx(8 * 64 / (100 + step_s(2)))


def test_two_prompts_at_once_wait_for_the_same_step():
    result = serve([Prompt(0.0, [1, 2]), Prompt(0.0, [3, 4])], 1, "random", block_tokens=64)
    assert result.median_s == result.p99_s == pytest.approx(step_s(4))


# ---- routers -------------------------------------------------------------------------------------
def replicas_of(router: str, prompts: list[Prompt], num_replicas: int) -> list[int]:
    cluster = Cluster(num_replicas, router, block_tokens=64)
    for prompt in prompts:
        cluster.send(prompt, scale.block_keys(prompt.blocks, 1, b"") if router == "prefix" else [])
    cluster.finish(prompts)
    return cluster.chosen


def test_round_robin_sends_a_turn_elsewhere_and_prefix_routing_back():
    turns = [Prompt(100.0 * i, list(range(4 * i + 4))) for i in range(4)]
    assert replicas_of("round-robin", turns, 3) == [0, 1, 2, 0]
    assert len(set(replicas_of("prefix", turns, 3))) == 1


def test_least_loaded_sends_the_second_of_two_prompts_to_the_other_replica():
    prompts = [Prompt(0.0, [1, 2]), Prompt(0.0, [3, 4]), Prompt(0.0, [5, 6]), Prompt(0.0, [7, 8])]
    chosen = replicas_of("least-loaded", prompts, 4)
    assert sorted(chosen) == [0, 1, 2, 3]


def test_a_request_is_counted_until_its_step_ends():
    """The prompt at 0 s takes one step of about 0.02 s. One that comes in the middle sees it."""
    first, second = Prompt(0.0, [1]), Prompt(step_s(1) / 2, [2])
    assert len(set(replicas_of("least-loaded", [first, second], 2))) == 2
    cluster = Cluster(2, "least-loaded", block_tokens=64)
    cluster.send(first, [])
    cluster.send(second, [])
    cluster.send(Prompt(1.0, [3]), [])
    assert sum(cluster.loads) == 1, "both have ended long ago"


def test_a_burst_with_one_beginning_spills_over_when_its_replica_is_overloaded():
    burst = [Prompt(0.0, [1, 2, 3, 10 + i]) for i in range(20)]
    chosen = replicas_of("prefix", burst, 4)
    assert chosen[:8] == [chosen[0]] * 8  # BUSY requests
    assert len(set(chosen)) > 1


def test_with_many_replicas_prefix_routing_finds_what_one_pool_finds_and_random_does_not():
    prompts = scale.conversations(40, 4, seed=1)
    alone = serve(prompts, 1, "random", 64).found_percent
    many = {router: serve(prompts, 100, router, 64).found_percent for router in scale.ROUTERS}
    assert many["prefix"] > 0.95 * alone > 2 * many["random"]


# ---- the wire ------------------------------------------------------------------------------------
def test_the_bytes_of_a_token_are_those_of_a_ring():
    # 48 layers, two sums each of 1,600 numbers of 2 bytes: 307,200. With 2 ranks each is sent once.
    assert allreduced_bytes(48, 1600, 2) == 2 * 48 * 1600 * 2
    assert allreduced_bytes(48, 1600, 4) == 1.5 * 2 * 48 * 1600 * 2
    assert allreduced_bytes(48, 1600, 1) == 0


def test_each_router_and_each_number_of_replicas_has_its_rows(tmp_path):
    rows = run(tmp_path, "scale --conversations 5 --turns 2 --replicas 1 3")
    for router in scale.ROUTERS:
        for num_replicas in (1, 3):
            found = [
                row["metric"]
                for row in pick(rows, contender=router)
                if row["workload"].endswith(f"requests=10 replicas={num_replicas}")
            ]
            assert found == [metric for metric, _ in scale.FIGURES.values()]
    (sent,) = pick(
        rows, contender="70B", metric="bytes sent a token", workload=rows[-1]["workload"]
    )
    assert sent["median"] == 2 * 80 * 8192 * 2 * 2 * 7 / 8


# ---- the page ------------------------------------------------------------------------------------
def test_the_sentences_of_the_page_hold_for_the_committed_rows():
    found = tables.scale_figures("trace ", "prompt tokens found")
    assert found["random", 4] > found["random", 64] > found["random", 1000]
    assert abs(found["prefix", 1000] - found["prefix", 16]) < 2
    waits = tables.scale_figures("trace ", "time to first token")
    assert (
        waits["prefix", 4] < 10 and min(waits[name, 4] for name in ("random", "round-robin")) > 60
    )
    assert min(waits[router, 1] for router in scale.ROUTERS) > 1000
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"takes 8 A100 about {STEP_MS:.0f} ms" in page and len(page.splitlines()) < 150
    of = tables.SCALE, "70B"
    ethernet = "sums of a step of 1 tokens, Ethernet, 100 Gbit/s"
    nvlink = "sums of a step of 1 tokens, NVLink of an H100"
    workload = "tensor parallel, arithmetic, ranks=8"
    slow, fast = (tables.newest(*of, metric, workload, "none") for metric in (ethernet, nvlink))
    assert slow > 0.9 * STEP_MS and fast < 0.5 * STEP_MS
    assert f"makes a report of {10_000 * KEY_BYTES // 1000} kB" in page
