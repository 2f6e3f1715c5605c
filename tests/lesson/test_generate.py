"""The command line as a user types it: what it reads, what it prints where, how it refuses.

`main` runs in this process, mostly on the shipped model. No test compares the words of that model.
Texts go to standard output, progress and figures to standard error.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from vocabularies import save_vocabulary

import generate
from beam_search import BeamSearchParams
from checkpoints.train_tiny import save_model
from generate import OPENINGS, main, parse_args
from kernels.backends import BACKENDS
from llm import LLM, EngineConfig, SamplingParams
from model import GPT, GPTConfig

SMALL_POOL = ["--num-blocks", "64"]  # quick to allocate
SUMMARY = re.compile(
    r"(\d+) tokens in ([\d.]+) s: ([\d.]+) tokens/s \(([^,]+), ([^,]+), ([^,]+)\)\n"
    r"peak (\d+) of (\d+) blocks, utilisation ([\d.]+)%, (\d+) preemptions, "
    r"(\d+) tokens computed again\n"
    r"(?:prefix cache: \d+ tokens in \d+ blocks were not computed, \d+ blocks evicted\n)?"
)


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory):
    """A small random model without tokenizer files."""
    folder = tmp_path_factory.mktemp("ids_only")
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
    save_model(GPT(config).init_weights(std=0.2), folder, torch.float16)
    return folder


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    """A small random model with a tokenizer of 256 bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    config = GPTConfig(
        vocab_size=257, max_seq_len=64, n_layer=2, n_head=2, n_embd=32, eos_token_id=256
    )
    save_model(GPT(config).init_weights(std=0.2), folder, torch.float16)
    save_vocabulary(folder, merges=[])
    return folder


