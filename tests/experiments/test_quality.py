"""What fewer bits cost: float32 loses what the training program says, and the others differ."""

import argparse

import pytest
import torch
from rows import pick, run
from tokenizers import Tokenizer

from checkpoints.load import load_model
from checkpoints.train_tiny import held_out_losses
from experiments import quality
from llm import SamplingParams

SPEED = "--speed-model assets/tiny-gpt2 --batches 2 --contexts 40 --rounds 2"
SENTENCE = "The fox and the wolf went into the forest, and there they met an old man. "
LAST = "The last\n\n" + (SENTENCE * 80).strip()  # longer than the context: two windows


@pytest.fixture
def texts(tmp_path):
    """30 tales, of which the last is held out, and a book that does not count."""
    folder = tmp_path / "text"
    folder.mkdir()
    tales = [f"Tale {i}\n\n" + SENTENCE * 3 for i in range(29)]
    (folder / "tales.txt").write_text("\n\n\n".join([*tales, LAST]))
    (folder / "tinyshakespeare.txt").write_text("\n\n\n".join([SENTENCE * 9] * 40))
    return folder


def medians(rows, metric):
    """The figure of each setting."""
    return {row["contender"]: row["median"] for row in pick(rows, metric=metric)}


def test_each_setting_differs_from_float32_and_float32s_loss_is_the_training_programs(
    texts, tmp_path, shipped_model_folder
):
    rows = run(tmp_path, f"quality --text {texts} --chunk 300 --new-tokens 8 {SPEED}")
    loss, above = medians(rows, "loss"), medians(rows, "loss above float32")
    distance, step = medians(rows, "distance of the logits"), medians(rows, "time a step")
    assert list(loss) == list(distance) == list(step) == list(quality.SETTINGS)
    assert above["float32"] == distance["float32"] == 0
    for name in set(quality.SETTINGS) - {"float32"}:
        assert 0 < abs(above[name]) < 0.02 and 0 < distance[name] < 0.5, name
        assert above[name] == pytest.approx(loss[name] - loss["float32"], abs=1e-9)
    assert distance["int8 pool"] < distance["bfloat16, int8 pool"]

    tokenizer = Tokenizer.from_file(str(shipped_model_folder / "tokenizer.json"))
    model = load_model(shipped_model_folder, torch.float32, "cpu")
    want = held_out_losses(model, [LAST], tokenizer)["nats_per_character"]
    assert loss["float32"] == pytest.approx(want, rel=1e-4)

    heads = 2 * 6 * 4  # of K and V, in 6 layers of 4 heads of 64
    sizes = medians(rows, "KV of a token")
    assert (sizes["float32"], sizes["bfloat16"]) == (heads * 256, heads * 128)
    assert sizes["int8 pool"] == sizes["bfloat16, int8 pool"] == heads * 66


@pytest.mark.parametrize("chunk", [64, 1000])
def test_the_logits_are_those_of_the_engines_own_prompt_log_probabilities(
    chunk, shipped_model_folder
):
    args = argparse.Namespace(backend="auto")
    for name in ("float32", "int8 pool"):
        llm = quality.build(name, shipped_model_folder, 300, args, max_num_batched_tokens=90)
        ids = llm.tokenizer.encode(SENTENCE * 9)[:160]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        scores = llm.generate([ids], params)[0].prompt_logprobs[1:]
        want = [score[i].logprob for score, i in zip(scores, ids[1:], strict=True)]
        logprobs = quality.logits_of(llm, ids, chunk).log_softmax(-1)
        found = [logprobs[i, token_id].item() for i, token_id in enumerate(ids[1:])]
        assert found == pytest.approx(want, abs=2e-2 if name == "int8 pool" else 1e-3)


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("PAGEDGPT_DATA", raising=False)
    for flags, sentence in (
        ("", "name their folder with --text"),
        (f"--text {tmp_path}/none", "no tales in"),
        ("--batches 1 2 --contexts 40", "give a context for each batch"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run(tmp_path, f"quality {flags}")
