"""The training: which tales are held out, how they are scored, and that a killed run resumes.

The texts are made here from a dozen words, and the models are so small that a step takes
milliseconds.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

from checkpoints import train_tiny
from checkpoints.load import load_model
from checkpoints.train_tiny import (
    END_OF_TEXT,
    attend_windows,
    batch_at,
    held_out_losses,
    learning_rate_factor,
    main,
    make_optimizers,
    parse_args,
    read_tales,
    save_model,
    train_tokenizer,
)
from model import GPT, GPTConfig, attend_one_sequence

WORDS = "the wolf and a fox met old grandmother in dark wood where no bird sang".split()


def tale(number, num_words=60):
    """A tale of its own length, about 250 characters and more, that begins with its number."""
    rng = random.Random(number)
    words = [rng.choice(WORDS) for _ in range(num_words + number)]
    return f"Tale {number}: " + " ".join(words) + "."


def write_texts(folder, tales, name="tales.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n\n\n".join(tales), encoding="utf-8")
    return folder


SMALL = "--n-layer 1 --n-head 1 --vocab-size 300 --max-seq-len 64 --short-length 16".split()


def run(tmp_path, name, *arguments, steps=3, tokens_per_step=64):
    """One call of the program on `tmp_path / texts`; returns the folder of its model.

    The texts are 60 tales where a test has not written others.
    """
    if not (tmp_path / "texts").exists():
        write_texts(tmp_path / "texts", [tale(n) for n in range(60)])
    out, work = tmp_path / name, tmp_path / (name + " work")
    counts = ["--steps", str(steps), "--tokens-per-step", str(tokens_per_step)]
    folders = ["--text", str(tmp_path / "texts"), "--out", str(out), "--work", str(work)]
    main([*folders, *SMALL, *counts, *arguments])
    return out


# ---- from files to tales -------------------------------------------------------------------------
def lines(*counts):
    """Paragraphs of so many characters each, ending in a full stop."""
    return ["x" * (count - 1) + "." for count in counts]


def read(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return read_tales([path, path])


A, B, C = lines(250, 260, 270)
SHORTEST = lines(200)[0]
LONG_LINE = "A line of sixty characters or more that ends in no stop " * 2
CUTS = {  # a file, and the tales in it
    "two blank lines end a tale": (f"{A}\n\n\n{B}\n\n{C}\n", [A, f"{B}\n\n{C}"]),
    "without them titles begin a tale": (
        f"The Wolf\n\n{A}\n\n{B}\n\nThe Fox\n\n{C}",
        [f"The Wolf\n\n{A}\n\n{B}", f"The Fox\n\n{C}"],
    ),
    "a sentence is no title": (f"{A}\n\nSaid the wolf.\n\n{B}", [f"{A}\n\nSaid the wolf.\n\n{B}"]),
    "a long line is no title": (f"{A}\n\n{LONG_LINE}\n\n{B}", [f"{A}\n\n{LONG_LINE}\n\n{B}"]),
    "two lines are no title": (f"{A}\n\na\nb\n\n{B}", [f"{A}\n\na\nb\n\n{B}"]),
    "a short piece is a heading of the next": (
        f"BOOK ONE\n\n\nA Preface\n\n\n{SHORTEST}\n\n\nBOOK TWO\n\n\n{B}",
        [f"BOOK ONE\n\nA Preface\n\n{SHORTEST}", f"BOOK TWO\n\n{B}"],
    ),
    "a heading that nothing follows is left out": (f"{A}\n\n\nTHE END", [A]),
    "quotes and dashes are straightened": (
        f"“Don’t,” ‘well‑known’ … {SHORTEST}",
        [f"\"Don't,\" 'well-known' ... {SHORTEST}"],
    ),
    "an empty file": ("", []),
    "a short file": ("short", []),
}


@pytest.mark.parametrize("rule", CUTS)
def test_a_file_is_cut_into_tales(rule, tmp_path):
    text, tales = CUTS[rule]
    assert read(tmp_path, text) == tales * 2  # nothing is carried from one file to the next


def test_real_texts_are_cut_into_tales_of_which_nothing_is_lost(data_folder):
    paths = sorted((data_folder / "text").glob("*.txt"))
    tales = read_tales([path for path in paths if path.name != "tinyshakespeare.txt"])
    text = "".join(tales)
    assert len(tales) > 300
    assert min(map(len, tales)) >= 200
    assert not set(text) & set("“”‘’…")
    files = "".join(p.read_text(encoding="utf-8") for p in paths if "shakespeare" not in p.name)
    assert sum(map(str.isalpha, text)) > 0.999 * sum(map(str.isalpha, files))


# ---- the vocabulary ------------------------------------------------------------------------------
def test_the_end_of_text_is_the_last_token_and_any_text_survives(tmp_path):
    tokenizer = train_tokenizer([tale(n) for n in range(30)], 300, tmp_path)
    assert tokenizer.get_vocab_size() == 300
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(300))
    assert vocab[END_OF_TEXT] == tokenizer.token_to_id(END_OF_TEXT) == 299
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(merges) == 1 + 300 - 256 - 1  # a line of version, then one merge per new token
    for text in ["the wolf", "  two  spaces\n\n\ttab", "Größe, 猫, 🦊, \x00"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the wolf").ids) < 8
    assert len(tokenizer.encode("🦊").ids) == 4  # bytes
    train_tokenizer([tale(n) for n in range(30)], 300, tmp_path / "again")  # by a resumed run
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# ---- batches -------------------------------------------------------------------------------------
STREAM = torch.arange(1000)  # a token is its own place in the text


def test_a_batch_is_rows_of_neighbours_and_each_target_is_the_next_token():
    ids, positions, targets = batch_at(STREAM, step=0, seed=0, rows=3, length=8, max_seq_len=32)
    assert ids.shape == positions.shape == targets.shape == (24,)
    assert torch.equal(targets, ids + 1)
    for row in range(3):
        window = slice(8 * row, 8 * row + 8)
        assert ids[window].diff().tolist() == [1] * 7
        assert positions[window].diff().tolist() == [1] * 7


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(step, seed):
        torch.manual_seed(random.randrange(1000))  # the generator that all share has no say
        return torch.stack(batch_at(STREAM, step, seed, rows=3, length=8, max_seq_len=32))

    assert torch.equal(batch(5, seed=1), batch(5, seed=1))
    assert not torch.equal(batch(5, seed=1), batch(6, seed=1))
    assert not torch.equal(batch(5, seed=1), batch(5, seed=2))


def test_short_windows_train_every_position_and_none_beyond():
    batches = [batch_at(STREAM, step, 0, rows=4, length=8, max_seq_len=32) for step in range(100)]
    seen = torch.cat([positions for _, positions, _ in batches]).unique()
    assert seen.tolist() == list(range(32))


def test_windows_reach_both_ends_of_the_text_and_stay_within():
    stream = torch.arange(12)
    batches = [batch_at(stream, step, 0, rows=4, length=8, max_seq_len=8) for step in range(50)]
    assert all(positions.tolist() == [*range(8)] * 4 for _, positions, _ in batches)
    assert min(ids.min() for ids, _, _ in batches) == 0
    assert max(targets.max() for _, _, targets in batches) == 11


# ---- the training socket -------------------------------------------------------------------------


def test_a_model_under_the_training_socket_has_the_logits_of_each_window_alone(tiny_gpt):
    model = tiny_gpt(dtype=torch.float64)
    ids = torch.randint(97, (24,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(12), torch.arange(30, 42)])
    together = model(ids, positions, attend_windows(2))
    alone = [model(ids[i : i + 12], positions[i : i + 12], attend_one_sequence) for i in (0, 12)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


# ---- held-out losses -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([tale(n) for n in range(30)], 300, tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Texts of 1 to 29 tokens: shorter than a context of 8, as long, longer by every remainder."""
    ids = tokenizer.encode(tale(0)).ids
    texts = [tokenizer.decode(ids[:count]) for count in range(1, 30)]
    assert [len(tokenizer.encode(text).ids) for text in texts] == list(range(1, 30))
    return texts