def run_main(*args):
    """What main printed to (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main([str(arg) for arg in args])
    return out.getvalue(), err.getvalue()


def refusal(*args):
    """The sentence with which `main` ends after a mistake."""
    with pytest.raises(SystemExit) as error:
        run_main(*args)
    message = error.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(message, str) and message.startswith("generate.py: ")
    assert "\n" not in message and "Traceback" not in message and len(message) < 400
    return message


def summary_of(err):
    """The figures at the end of stderr."""
    assert err.endswith(list(SUMMARY.finditer(err))[-1][0])
    names = "tokens seconds speed weights backend dtype peak blocks utilisation preemptions again"
    return SimpleNamespace(**dict(zip(names.split(), SUMMARY.findall(err)[-1], strict=True)))


# ---- without arguments: the demonstration --------------------------------------------------------
@pytest.fixture(scope="module")
def demo():
    """One run without arguments, not on a terminal: (stdout, stderr)."""
    return run_main()


def test_the_demo_continues_a_dozen_openings(demo):
    out, _ = demo
    texts = re.split(r"^\[([A-Z])\] ", out, flags=re.MULTILINE)
    assert texts[0] == "" and texts[1::2] == list("ABCDEFGHIJKL")
    assert len(OPENINGS) == 12
    for (opening, _), text in zip(OPENINGS, texts[2::2], strict=True):
        one_line = " ".join(text.split())
        assert one_line.startswith(opening)
        assert len(one_line) > len(opening) + 10


def test_the_demo_ends_with_speed_peak_blocks_utilisation_and_preemptions(demo):
    summary = summary_of(demo[1])
    assert int(summary.tokens) <= sum(max_tokens for _, max_tokens in OPENINGS)
    assert int(summary.tokens) >= sum(max_tokens // 2 for _, max_tokens in OPENINGS)
    assert float(summary.speed) > 0
    assert 40 <= int(summary.peak) <= int(summary.blocks) == 60
    assert 50 < float(summary.utilisation) <= 100
    assert int(summary.preemptions) > 0 and int(summary.again) > 0  # the pool is too small for all
    assert (summary.weights, summary.dtype) == ("trained weights", "float32")
    assert summary.backend in BACKENDS


def test_the_demo_shows_the_pool_as_a_strip_in_plain_lines_when_it_is_no_terminal(demo):
    _, err = demo
    assert "\033" not in err and "\r" not in err
    strips = re.findall(r"^\|([A-La-l·]+)\|$", err, flags=re.MULTILINE)
    progress = re.findall(r"^step +\d+ +\d+ tokens .*running .*waiting .*pool +\d+%$", err, re.M)
    assert len(strips) == len(progress) >= 2
    assert all(len(strip) == 60 for strip in strips)
    assert strips[-1] == "·" * 60  # in the end every block is free
    assert len(set(strips)) > 1


def test_the_demo_takes_the_flags_that_are_given(monkeypatch):
    """With another block size the pool has room for the same number of tokens, 480."""
    monkeypatch.setattr(generate, "OPENINGS", [(opening, 4) for opening, _ in OPENINGS])
    assert summary_of(run_main("--block-size", 1)[1]).blocks == "480"
    assert summary_of(run_main("--num-blocks", 40)[1]).blocks == "40"
    first, again = (run_main("--temperature", 0, "--seed", seed)[0] for seed in (1, 2))
    assert first == again  # greedy: the seed changes nothing


# ---- one prompt: streamed ------------------------------------------------------------------------
def test_a_streamed_text_comes_in_pieces_and_is_what_generate_gives(bytes_model, monkeypatch):
    """Random bytes: a character of several bytes is printed when it is complete."""
    pieces = []
    monkeypatch.setattr(
        "builtins.print", lambda *a, end="\n", **kw: pieces.append("".join(map(str, a)) + end)
    )
    main(["ab", "--model", str(bytes_model), "--max-tokens", "20", "--seed", "1", *SMALL_POOL])
    monkeypatch.undo()
    params = SamplingParams(max_tokens=20, seed=1)
    (output,) = LLM(bytes_model, num_blocks=64).generate("ab", params)
    assert pieces[0] == "ab" and len(pieces) > 10
    assert "".join(pieces[:-1]) == "ab" + output.outputs[0].text + "\n"  # the last is the summary


def test_without_a_tokenizer_token_ids_are_streamed_and_text_is_refused(ids_only, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 4}\n')
    out, _ = run_main("--model", ids_only, "--file", path)
    params = SamplingParams(temperature=0, max_tokens=4)
    (output,) = LLM(ids_only, num_blocks=8).generate([5, 6, 7], params)
    assert [int(word) for word in out.split()] == output.outputs[0].token_ids
    message = "a text prompt needs a tokenizer, and this model has none: give token ids"
    assert message in refusal("--model", ids_only)  # the demonstration's prompts are text


# ---- beam search ---------------------------------------------------------------------------------
def test_beams_print_the_best_texts_with_their_scores(bytes_model, tmp_path):
    flags = ["--model", bytes_model, "--beam-width", 4, "--max-tokens", 8, *SMALL_POOL]
    llm = LLM(bytes_model, num_blocks=64)
    params = BeamSearchParams(4, 8, 0.5, "never", num_return_sequences=2)
    outputs = llm.beam_search(["ab", "x"], params)
    (path := tmp_path / "prompts.txt").write_text("ab\nx\n")
    chosen = ["--length-penalty", 0.5, "--early-stopping", "never", "--num-return-sequences", 2]
    rows = completions(run_main("--file", path, "--jsonl", *flags, *chosen)[0])
    found = [[(c["text"], c["cumulative_logprob"]) for c in row["outputs"]] for row in rows]
    assert found == [[(c.text, c.cumulative_logprob) for c in o.outputs] for o in outputs]

    out, _ = run_main("ab", *flags, "--out", tmp_path / "texts.txt")
    assert out == ""
    (output,) = llm.beam_search("ab", BeamSearchParams(4, 8))
    scores = [f"({completion.cumulative_logprob:.3f}) ab" for completion in output.outputs]
    texts = (tmp_path / "texts.txt").read_text(encoding="utf-8")
    assert [text[: len(scores[0])] for text in texts.split("\n\n")] == scores


def test_a_line_of_jsonl_brings_its_own_parameters_of_a_search(bytes_model, monkeypatch):
    lines = b'{"prompt": "ab", "max_tokens": 3, "beam_width": 2, "early_stopping": true}\nx\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    flags = ["--model", bytes_model, "--jsonl", "--beam-width", 3, "--max-tokens", 5, *SMALL_POOL]
    rows = completions(run_main("--file", "-", *flags)[0])
    lengths = [[len(c["token_ids"]) for c in row["outputs"]] for row in rows]
    assert lengths == [[3, 3], [5, 5, 5]]


def test_flags_of_sampling_and_of_beams_do_not_go_together(tmp_path):
    beams = ["x", "--beam-width", 4]
    for flag, *value in (
        ["--temperature", 0.5],
        ["--n", 2],
        ["--seed", 1],
        ["--stop", "END"],
        ["--ignore-eos"],
        ["--logprobs", 0],
    ):
        assert refusal(*beams, flag, *value) == f"generate.py: {flag} does not go with --beam-width"
    for flag, value in (
        ("--length-penalty", 0),
        ("--early-stopping", "never"),
        ("--num-return-sequences", 1),
    ):
        assert refusal("x", flag, value) == f"generate.py: {flag} needs --beam-width"
    assert "beam_width is 0: it must be an integer from 1 to 1024" in refusal(
        "x", "--beam-width", 0
    )
    (path := tmp_path / "one.jsonl").write_text('{"prompt": "x", "n": 2}')
    message = refusal("--file", path, "--beam-width", 2)
    assert message.endswith("line 1: 'n' is no parameter of a beam search")


def test_the_demonstration_may_be_searched(monkeypatch):
    """Each opening has its letter and its score; the pool is larger by the width."""
    monkeypatch.setattr(generate, "OPENINGS", [(opening, 4) for opening, _ in OPENINGS[:3]])
    out, err = run_main("--beam-width", 2)
    assert re.findall(r"^\[([A-Z])\] \(-\d+\.\d{3}\) ", out, flags=re.MULTILINE) == list("AABBCC")
    assert summary_of(err).blocks == "120"


# ---- many prompts --------------------------------------------------------------------------------
def completions(out):
    """The rows of --jsonl."""
    return [json.loads(line) for line in out.splitlines()]


def test_arguments_then_lines_of_a_file_are_answered_in_order(tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfThe wolf\n\n  \nThe princess\r\nA [fox] once said:\n")
    out, err = run_main("first", "--file", path, "--max-tokens", 3, "--jsonl", *SMALL_POOL)
    rows = completions(out)
    prompts = ["first", "The wolf", "The princess", "A [fox] once said:"]
    assert [row["prompt"] for row in rows] == prompts
    assert all(len(row["outputs"][0]["token_ids"]) <= 3 for row in rows)
    assert re.search(r"^step .* tokens/s .* running .* waiting .* pool", err, re.MULTILINE)
    assert "|" not in err  # the strip belongs to the demonstration


def test_standard_input_is_read_by_the_rules_of_a_file(monkeypatch, bytes_model, tmp_path):
    """In UTF-8, whatever the terminal has, without an invisible first mark, with any line ends."""
    raw = b'\xef\xbb\xbfK\xc3\xb6nigin\r\n{"prompt": "ab"}\rThe fox\n'
    (tmp_path / "prompts").write_bytes(raw)
    flags = ["--model", bytes_model, "--max-tokens", 1, "--jsonl", *SMALL_POOL]
    for path in ("-", tmp_path / "prompts"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "ascii"))
        rows = completions(run_main("--file", path, *flags)[0])
        assert [row["prompt"] for row in rows] == ["K\u00f6nigin", "ab", "The fox"]
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after 0<&-
    message = refusal("--file", "-", *flags)
    assert message == "generate.py: standard input cannot be read: it is closed"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    assert "standard input, line 1: there is no 'prompt'" in refusal("--file", "-", *flags)


def test_a_line_of_jsonl_brings_its_own_parameters_and_may_be_token_ids(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "The wolf", "max_tokens": 3, "ignore_eos": True},
        {"prompt": [5, 6, 7], "n": 2, "seed": 1, "temperature": 1.0, "max_tokens": 2},
        {"prompt": "The fox", "logit_bias": {"9": 100}, "logprobs": 1, "prompt_logprobs": 1},
        {"prompt": "The cat", "stop": ["e", "a"], "stop_token_ids": [2], "seed": None},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "plain text\n")
    flags = ["--max-tokens", 5, "--temperature", 0, "--ignore-eos", "--jsonl", *SMALL_POOL]
    rows = completions(run_main("--file", path, *flags)[0])
    assert len(rows) == 5
    assert len(rows[0]["outputs"][0]["token_ids"]) == 3
    assert rows[1]["prompt"] is None and rows[1]["prompt_token_ids"] == [5, 6, 7]
    assert [len(output["token_ids"]) for output in rows[1]["outputs"]] == [2, 2]
    assert rows[2]["outputs"][0]["token_ids"] == [9] * 5  # the flag's max_tokens, the line's bias
    assert len(rows[2]["outputs"][0]["logprobs"]) == 5
    assert rows[2]["prompt_logprobs"][0] is None and rows[2]["prompt_logprobs"][1]
    assert not re.search("[ea]", rows[3]["outputs"][0]["text"])
    assert rows[4]["prompt"] == "plain text" and len(rows[4]["outputs"][0]["token_ids"]) == 5


def test_texts_are_separated_by_blank_lines_and_written_to_out(tmp_path):
    path = tmp_path / "texts.txt"
    flags = ["--n", 2, "--max-tokens", 4, "--out", path, *SMALL_POOL]
    out, _ = run_main("The wolf", "The fox", *flags)
    texts = path.read_text(encoding="utf-8")
    assert re.findall("^The (?:wolf|fox)", texts, re.M) == ["The wolf"] * 2 + ["The fox"] * 2
    assert "\n\nThe fox" in texts and texts.endswith("\n") and out == ""


def test_a_text_of_no_tokens_but_the_end_is_shown_as_no_text(bytes_model, tmp_path):
    """The id of the end of text is not printed."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "logit_bias": {"256": 100}}\n' * 2)
    out, _ = run_main("--model", bytes_model, "--file", tmp_path / "p.jsonl", "--temperature", 0)
    assert out == "ab\n\nab\n"


