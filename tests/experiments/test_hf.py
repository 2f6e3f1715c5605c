"""What is measured of the caches: bytes counted by hand, equal work, and which attention ran."""

import pytest
from rows import pick, run

from experiments import hf
from experiments.results import Measurement

pytest.importorskip("transformers")

TINY = "--model assets/tiny-gpt2 --dtypes float32 --threads 1"
TOKEN_BYTES = 2 * 6 * 256 * 4  # K and V of 6 layers, 4 heads of 64, in float32


def value(rows, contender, metric, workload):
    (row,) = [
        r for r in pick(rows, contender=contender, metric=metric) if workload in r["workload"]
    ]
    return row["median"]


def test_a_decode_step_and_a_prefill_are_timed_with_four_caches(tmp_path):
    words = (
        f"--parts decode prefill --batches 2 --context 20 --steps 3 --rounds 2 --prompts 1 {TINY}"
    )
    rows = run(tmp_path, f"hf {words}")
    for workload, repeats in (
        ("decode batch=2 context=20..23", 6),
        ("prefill batch=1 prompt=20", 2),
    ):
        times = [r for r in pick(rows, metric="time a step") if r["workload"].startswith(workload)]
        assert [r["contender"] for r in times] == list(hf.CACHES)
        assert {r["repeats"] for r in times} == {repeats}
    ratios = pick(rows, metric="time a step against DynamicCache")
    assert len(ratios) == 2 * 3 and {r["unit"] for r in ratios} == {"x"}
    held = {r["contender"]: r["median"] for r in pick(rows, metric="KV memory")}
    assert held == {
        "DynamicCache": 2 * 23 * TOKEN_BYTES,
        "StaticCache": 2 * 23 * TOKEN_BYTES,
        "PagedCache, paged": 2 * 32 * TOKEN_BYTES,  # two blocks of 16 tokens each
        "PagedCache, gather": 2 * 32 * TOKEN_BYTES,
    }
    ratio = value(rows, "PagedCache, paged", "KV memory against the tokens' own", "decode")
    assert ratio == pytest.approx(32 / 23)


def test_the_bytes_of_growing_texts_of_different_ones_and_of_beams(tmp_path):
    words = "--parts memory --grow 1 40 --texts 2 --beams 2 --beam-tokens 3 --context 33"
    rows = run(tmp_path, f"hf {words} --steps 1 {TINY}")

    def held(workload):
        found = [r for r in pick(rows, metric="KV memory") if r["workload"].startswith(workload)]
        return {r["contender"]: r["median"] / TOKEN_BYTES for r in found}

    growing = {"DynamicCache": 2, "StaticCache": 80, "PagedCache, paged": 2 * 16}
    assert held("grow tokens=1 ") == growing
    assert held("grow tokens=40 ") == {
        "DynamicCache": 80,
        "StaticCache": 80,
        "PagedCache, paged": 96,
    }
    # Texts of 20 and 40 tokens: padded to 40, or 2 blocks and 3 blocks.
    ragged = {"DynamicCache": 80, "StaticCache": 80, "PagedCache, paged": 96}
    ragged |= {"PagedCache, one cache a text": 80, "the tokens' own": 60}
    assert held("ragged ") == ragged
    # Two beams with 33 to 35 tokens. transformers computes the prompt once for each. From then on
    # two full blocks are shared, and each beam has one of its own.
    beams = [held(f"beams step={n} ")["PagedCache, paged"] for n in (1, 2, 3)]
    assert beams == [6 * 16, 4 * 16, 4 * 16]
    assert held("beams step=3 ")["DynamicCache"] == 2 * 35


def test_other_logits_stop_the_run_before_anything_is_timed(tmp_path, monkeypatch):
    usual = hf.Loop.forward

    def wrong(loop):
        return usual(loop) + 0.1 * (loop.name == hf.STATIC)

    monkeypatch.setattr(hf.Loop, "forward", wrong)
    words = f"--parts decode --batches 1 --context 20 --steps 1 --rounds 1 {TINY}"
    with pytest.raises(SystemExit, match="StaticCache: logits differ by 1.0e-01, 1.0e-03"):
        run(tmp_path, f"hf {words}")


def test_a_paged_run_that_gathered_is_no_measurement():
    class Gathered:
        bytes_held, counts = 1, {"paged": 12, "gather": 1}

    model = type("Model", (), {"config": type("Config", (), {"n_layer": 12})})
    loop = hf.Loop(hf.PAGED, model, 1, 1, None)
    loop.cache, loop.num_forwards = Gathered(), 1
    with pytest.raises(AssertionError, match="'gather': 1"):
        loop.end()


def test_a_text_that_is_longer_than_the_model_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="1020 tokens and 8 steps: the model has 1024 positions"):
        run(tmp_path, f"hf --parts decode --context 1020 {TINY}")


def test_the_p99_is_compared_too():
    rounds = {hf.DYNAMIC: [[1.0, 9.0], [1.0, 9.0]], hf.PAGED: [[2.0, 3.0], [2.0, 3.0]]}
    columns = dict.fromkeys(("experiment", "workload", "dtype", "device"), "x") | {"threads": 1}
    rows = {row.metric: row for row in hf.rows_of_times(rounds, columns, "numba")
            if row.contender == hf.PAGED}  # fmt: skip
    assert isinstance(rows["time a step"], Measurement)
    assert rows["time a step against DynamicCache"].median == 2.5 / 5.0
    assert rows["p99 of a step against DynamicCache"].median == 3.0 / 9.0