def small_model(max_seq_len):
    return GPT(GPTConfig(vocab_size=300, max_seq_len=max_seq_len, n_layer=1, n_head=2, n_embd=16))


@pytest.mark.parametrize("max_seq_len", [1, 2, 7, 8, 64])
def test_a_model_that_knows_nothing_loses_log_v_on_each_token_once(max_seq_len, tokenizer, texts):
    uniform = small_model(max_seq_len).init_weights(std=0.0)
    losses = held_out_losses(uniform, texts, tokenizer)
    num_characters = sum(map(len, texts))
    for key in ("nats_per_token", "nats_per_token_at_0_to_255"):
        assert losses[key] == pytest.approx(math.log(300), rel=1e-5)
    assert losses["characters"] == num_characters
    assert losses["tales"] == 29
    num_tokens = losses["nats_per_character"] * num_characters / math.log(300)
    assert num_tokens == pytest.approx(435, rel=1e-5)  # 1 + 2 + ... + 29


def dumb_total(model, ids):
    """The summed loss of ids[1:], one forward a token, in the window that the docstring promises.

    The first window serves all the tokens that fit; every further window serves half a context.
    """
    size = model.config.max_seq_len
    stride = size // 2
    total = 0.0
    for target in range(1, len(ids)):
        start = 0
        while target > start + size:
            start += stride
        past = ids[start:target]
        hidden = model(past, torch.arange(len(past)), attend_one_sequence)
        total += F.cross_entropy(model.logits(hidden[-1:]), ids[target:][:1]).item()
    return total