def test_out_and_jsonl_write_one_json_object_a_prompt(tmp_path):
    path = tmp_path / "texts.jsonl"
    prompts = ["The wolf", "Die K\u00f6nigin \U0001f409"]
    out, err = run_main(*prompts, "--max-tokens", 4, "--jsonl", "--out", path, *SMALL_POOL)
    assert out == "" and summary_of(err)
    text = path.read_text(encoding="utf-8")
    assert "K\u00f6nigin \U0001f409" in text  # readable, not \u00f6
    rows = completions(text)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["weights"] == "trained weights" and row["model"]
        (output,) = row["outputs"]
        assert output["index"] == 0 and output["finish_reason"] in ("length", "stop")
        assert isinstance(output["text"], str) and output["token_ids"]


# ---- where the texts go --------------------------------------------------------------------------
def interrupt(monkeypatch, after_steps, files=()):
    """Ctrl-C after so many steps of the next run; a list of the sizes that the files then have."""
    sizes = []

    def build(*args, **kwargs):
        llm = LLM(*args, **kwargs)
        forward, calls = llm.engine.forward, iter(range(1, 1000))

        def forward_or_stop(batch):
            if next(calls) > after_steps:
                sizes.extend(file.stat().st_size for pattern in files for file in pattern())
                raise KeyboardInterrupt
            return forward(batch)

        llm.engine.forward = forward_or_stop
        return llm

    monkeypatch.setattr(generate, "LLM", build)
    return sizes


