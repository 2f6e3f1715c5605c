"""transformers as a peer: equal work is checked first, and the parts of a step are timed."""

import sys
import time

import pytest
import torch
from rows import pick, run
from torch import nn

import benchmark
from checkpoints.load import load_model
from experiments import peers, transformers_engines
from experiments.transformers_engines import Continuous, Theirs

# ---- peers ---------------------------------------------------------------------------------------
TINY_PEERS = "--dtypes float32 --prompt-tokens 9 --steps 2 --rounds 2 --repeats 2"


def test_peers_times_the_engine_and_transformers_on_equal_work(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"peers --model {shipped_model_folder} --batches 1 3 --prefill 2 {TINY_PEERS}"
    rows = run(tmp_path, words)
    for workload in ("decode batch=1 context=9..11", "decode batch=3 context=9..11"):
        found = pick(rows, workload=f"{workload} block_size=16", metric="time a step")
        assert [(row["contender"], row["repeats"]) for row in found] == [
            (peers.OURS, 2 * 2),
            (peers.THEIRS, 2 * 2),
        ]
    assert len(pick(rows, unit="x", contender=peers.OURS)) == 3
    (ours, theirs) = pick(rows, workload="prefill batch=2 prompt=9 block_size=16", unit="ms")
    (ratio,) = pick(rows, workload="prefill batch=2 prompt=9 block_size=16", unit="x")
    assert ratio["median"] == pytest.approx(theirs["median"] / ours["median"])


@pytest.mark.parametrize(
    "words",
    [
        f"peers --batches 2 {TINY_PEERS}",
        "latency --device cpu --shapes 1x9 --steps 2 --contenders eager transformers",
    ],
)
def test_peers_with_other_weights_are_refused(tmp_path, monkeypatch, shipped_model_folder, words):
    pytest.importorskip("transformers")
    whole = transformers_engines.as_transformers

    def spoiled(model):
        theirs = whole(model)
        theirs.transformer.h[3].mlp.c_proj.bias.data[0] += 1
        return theirs

    monkeypatch.setattr(transformers_engines, "as_transformers", spoiled)
    with pytest.raises(SystemExit, match="the logits differ by"):
        run(tmp_path, f"{words} --model {shipped_model_folder}")


def test_peers_refuses_what_the_model_has_no_positions_for(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"peers --model {shipped_model_folder} --prompt-tokens 1020 --steps 9"
    with pytest.raises(SystemExit, match="1020 prompt tokens and 9 steps: the model has 1024"):
        run(tmp_path, words)


def test_theirs_goes_on_from_a_copy_of_our_prompts_as_from_its_own(shipped_model_folder):
    pytest.importorskip("transformers")
    model = load_model(shipped_model_folder)
    args = benchmark.parse_args(["peers", "--prompt-tokens", "9", "--block-size", "4"])
    prompts, other = peers.random_ids(model, 3, 9, seed=0), torch.tensor([[5, 6], [7, 8]])
    ours, theirs = (
        peers.build(model, 3, 3, args),
        Theirs(transformers_engines.as_transformers(model)),
    )

    def written(prompts):
        theirs.start(prompts)
        scores = [theirs.next_ids, *(theirs.logits(theirs.next_ids) for _ in range(2))]
        theirs.finish()
        return scores

    alone = [written(prompts), written(other)]
    theirs.take_over(ours, prompts)
    assert not ours.llm.engine.has_unfinished()
    rows = []  # of tokens that went through their model
    theirs.model.register_forward_hook(lambda *call: rows.append(call[2].logits.shape[0]))
    # Twice, since a round must not change what the next one begins with.
    together = [written(prompts), written(prompts), written(other)]
    assert rows == [3, 3, 3, 3, 2, 2, 2], "the copied prompts were computed again"
    torch.testing.assert_close(together, [alone[0], *alone], atol=1e-3, rtol=0)


@pytest.mark.parametrize("experiment", ["peers", "anatomy"])
def test_without_transformers_its_peers_say_so(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="transformers is not installed"):
        run(tmp_path, experiment)


# ---- anatomy -------------------------------------------------------------------------------------
def anatomy_args(words):
    return benchmark.parse_args(["anatomy", *words.split()])


def test_anatomy_times_a_step_its_parts_and_what_is_possible(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    sizes = "--batches 2 --prompt-tokens 9 --steps 4 --rounds 2 --read-mb 8 --dtypes float32"
    rows = run(tmp_path, f"anatomy --model {shipped_model_folder} {sizes}")
    assert {row["workload"] for row in rows} == {"decode batch=2 context=9..13 block_size=16"}
    ms = {row["contender"]: row["median"] for row in pick(rows, unit="ms")}
    parts = ["products", "attention", "small operations", "forward", "KV read once"]
    assert list(ms) == [peers.OURS, peers.THEIRS, *parts]
    shares = {row["contender"]: row["median"] for row in pick(rows, unit="%")}
    assert shares == {part: pytest.approx(100 * ms[part] / ms[peers.OURS]) for part in parts}
    (alone,) = pick(rows, contender="at most: the products alone")
    assert alone["median"] == pytest.approx(ms[peers.THEIRS] / ms["products"])
    (with_read,) = pick(rows, contender="at most: products and one read of KV")
    assert with_read["median"] < alone["median"]
    (as_it_is,) = pick(rows, contender="products and attention alone")
    both = ms["products"] + ms["attention"]
    assert as_it_is["median"] == pytest.approx(ms[peers.THEIRS] / both)


def test_the_blocks_that_anatomy_reads_are_those_of_one_step_half_way(shipped_model_folder):
    args = anatomy_args("--batches 3 --prompt-tokens 30 --steps 8 --block-size 4")
    ours = peers.build(load_model(shipped_model_folder), 3, 9, args)
    batch = peers.middle_batch(ours, 3, args)
    assert batch.context_lens.tolist() == [34, 34, 34]  # 30 of the prompt, 4 of 8 steps
    assert batch.positions.tolist() == [33, 33, 33]
    tables = batch.block_tables.tolist()
    assert [len(table) for table in tables] == [9, 9, 9]  # 34 tokens, 4 a block
    assert len({block_id for table in tables for block_id in table}) == 27
    assert max(map(max, tables)) < ours.llm.config.num_blocks


def test_the_products_of_anatomy_are_all_of_the_models_matrices(shipped_model_folder):
    model = load_model(shipped_model_folder)
    args = anatomy_args("--batches 2 --prompt-tokens 9 --steps 2")
    ours = peers.build(model, 2, 3, args)
    parts = peers.parts_of(ours, peers.middle_batch(ours, 2, args))
    rows_through = {}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: rows_through.setdefault(name, len(args[0]))
        )
    with torch.inference_mode():
        parts["products"](0)
    assert rows_through == dict.fromkeys(linears, 2)


# ---- transformers' other ways --------------------------------------------------------------------
def other_peers(shipped_model_folder, words):
    return f"peers --model {shipped_model_folder} --prefill 0 {TINY_PEERS} {words}"


def test_static_and_continuous_run_in_the_same_rounds_if_they_are_asked_for(
    tmp_path, shipped_model_folder
):
    pytest.importorskip("transformers")
    words = other_peers(shipped_model_folder, "--batches 3 --also static continuous")
    rows = run(tmp_path, words)
    assert {row["workload"] for row in rows} == {"decode batch=3 context=9..11 block_size=16"}
    names = [peers.OURS, peers.THEIRS, peers.STATIC, peers.CONTINUOUS]
    steps = pick(rows, metric="time a step")
    # 2 rounds of 2 steps each: the same number of tokens for all.
    assert [(row["contender"], row["repeats"]) for row in steps] == [(name, 4) for name in names]
    ratios = pick(rows, unit="x")
    assert {row["contender"] for row in ratios} == {peers.OURS}
    assert [row["metric"] for row in ratios] == [f"speed against {name}" for name in names[1:]]
    (resolved,) = {row["backend"] for row in pick(rows, contender=peers.CONTINUOUS)}
    # 3 sequences of 9 + 2 + 1 tokens: a block each, twice, and one; 36 tokens in a step.
    assert resolved.startswith("torch, sdpa, page_size=16, num_blocks=7, max_batch_tokens=36, ")


def test_a_static_cache_holds_what_is_needed_and_the_other_one_grows(shipped_model_folder):
    pytest.importorskip("transformers")
    model = transformers_engines.as_transformers(load_model(shipped_model_folder))
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    dynamic, static = Theirs(model), Theirs(model, length=5)
    for theirs in (dynamic, static):
        theirs.start(prompts)
        theirs.step()
    assert dynamic.cache.layers[0].keys.shape == (2, 4, 4, 64)  # 3 of the prompt and 1 more
    assert static.cache.layers[0].keys.shape == (2, 4, 5, 64)
    assert dynamic.next_ids.tolist() == static.next_ids.tolist()


def test_continuous_batching_with_other_weights_is_refused(
    tmp_path, monkeypatch, shipped_model_folder
):
    pytest.importorskip("transformers")
    whole, made = transformers_engines.as_transformers, []

    def second_is_spoiled(model):
        made.append(whole(model))
        if len(made) == 2:  # the manager's; the first is the one that both are checked against
            made[1].transformer.ln_f.bias.data += torch.linspace(-9, 9, model.config.n_embd)
        return made[-1]

    monkeypatch.setattr(transformers_engines, "as_transformers", second_is_spoiled)
    with pytest.raises(SystemExit, match="continuous batching chose a token of which the score is"):
        run(tmp_path, other_peers(shipped_model_folder, "--batches 2 --also continuous"))


@pytest.mark.slow
def test_all_prompts_of_continuous_batching_start_in_one_step(shipped_model_folder, monkeypatch):
    pytest.importorskip("transformers")
    model = transformers_engines.as_transformers(load_model(shipped_model_folder))
    prompts = torch.randint(512, (4, 9), generator=torch.Generator().manual_seed(0))
    with Continuous(model, num_blocks=33, step_tokens=64, block_size=4) as manager:
        add = manager.manager.add_request

        def slow(*arguments, **options):
            time.sleep(0.2)  # long enough for the first to be served before the last has come
            return add(*arguments, **options)

        monkeypatch.setattr(manager.manager, "add_request", slow)
        outputs = manager.generate(prompts, 6)
        again = manager.generate(prompts, 6)  # the manager lives on
        assert len(manager.time_steps(prompts, 3)) == 3
        # Or the second round would find its prompts computed.
        assert manager.manager.continuous_batching_config.allow_block_sharing is False
    assert [len(output.generated_tokens) for output in outputs] == [6] * 4
    assert [output.generated_tokens for output in again] == [o.generated_tokens for o in outputs]
    # The first tokens of all come before the second token of any.
    firsts, seconds = zip(*(output.timestamps[:2] for output in outputs), strict=True)
    assert max(firsts) < min(seconds)
    assert not manager.manager.is_running()