@pytest.mark.parametrize("max_seq_len", [7, 8])
@torch.inference_mode()
def test_a_tale_longer_than_the_context_is_scored_in_windows_that_overlap_by_half(
    max_seq_len, tokenizer, texts
):
    model = small_model(max_seq_len).init_weights(std=0.2)
    end = tokenizer.token_to_id(END_OF_TEXT)
    for text in texts[::4]:
        ids = torch.tensor([end, *tokenizer.encode(text).ids])
        losses = held_out_losses(model, [text], tokenizer)
        total = losses["nats_per_character"] * len(text)
        assert total == pytest.approx(dumb_total(model, ids), rel=1e-4)
        assert losses["nats_per_token"] * (len(ids) - 1) == pytest.approx(total)


def test_the_score_is_taken_without_dropout(tokenizer, texts):
    config = GPTConfig(vocab_size=300, max_seq_len=64, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(config).init_weights(std=0.2).train()
    first, second = (held_out_losses(model, texts, tokenizer) for _ in range(2))
    assert first["nats_per_token"] == second["nats_per_token"]


# ---- schedule and optimizers ---------------------------------------------------------------------
def test_the_learning_rate_warms_up_over_2_percent_then_falls_to_5():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[51] == pytest.approx(0.525, abs=0.01)  # half way down the cosine
    assert factors[99] == pytest.approx(0.05, abs=0.001)
    for steps in (1, 2, 3):
        assert all(0 < learning_rate_factor(step, steps) <= 1 for step in range(steps))


def test_every_weight_has_exactly_one_optimizer():
    model = small_model(64)
    optimizers = make_optimizers(model, lr=0.015, weight_decay=0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    muon = {p for group in optimizers[0].param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if p in muon} == {
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    }


# ---- the model's files ---------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_read_back_bit_by_bit_and_transformers_finds_every_tensor(tied, tmp_path):
    folder = tmp_path / "new" / "folder"
    shape = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
    ours = GPT(GPTConfig(**shape, eos_token_id=60, tie_word_embeddings=tied)).init_weights(std=0.2)
    save_model(ours, folder, torch.float32)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or misshapen
    assert theirs.config.eos_token_id == 60
    heads = [name for name in load_file(folder / "model.safetensors") if "lm_head" in name]
    assert heads == ([] if tied else ["lm_head.weight"])  # it stands outside the prefix
    loaded, ids = load_model(folder), torch.arange(32)
    assert loaded.config == ours.config
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in ours.state_dict().items())
    with torch.inference_mode():
        logits = loaded.logits(loaded(ids, ids, attend_one_sequence))
        torch.testing.assert_close(logits, theirs.eval()(ids[None]).logits[0], rtol=0, atol=1e-4)
    save_model(ours, folder, torch.float16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert torch.equal(load_model(folder).wpe.weight, ours.wpe.weight.half().float())


def test_a_save_that_is_stopped_leaves_the_old_model_or_none(tmp_path, tiny_gpt, monkeypatch):
    """Never the config or the tokenizer of one model and the weights of another."""
    save_model(tiny_gpt(), tmp_path, torch.float32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    def stopped_after_one(path, target):
        monkeypatch.setattr(Path, "replace", stopped)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "save_file", stopped)
        save_model(tiny_gpt(n_layer=3), tmp_path, torch.float32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(Path, "replace", stopped_after_one)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_gpt(n_layer=3), tmp_path, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["n_layer"] == 3
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)


# ---- the program ---------------------------------------------------------------------------------
def test_three_steps_make_a_folder_that_everybody_can_read(tmp_path):
    out = run(tmp_path, "model", steps=3)  # two steps of short windows and one of long ones
    names = (
        "README.md config.json merges.txt model.safetensors tokenizer.json training.json vocab.json"
    )
    assert sorted(path.name for path in out.iterdir()) == names.split()

    ours = load_model(out)
    shape = {"vocab_size": 300, "max_seq_len": 64, "n_layer": 1, "n_head": 1, "n_embd": 64}
    assert ours.config == GPTConfig(**shape, eos_token_id=299)
    theirs, info = GPT2LMHeadModel.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.tensor(Tokenizer.from_file(str(out / "tokenizer.json")).encode(tale(7)).ids[:64])
    assert AutoTokenizer.from_pretrained(out)(tale(7))["input_ids"][:64] == ids.tolist()
    with torch.inference_mode():
        logits = ours.logits(ours(ids, torch.arange(64), attend_one_sequence))
        torch.testing.assert_close(logits, theirs.eval()(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_every_thirtieth_tale_is_held_out_from_training_and_vocabulary(tmp_path, monkeypatch):
    tales = [tale(n) for n in range(60)]
    tales[29] += " zyzzyva" * 1000  # would be a token at once, if the vocabulary saw it
    tales[30] += " quagga" * 1000
    write_texts(tmp_path / "texts", tales)
    streams = []

    def no_training(model, stream, args, checkpoint):
        streams.append(stream)
        return 0.0

    monkeypatch.setattr(train_tiny, "train", no_training)
    out = run(tmp_path, "model")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    text = tokenizer.decode(streams[0].tolist(), skip_special_tokens=False)
    seen = [t for n, t in enumerate(tales) if n not in (29, 59)]
    assert text == END_OF_TEXT + "".join(t + END_OF_TEXT for t in seen)
    assert [token for token in tokenizer.get_vocab() if "zyz" in token] == []
    assert "Ġquagga" in tokenizer.get_vocab()
    report = json.loads((out / "training.json").read_text())
    assert report["tales"] == 2
    assert report["characters"] == len(tales[29]) + len(tales[59])
    assert report["files"] == ["tales.txt"] and str(tmp_path) not in str(report)
    assert (report["steps"], report["seed"], report["n_layer"]) == (3, 0, 1)


def test_files_named_in_skip_are_left_out(tmp_path):
    write_texts(tmp_path / "texts", [tale(n) for n in range(60)])
    write_texts(tmp_path / "texts", [tale(99)] * 60, name="other.txt")
    write_texts(tmp_path / "texts", [tale(99)] * 60, name="tinyshakespeare.txt")
    skip = ["--skip", "other.txt", "tinyshakespeare.txt"]
    one = run(tmp_path, "model", *skip)
    assert json.loads((one / "training.json").read_text())["files"] == ["tales.txt"]
    assert parse_args(["--text", "x"]).skip == ["tinyshakespeare.txt"]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def state(folder):
    return torch.load(folder.parent / (folder.name + " work") / "checkpoint.pt", weights_only=True)


def test_stopping_and_resuming_ends_with_the_same_bits_as_never_stopping(tmp_path, monkeypatch):
    """With dropout, so the generator's state counts, and in both phases of the schedule."""
    dropout = ["--dropout", "0.3"]
    whole = run(tmp_path, "whole", *dropout, steps=6)
    for stop in (2, 5):  # in the short windows, in the long ones
        parts = run(tmp_path, "parts", *dropout, "--stop-after", str(stop), steps=6)
        assert state(parts)["step"] == stop
        assert weights(parts) != weights(whole)
        run(tmp_path, "parts", *dropout, "--resume", steps=6)
        assert weights(parts) == weights(whole)
        want, got = state(whole)["model"], state(parts)["model"]  # float32, the file is float16
        assert all(torch.equal(want[name], got[name]) for name in want)
        assert state(whole)["loss"] == state(parts)["loss"]

    def killed_at_step_4(stream, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return batch_at(stream, step, *rest)

    older = run(tmp_path, "killed", "--vocab-size", "290")
    files = {path.name: path.read_bytes() for path in older.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "batch_at", killed_at_step_4)
        with pytest.raises(KeyboardInterrupt):  # with a checkpoint after each step
            run(tmp_path, "killed", *dropout, "--save-every-s", "0", steps=6)
    assert {path.name: path.read_bytes() for path in older.iterdir()} == files
    assert weights(run(tmp_path, "killed", *dropout, "--resume", steps=6)) == weights(whole)


def test_resume_goes_on_from_a_checkpoint_if_there_is_one_and_a_run_without_it_starts_anew(
    tmp_path,
):
    first = weights(run(tmp_path, "model"))
    assert weights(run(tmp_path, "model", "--resume")) == first  # a finished run
    assert weights(run(tmp_path, "other", "--resume")) == first  # no checkpoint yet
    assert weights(run(tmp_path, "model", "--seed", "1")) != first
    assert weights(run(tmp_path, "model")) == first


def test_a_text_that_repeats_itself_is_learned(tmp_path):
    write_texts(tmp_path / "texts", ["the wolf and a fox met in the wood. " * 8] * 60)
    out = run(tmp_path, "model", "--dropout", "0", steps=80, tokens_per_step=256)
    report = json.loads((out / "training.json").read_text())
    assert report["nats_per_token"] < 2.0  # from log(300) = 5.7


REFUSED = {  # the number of tales, and the words
    0: "^no .txt file in .*texts: name a folder that has some$",
    29: "29 tales in .*: 30 are needed, so that one is held out",
    60: r"--tokens-per-step, .* are \(32, 64, .* for a window of 64",
}


@pytest.mark.parametrize("num_tales", REFUSED)
def test_a_run_that_can_not_end_well_is_refused_before_it_begins(num_tales, tmp_path):
    (tmp_path / "texts").mkdir()
    if num_tales:
        write_texts(tmp_path / "texts", [tale(n) for n in range(num_tales)])
    with pytest.raises(SystemExit, match=REFUSED[num_tales]):
        run(tmp_path, "model", tokens_per_step=32)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_without_the_long_windows_a_step_may_be_shorter_than_the_context(tmp_path):
    one_file = ["--text", str(tmp_path / "texts" / "tales.txt")]  # in place of the folder
    run(tmp_path, "model", "--no-long", *one_file, tokens_per_step=32)  # windows of 16 tokens