@pytest.fixture
def three_prompts(tmp_path, bytes_model):
    """Flags of a run whose second text is the longest: texts of 2, 9 and 3 tokens."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(PROMPT_LINE % pair for pair in (("ab", 2), ("cd", 9), ("ef", 3))))
    return ["--model", bytes_model, "--file", path, "--temperature", 0, *SMALL_POOL]


PROMPT_LINE = '{"prompt": "%s", "max_tokens": %d, "logit_bias": {"87": 100}}\n'  # writes x
FINISHED = "abxx\n\nefxxx\n"


def test_after_ctrl_c_the_finished_texts_are_written_and_a_sentence_says_so(
    monkeypatch, three_prompts, tmp_path, capsys
):
    path = tmp_path / "texts.txt"
    path.write_text("old\n")
    parts = [lambda: tmp_path.glob("*.part")]
    sizes = interrupt(monkeypatch, 5, parts)
    for flags, written in ((["--out", path], path.read_text), ([], lambda: capsys.readouterr()[0])):
        with pytest.raises(SystemExit) as end:
            main([str(flag) for flag in [*three_prompts, *flags]])
        assert end.value.code == 130
        if flags:
            message = capsys.readouterr().err.splitlines()[-1]
            assert message == "generate.py: interrupted: 2 of 3 texts are finished and written"
        assert written() == FINISHED
    assert sizes == [len("abxx\n")]  # while the second text runs, only the first may be written
    assert list(tmp_path.glob("*.part")) == []


def test_ctrl_c_before_any_text_has_ended_leaves_the_old_file(
    monkeypatch, three_prompts, tmp_path, capsys
):
    path = tmp_path / "texts.txt"
    path.write_text("old\n")
    interrupt(monkeypatch, 1)
    with pytest.raises(SystemExit, match="130"):
        main([str(flag) for flag in [*three_prompts, "--out", path]])
    assert path.read_text() == "old\n" and list(tmp_path.glob("*.part")) == []
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == "generate.py: interrupted: 0 of 3 texts are finished and written"
    interrupt(monkeypatch, 1)
    with pytest.raises(SystemExit, match="130"):  # a single text: what it has is on the screen
        main(["ab", *SMALL_POOL])
    assert capsys.readouterr().err == "\ngenerate.py: interrupted\n"


class FullDisk(io.TextIOWrapper):
    """A file on a disk that has room for 9 more bytes."""

    def write(self, text):
        self.num_written = getattr(self, "num_written", 0) + len(text)
        return super().write(text)

    def flush(self):
        if self.num_written > 9:
            self.buffer.raw.write(b"\ncdx")  # a half of the text
            raise OSError(28, "No space left on device")
        super().flush()


def test_on_a_full_disk_the_old_file_stays_and_the_whole_texts_are_kept_beside_it(
    monkeypatch, three_prompts, tmp_path
):
    path = tmp_path / "texts.txt"
    path.write_text("old\n")
    whole = open

    def open_full(file, *args, **kwargs):
        opened = whole(file, *args, **kwargs)
        is_part = str(file).endswith(".part")
        return FullDisk(opened.detach(), encoding="utf-8") if is_part else opened

    monkeypatch.setattr("builtins.open", open_full)
    message = refusal(*three_prompts, "--out", path)
    monkeypatch.undo()
    (part,) = tmp_path.glob("*.part")
    assert message == (
        f"generate.py: {part} cannot be written: No space left on device; 1 texts are in it"
    )
    assert path.read_text() == "old\n" and part.read_text() == "abxx\n"


def test_a_file_that_is_replaced_keeps_its_permissions_and_a_link_stays_a_link(
    three_prompts, tmp_path
):
    target, link = tmp_path / "texts.txt", tmp_path / "link.txt"
    target.write_text("old\n")
    target.chmod(0o640)
    link.symlink_to(target)
    run_main(*three_prompts, "--out", link)
    assert link.is_symlink() and target.read_text() == "abxx\n\ncdxxxxxxxxx\n\nefxxx\n"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_to_and_not_replaced(three_prompts):
    run_main(*three_prompts, "--out", "/dev/null")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("encoding, shown", [("ascii", "K?nigin ?"), ("cp1252", "K\u00f6nigin ?")])
def test_a_character_that_standard_output_lacks_is_written_as_a_question_mark_and_in_json_escaped(
    monkeypatch, bytes_model, encoding, shown
):
    flags = ["--model", str(bytes_model), "--max-tokens", "1", *SMALL_POOL]
    prompt = "K\u00f6nigin \U0001f409"
    for more, is_right in (
        ([], lambda text: text.startswith(shown)),
        (["--n", "2"], lambda text: text.count(shown) == 2),
        (["--jsonl"], lambda text: json.loads(text)["prompt"] == prompt),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        main([prompt, *flags, *more])
        assert is_right(stream.buffer.getvalue().decode(encoding))


def test_a_lone_surrogate_in_a_prompt_does_not_lose_the_texts(bytes_model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n')
    writer = generate.TextWriter(tmp_path / "texts")
    with writer:
        writer.add(0, "a\ud800b\n")
    assert (tmp_path / "texts").read_text() == "a?b\n"
    assert not generate.can_hold(writer.stream, "a\ud800b")  # in JSON it is escaped


def as_process(command):
    """Exit code and stderr of the program in a shell, where streams can be closed or full."""
    program = f"{sys.executable} generate.py The --max-tokens 2 --num-blocks 8"
    done = subprocess.run(
        ["bash", "-c", command.format(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_closed_or_full_standard_output_is_one_sentence():
    code, message = as_process("{} --model no/such >&-")  # before the model is looked for
    assert (code, message) == (
        1,
        "generate.py: standard output is closed: write to a file with --out\n",
    )
    code, message = as_process("{} --jsonl > /dev/full")
    assert code == 1 and message.count("generate.py") == 1 and "Traceback" not in message
    assert message.endswith("generate.py: the output cannot be written: No space left on device\n")


# ---- refusals ------------------------------------------------------------------------------------
BAD_LINES = {
    "no JSON": ('{"prompt": "a"', "Expecting ',' delimiter"),
    "a number as prompt": ('{"prompt": 5}', "the prompt is 5: give text or a list of token ids"),
    "no prompt": ('{"max_tokens": 3}', "there is no 'prompt'"),
    "an unknown parameter": ('{"prompt": "a", "max_token": 3}', "'max_token' is no sampling param"),
    "a bad value": ('{"prompt": "a", "top_p": 0}', "top_p is 0: it must be"),
    "a value of another type": ('{"prompt": "a", "max_tokens": "3"}', "max_tokens is '3'"),
    "a bias that is for no id": ('{"prompt": "a", "logit_bias": {"x": 1}}', "'x'"),
    "too deep": ('{"prompt": ' + "[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"The wolf\n\n{line}\nThe fox\n")
    assert re.search(rf"prompts.jsonl, line 3: .*{message}", refusal("--file", path))
    if name == "no JSON":  # a bad flag comes first, and no line is named
        message = refusal("--file", path, "--top-p", "0")
        assert "top_p is 0.0: it must be" in message and "line" not in message


REFUSED = {
    "a file that is not there": (["--file", "no/such/file"], "no/such/file cannot be read"),
    "NaN as a temperature": (["x", "--temperature", "nan"], "temperature is nan: it must be"),
    "a prompt that is too long": (["word " * 2000], "max_seq_len is 1024: shorten it"),
    "two sizes of the pool": (["x", "--num-blocks", "9", "--kv-cache-mb", "1"], "give one"),
    "a pool beyond the memory": (["x", "--num-blocks", "1000000000000"], "lower num_blocks"),
    "a pool beyond all numbers": (
        ["x", "--kv-cache-mb", "1e308"],
        "kv_cache_mb is 1e+308: it must",
    ),
    "blocks beyond all numbers": (["x", "--num-blocks", "9" * 400], "below 2**63"),
    "threads beyond all machines": (["x", "--threads", "100000"], "threads is 100000: it must be"),
    "a folder to read from": (["--file", "."], "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_sentence_and_no_traceback(name):
    args, message = REFUSED[name]
    pool = [] if {"--num-blocks", "--kv-cache-mb"} & set(args) else SMALL_POOL
    assert message in refusal(*args, *pool)


def test_as_a_process_a_mistake_exits_with_1_and_one_line_on_stderr():
    command = [sys.executable, "generate.py", "x", "--model", "no/such/model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("generate.py: 'no/such/model' is no folder here")
    assert done.stderr.count("\n") == 1


def test_a_file_without_prompts_or_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert "empty.txt holds no prompt" in refusal("--file", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("Königin".encode("latin-1"))
    assert "latin.txt cannot be read" in refusal("--file", tmp_path / "latin.txt")


def test_a_prompt_that_the_engine_refuses_is_named_by_file_and_line(bytes_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('The wolf\n\n{"prompt": [5, 257]}\n')
    message = refusal("--file", path, "--model", bytes_model, *SMALL_POOL)
    assert message.endswith(
        "prompts.jsonl, line 3: the prompt has token id 257: ids are integers from 0 to 256"
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "stop_token_ids": [%s"x"]}' % ("7, " * 3000),
        '{"prompt": [[%s7]]}' % ("7, " * 3000),
        '{"prompt": {"a": [%s7]}}' % ("7, " * 3000),
        '{"prompt": "a", "%s": 1}' % ("x" * 3000),
        '{"prompt": "a", "logit_bias": {"%s": 1}}' % ("x" * 3000),
    ],
)
def test_a_refusal_never_repeats_three_thousand_values(bytes_model, tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    assert "p.jsonl, line 1: " in refusal("--file", path, "--model", bytes_model, *SMALL_POOL)


TOO_LATE = {  # flags -> words: refused before the model is loaded
    "--out=no/such/folder/x.txt": "there is no folder no/such",
    "--out=.": "--out . is a folder",
    "--out=/proc/no.txt": "No such file or directory: '/proc/no.txt.",
    f"--out={'x' * 300}": "File name too long",
}


@pytest.mark.parametrize("flags", TOO_LATE)
def test_a_run_that_would_fail_at_its_end_is_refused_before_it_begins(monkeypatch, flags):
    monkeypatch.setattr(generate, "LLM", lambda *args, **kwargs: pytest.fail("it was loaded"))
    assert TOO_LATE[flags] in refusal("x", *flags.split())


@pytest.mark.parametrize("prompts, written", [(["ab"], "ab\n"), (["ab", "cd"], "ab\n\ncd.+\n")])
def test_a_text_that_ends_with_an_error_is_named_when_all_are_written(
    bytes_model, monkeypatch, capsys, prompts, written
):
    def broken(*args, **kwargs):
        llm = LLM(*args, **kwargs)
        forward, nan = llm.engine.forward, float("nan")
        llm.engine.forward = lambda batch: forward(batch).index_fill(0, torch.tensor(0), nan)
        return llm

    monkeypatch.setattr(generate, "LLM", broken)
    with pytest.raises(SystemExit, match="generate.py: prompt 1: the logits are NaN"):
        main([*prompts, "--model", str(bytes_model), "--max-tokens", "1", *SMALL_POOL])
    assert re.fullmatch(written, capsys.readouterr().out, re.DOTALL)


# ---- flags ---------------------------------------------------------------------------------------
def test_the_defaults_of_the_flags_are_those_of_the_dataclasses():
    args = vars(parse_args(["a prompt"]))
    for cls, without in (
        (EngineConfig, {"seed"}),  # the flag of this name is the requests'
        # for JSONL only
        (SamplingParams, {"logit_bias", "allowed_token_ids", "stop_token_ids", "prompt_logprobs"}),
    ):
        defaults = {field.name: field.default for field in fields(cls)}
        assert {name for name in defaults if name not in args or name in without} == without
        for name in defaults.keys() - without:
            assert args[name] == defaults[name], name


def test_every_flag_reaches_the_parameters_it_is_named_after():
    values = {"n": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 9}
    values |= {"presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    values |= {"max_tokens": 33, "min_tokens": 4, "logprobs": 5}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    args = parse_args(["x", *words, "--ignore-eos", "--stop", "END", "--stop", "FIN"])
    expected = SamplingParams(**values, ignore_eos=True, stop=["END", "FIN"])
    assert generate.params_of(args) == expected


def test_the_engines_flags_reach_the_engine(monkeypatch):
    made = []

    def remember(*args, **kwargs):
        made.append(LLM(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(generate, "LLM", remember)
    flags = ["--block-size", 4, "--kv-cache-mb", 2, "--max-num-seqs", 3, "--max-seq-len", 99]
    flags += ["--max-num-batched-tokens", 5, "--dtype", "bfloat16", "--device", "cpu"]
    run_main("The wolf", "--max-tokens", 2, *flags)
    (llm,) = made
    scheduler = llm.engine.scheduler
    assert scheduler.allocator.block_size == 4
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (3, 5)
    assert llm.max_seq_len == 99 and llm.engine.cache.pool.dtype == torch.bfloat16
    assert llm.engine.cache.pool.device.type == "cpu"
    block_bytes = llm.engine.cache.pool[:, 0].nbytes
    assert scheduler.allocator.num_blocks == 2_000_000 // block_bytes


# ---- the tree of shared blocks -------------------------------------------------------------------
def test_several_texts_of_one_prompt_draw_their_tree_and_print_the_same_texts():
    prompt = "Once upon a time there was a king who had"
    flags = [prompt, "--n", "2", "--seed", "1", "--max-tokens", "4", "--block-size", "4"]
    out, err = run_main(*flags, *SMALL_POOL)
    assert "step 1: 3 blocks held / 6 without sharing\n[0 1 2]x2┬" in err
    assert "step 2: 4 blocks held / 6 without sharing, 1 copied\n[0 1]x2┬" in err
    assert "all steps: " in err and "without sharing" not in out
    quiet_out, quiet_err = run_main(*flags, *SMALL_POOL, "--no-tree")
    assert quiet_out == out and "without sharing" not in quiet_err


@pytest.mark.parametrize(
    "args, is_drawn",
    [
        (["x", "--beam-width", "2"], True),
        (["x", "--beam-width", "1"], False),
        (["x"], False),
        (["x", "y", "--n", "2"], False),
        (["x", "y", "--tree"], True),
    ],
)
def test_the_tree_is_drawn_for_one_prompt_with_several_texts_or_where_asked_for(args, is_drawn):
    parsed = parse_args(args)
    assert generate.draws_tree(parsed, generate.read_prompts(parsed)) == is_drawn
