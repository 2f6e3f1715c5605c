"""The command line: prompts in, streamed text out.

Without arguments the shipped model continues twelve openings of fairy tales at once. All of them
together need nearly twice as many blocks as the pool has. A strip shows after each step which
request holds which block: a capital letter is a full block, a small letter a block that is not full
yet, a dot a free block. A request starts when the pool has room for it, and its blocks are free
again when its text ends. If the pool is full, the newest request is preempted.

    |AAAaBBbCCCCc··DDd·EEe···|
    step   12     96 tokens   ...   running   5  waiting   7  pool  80%

The text of one prompt is printed word by word; those of several prompts are written in the order of
the prompts, each when it and those before it have ended. After Ctrl-C the finished texts are
written. Each option of the engine is a flag, with the default of `EngineConfig`.

Run: python generate.py
     python generate.py "Once upon a time" --max-tokens 200 --temperature 0.8
     python generate.py "Once upon a time" --beam-width 4          (the four best texts of a search)
     python generate.py --file prompts.txt --jsonl --out texts.jsonl      (one prompt a line)
     python generate.py --file prompts.jsonl     ({"prompt": "The wolf", "max_tokens": 9, "n": 2})
     echo "The king's daughter" | python generate.py --file -
     python generate.py --record steps.jsonl     (then python -m serving.replay steps.jsonl x.html)
     python generate.py "The wolf" --n 4         (draws which blocks the four texts share)
     python generate.py --explain                (how long each kind of step takes, and why)
     torchrun --nproc-per-node 2 generate.py --tensor-parallel    (half of the model in each)
Try: --num-blocks 40: more preemptions, and the same texts.
     --block-size 1: no small letters, because a block of one token is always full.
"""

import io
import json
import os
import shutil
import sys
import textwrap
from argparse import (
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
)
from contextlib import nullcontext, suppress
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import NamedTuple, TextIO, get_args

from beam_search import BeamSearchParams, add_beam_search, best_first
from kernels.backends import BACKENDS, DTYPES
from llm import LLM, SHIPPED_MODEL, EngineConfig, SamplingParams
from outputs import RequestOutput
from watch.terminal import Meter, Screen, can_hold, letter_of


class Entry(NamedTuple):
    """A prompt, its parameters, and where it stands in a file, for messages."""

    prompt: str | list[int]  # text or token ids
    params: SamplingParams | BeamSearchParams
    place: str = ""  # "prompts.txt, line 3: "


# (opening, tokens to write): short and long ones, so that requests end at different times.
OPENINGS = [
    ("Once upon a time there was a king who had three sons,", 90),
    ("In the midst of the forest stood a little house,", 60),
    ("The old woman said to the cat,", 40),
    ("There was once a poor miller", 110),
    ("The wind", 30),
    ('"Who is there?" cried the wolf.', 70),
    ("A long time ago, when wishing still helped, a soldier came home from the wars.", 80),
    ("The princess", 100),
    ("Far out at sea, where the water is as blue as the cornflower,", 50),
    ("Dorothy and the Scarecrow", 60),
    ("A Fox once saw", 45),
    ("Then the little tailor laughed, and said to the giant that he was not afraid,", 75),
]
DEMO_POOL_TOKENS = 480  # a little over half of the tokens of all twelve texts
DEMO_DEFAULTS = {"block_size": 8, "temperature": 0.7, "top_p": 0.95}


# ---- the command line ----------------------------------------------------------------------------
SAMPLING_HELP = {
    "n": "texts for each prompt",
    "best_of": "sample so many texts for each prompt, and keep the n likeliest",
    "temperature": "0 is greedy",
    "top_k": "sample from the k likeliest tokens; 0 is all",
    "top_p": "sample from the likeliest tokens that hold this share of the probability",
    "min_p": "leave out tokens less likely than this share of the likeliest",
    "presence_penalty": "subtracted once from the logit of each token in the text so far",
    "frequency_penalty": "subtracted from it once for each time that the token was written",
    "repetition_penalty": "divides the logits of tokens in prompt and text; 1 is none",
    "seed": "the same seed writes the same text, in any batch",
    "max_tokens": "tokens to write at most",
    "min_tokens": "tokens to write before the text may end",
    "bad_words": "a string that is not written; may be given several times",
    "stop": "a string that ends the text; may be given several times",
    "include_stop_str_in_output": "whether the text ends with the stop string",
    "ignore_eos": "go on after the end-of-text token",
    "logprobs": "log-probabilities of this many likeliest tokens, in --jsonl output",
}
# These have no flag: a dict or a list of ids is hard to type. A line of JSONL may set them.
SAMPLING_WITHOUT_FLAG = {"logit_bias", "allowed_token_ids", "stop_token_ids", "prompt_logprobs"}
BEAM_FLAGS = {"length_penalty", "early_stopping", "num_return_sequences"}  # beside --beam-width
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}  # the flag's words


def add_flag(group: _ArgumentGroup, field: Field, help: str) -> None:
    """A flag for a field of a dataclass, with the field's name, type and default."""
    flag = "--" + field.name.replace("_", "-")
    if field.name in ("stop", "bad_words"):
        group.add_argument(flag, action="append", help=help)
    elif isinstance(field.default, bool):
        help = f"{help}; {'on' if field.default else 'off'} by default"
        group.add_argument(flag, action=BooleanOptionalAction, default=field.default, help=help)
    else:
        # A field with default None has a type like int | None; the flag's type is int.
        kind = get_args(field.type)[0] if field.default is None else type(field.default)
        if field.default is not None:
            help = f"{help} (default {field.default})"
        group.add_argument(flag, type=kind, default=field.default, help=help)


def add_engine_flags(parser: ArgumentParser) -> None:
    """The flags that `build_llm` reads: the model, its device, the fields of EngineConfig."""
    models = "a name on the hub, a folder, ckpt.pt, or random:gpt2"
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help=models)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--threads", type=int, help="CPU threads (default 1 for the shipped model)")
    engine_flags = parser.add_argument_group("the engine")
    for field in fields(EngineConfig):
        if field.name != "seed":  # --seed is the requests' seed
            add_flag(engine_flags, field, field.metadata["help"])


def build_parser() -> ArgumentParser:
    """The flags: a few of this program, then those of EngineConfig and SamplingParams.

    Raises KeyError for a field without help text.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="prompts; none: the demonstration")
    parser.add_argument("--file", help="prompts, one a line or JSONL; - is standard input")
    parser.add_argument("--out", type=Path, help="write the texts to this file")
    parser.add_argument("--jsonl", action="store_true", help="write JSON, one line a prompt")
    parser.add_argument("--record", type=Path, help="write what each step did to this file")
    parser.add_argument("--explain", action="store_true", help="say why steps take so long")
    help = "draw which blocks texts share; by default for one prompt with several texts"
    parser.add_argument("--tree", action=BooleanOptionalAction, help=help)
    add_engine_flags(parser)
    sampling_flags = parser.add_argument_group("sampling")
    for field in fields(SamplingParams):
        if field.name not in SAMPLING_WITHOUT_FLAG:
            add_flag(sampling_flags, field, SAMPLING_HELP[field.name])
    add_beam_flags(parser.add_argument_group("beam search, instead of sampling"))
    return parser


def add_beam_flags(group: _ArgumentGroup) -> None:
    """The flags of BeamSearchParams; --max-tokens belongs to sampling too."""
    group.add_argument("--beam-width", type=int, help="search with so many beams")
    help = "each text's score is divided by its length to this power (default 1.0)"
    group.add_argument("--length-penalty", type=float, default=1.0, help=help)
    help = "end at once when so many texts have ended, or only when no beam can be better"
    group.add_argument("--early-stopping", choices=EARLY_STOPPING, default="false", help=help)
    help = "so many of the best texts are written (default: all)"
    group.add_argument("--num-return-sequences", type=int, help=help)


def check_flags(args: Namespace, parser: ArgumentParser) -> None:
    """Raise ValueError for flags of sampling beside --beam-width, and of beams without it."""
    names, reason = BEAM_FLAGS, "needs --beam-width"
    if args.beam_width is not None:
        names, reason = SAMPLING_HELP.keys() - {"max_tokens"}, "does not go with --beam-width"
    if args.explain and args.tensor_parallel:
        raise ValueError(
            "--explain runs the model by itself: it does not go with --tensor-parallel"
        )
    for name in sorted(names):
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags and prompts of the command line; `is_demo` is True if it has no prompts."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(args, parser)
    args.is_demo = not args.prompts and args.file is None
    if not args.is_demo:
        return args
    parser.set_defaults(**DEMO_DEFAULTS)  # a flag on the command line replaces its default
    args = parser.parse_args(argv)
    args.is_demo = True
    if args.num_blocks is None and args.kv_cache_mb is None and args.block_size > 0:
        num_tokens = DEMO_POOL_TOKENS * max(1, args.beam_width or 1)
        args.num_blocks = -(-num_tokens // args.block_size)  # rounded up
    return args


# ---- the prompts ---------------------------------------------------------------------------------
def params_of(args: Namespace, **overrides) -> SamplingParams | BeamSearchParams:
    """The parameters from the flags; `overrides`, the values of one line of JSONL, replace them.

    Raises ValueError for a name or a value that these parameters do not have.
    """
    is_search = args.beam_width is not None
    kind = BeamSearchParams if is_search else SamplingParams
    names = {field.name for field in fields(kind)}
    if unknown := set(overrides) - names:
        words = "no parameter of a beam search" if is_search else "no sampling parameter"
        raise ValueError(f"{short_repr(min(unknown))} is {words}")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if is_search:
        values["early_stopping"] = EARLY_STOPPING[args.early_stopping]
    return kind(**(values | overrides))


def read_entry(line: str, args: Namespace, place: str) -> Entry:
    """One line of JSONL: an object with a "prompt", and parameters if it has its own."""
    entry = json.loads(line)
    if "prompt" not in entry:
        raise ValueError("there is no 'prompt'")
    prompt = entry.pop("prompt")
    if not isinstance(prompt, str | list):
        raise ValueError(f"the prompt is {short_repr(prompt)}: give text or a list of token ids")
    return Entry(prompt, params_of(args, **entry), place)


def read_text(path: str) -> str:
    """The whole text of a file, or of standard input for "-", by the same rules."""
    # "-sig": some editors begin a file with an invisible mark, which is left out.
    if path != "-":
        return Path(path).read_text("utf-8-sig")
    if sys.stdin is None:
        raise OSError("it is closed")
    # Decoded here, because sys.stdin has the encoding of the terminal.
    return io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), "utf-8-sig").read()


def read_file(args: Namespace, from_flags: SamplingParams | BeamSearchParams) -> list[Entry]:
    """The prompts of --file. Raises ValueError that names the line."""
    name = "standard input" if args.file == "-" else args.file
    try:
        text = read_text(args.file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    entries: list[Entry] = []
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{name}, line {number}: "
        try:
            if line.lstrip().startswith("{"):
                entries.append(read_entry(line, args, place))
            elif line.strip():
                entries.append(Entry(line, from_flags, place))
        # TypeError: JSON of an unexpected type; RecursionError: too many nested brackets
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{place}{error}") from None
    return entries


def params_of_demo(
    from_flags: SamplingParams | BeamSearchParams, max_tokens: int
) -> SamplingParams | BeamSearchParams:
    """The parameters of one opening of the demonstration."""
    if isinstance(from_flags, BeamSearchParams):
        return replace(from_flags, max_tokens=max_tokens)
    # At least half of the tokens are written, so that no text ends at once.
    return replace(from_flags, max_tokens=max_tokens, min_tokens=max_tokens // 2)


def read_prompts(args: Namespace) -> list[Entry]:
    """The prompts of the arguments, then those of --file, each with its parameters."""
    from_flags = params_of(args)  # first, so that no line is blamed for a bad flag
    if args.is_demo:
        return [Entry(opening, params_of_demo(from_flags, num)) for opening, num in OPENINGS]
    entries = [Entry(prompt, from_flags) for prompt in args.prompts]
    if args.file is not None:
        entries += read_file(args, from_flags)
    if not entries:
        raise ValueError(f"{args.file} holds no prompt: one a line, or JSONL with a 'prompt' each")
    return entries


# ---- where the texts go --------------------------------------------------------------------------
def usable_stdout() -> TextIO:
    """Standard output, which writes "?" for a character that its encoding lacks."""
    if sys.stdout is None:
        raise ValueError("standard output is closed: write to a file with --out")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    return sys.stdout


class TextWriter:
    """Writes texts in the order of the prompts, to standard output or to a file.

    It is made before the model is loaded, so that a file that cannot be written is noticed before
    the work. A text is written when all before it are; on a terminal, where the pool is drawn, all
    at the end. The texts go to a file beside the target, which takes its place at the end.
    """

    def __init__(self, target: Path | None):
        self.num_written = 0
        self.waiting: dict[int, str] = {}  # texts that are not written yet, by their numbers
        self.part: Path | None = None
        if target is None:
            self.stream = usable_stdout()
            return
        if target.is_dir() or not target.parent.is_dir():
            raise ValueError(f"--out {target} is a folder, or there is no folder {target.parent}")
        if target.exists() and not os.access(target, os.W_OK):
            raise ValueError(f"--out {target} cannot be written: its permissions forbid it")
        if target.is_file() or not target.exists():  # a pipe or a device is not replaced
            self.target = target.resolve()
            self.part = self.target.with_name(f"{target.name[:99]}.{os.getpid()}.part")
        self.stream = open(self.part or target, "w", encoding="utf-8", errors="replace")
        self.whole_bytes = 0  # of the part, up to the end of the last text

    def add(self, number: int, text: str) -> None:
        """Take the text of a prompt, given by its number from 0 on, with its line end."""
        self.waiting[number] = text
        while self.num_written in self.waiting and (self.part or not self.stream.isatty()):
            self._write(self.num_written)

    def write_rest(self) -> None:
        """Write all texts that wait, also those behind a text that never came."""
        for number in sorted(self.waiting):
            self._write(number)

    def _write(self, number: int) -> None:
        text = self.waiting.pop(number)
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:  # a full disk, a closed pipe
            self.waiting.clear()
            name = self.part or "the output"
            kept = f"; {self.num_written} texts are in it" if self.part and self.num_written else ""
            raise ValueError(f"{name} cannot be written: {error.strerror}{kept}") from None
        self.num_written += 1
        if self.part is not None:
            self.whole_bytes = self.part.stat().st_size

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Put the file in its place, after Ctrl-C too; after an error the old one stays."""
        if self.stream is sys.stdout:
            return
        with suppress(OSError) if kind else nullcontext():
            self.stream.close()
        if self.part is None:
            return
        if kind is None or (kind is KeyboardInterrupt and self.num_written):
            if self.target.exists():
                shutil.copymode(self.target, self.part)
            self.part.replace(self.target)
        elif self.num_written:
            os.truncate(self.part, self.whole_bytes)  # without the half of a text at its end
        else:
            self.part.unlink()


# ---- running -------------------------------------------------------------------------------------
def add_entry(llm: LLM, entry: Entry) -> str:
    """Queue a prompt; returns the request's id. ValueError names the line of a refused one."""
    try:
        if isinstance(entry.params, BeamSearchParams):
            return add_beam_search(llm.engine, entry.prompt, entry.params)
        return llm.engine.add_request(entry.prompt, entry.params)
    except ValueError as error:
        raise ValueError(f"{entry.place}{error}") from None


def stream_one(llm: LLM, entry: Entry) -> list[RequestOutput]:
    """Print a single text while it is written; without a tokenizer its token ids."""
    engine = llm.engine
    add_entry(llm, entry)
    print(entry.prompt if isinstance(entry.prompt, str) else "", end="", flush=True)
    finished: list[RequestOutput] = []
    while engine.has_unfinished():
        output = engine.step()
        finished += output.finished
        for delta in output.deltas:
            ids = "".join(f" {token_id}" for token_id in delta.token_ids)
            print(delta.text if llm.tokenizer else ids, end="", flush=True)
    print(flush=True)
    return finished


def serve_all(
    llm: LLM, entries: list[Entry], writer: TextWriter, args: Namespace
) -> list[RequestOutput]:
    """Serve all prompts together; the outputs are in their order. What has ended is written."""
    engine = llm.engine
    numbers = {add_entry(llm, entry): number for number, entry in enumerate(entries)}
    outputs: dict[int, RequestOutput] = {}
    try:
        while engine.has_unfinished():
            for output in engine.step().finished:
                number = numbers[output.request_id]
                params = entries[number].params
                if isinstance(params, BeamSearchParams):
                    output = best_first(output, params)
                outputs[number] = output
                if args.jsonl:
                    text = as_json(output, llm, writer.stream)
                else:
                    text = "\n" * (number > 0) + as_text(output, llm, args)
                writer.add(number, f"{text}\n")
    except KeyboardInterrupt:
        done = f"interrupted: {len(outputs)} of {len(entries)} texts are finished and written"
        raise KeyboardInterrupt(done) from None
    finally:
        print(file=sys.stderr)
        writer.write_rest()
    return [outputs[number] for number in sorted(outputs)]


def as_json(output: RequestOutput, llm: LLM, stream: TextIO) -> str:
    """One line of JSONL for a request; in ASCII if the stream lacks one of its characters."""
    row = {"model": llm.model_name, "weights": llm.weights} | asdict(output)
    line = json.dumps(row, ensure_ascii=False)
    return line if can_hold(stream, line) else json.dumps(row)


def as_text(output: RequestOutput, llm: LLM, args: Namespace) -> str:
    """A request's texts, wrapped at 98 columns; token ids if there is no tokenizer.

    In the demonstration each begins with the request's letter, after a beam search with its score.
    """
    letter = f"[{letter_of(output.request_id)}] " if args.is_demo else ""
    texts = []
    for completion in output.outputs:
        score = f"({completion.cumulative_logprob:.3f}) " if args.beam_width else ""
        written = completion.text if llm.tokenizer else " ".join(map(str, completion.token_ids))
        lines = f"{letter}{score}{output.prompt or ''}{written}".split("\n")
        texts.append("\n".join(textwrap.fill(line, 98) for line in lines if line.strip()))
    return "\n\n".join(texts)


def check_errors(outputs: list[RequestOutput]) -> None:
    """Raise ValueError for a text that ended with an error; the others have been written."""
    for number, output in enumerate(outputs, 1):
        for completion in output.outputs:
            if completion.error is not None:
                raise ValueError(f"prompt {number}: {completion.error}")


def build_llm(args: Namespace, **options) -> LLM:
    """The LLM that the flags describe; `options` are more arguments of `LLM`."""
    config = {f.name: getattr(args, f.name) for f in fields(EngineConfig) if f.name != "seed"}
    threads = args.threads
    if threads is None and args.model == str(SHIPPED_MODEL):
        threads = 1  # a second thread would only wait: the model is too small
    return LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        threads=threads,
        **config,
        **options,
    )


def follows_rank_0(args: Namespace) -> bool:
    """With --tensor-parallel, on every process but the first: do what rank 0 does until it ends.

    Returns False on all others, which have the prompts and write the texts.
    """
    if not args.tensor_parallel or os.environ.get("RANK", "0") == "0":
        return False
    from speedups.tensor_parallel import follow  # for --tensor-parallel only

    follow(build_llm(args).engine)
    return True


def draws_tree(args: Namespace, entries: list[Entry]) -> bool:
    """Whether to draw the tree of blocks: as --tree says, else if one prompt has several texts."""
    if args.tree is not None or len(entries) > 1:
        return bool(args.tree)
    params = entries[0].params
    if isinstance(params, BeamSearchParams):
        return params.beam_width > 1
    return params.num_sampled > 1


def run(args: Namespace) -> None:
    """Load the model, serve the prompts, print or write their texts."""
    if follows_rank_0(args):
        return
    entries = read_prompts(args)
    with TextWriter(args.out) as writer:
        llm = build_llm(args)
        engine = llm.engine
        meter = Meter(engine.scheduler, f"{llm.weights}, {llm.backend}, {str(llm.dtype)[6:]}")
        engine.watchers.append(meter)
        explainer = None
        if args.explain:
            from watch.explain import Explainer  # for --explain only

            explainer = Explainer(llm.model, engine.cache, engine.forward)
            engine.watchers.append(explainer)
        if args.record is not None:
            from watch.recorder import Recorder  # for --record only

            name = Path(llm.model_name).name
            engine.watchers.append(Recorder(engine.scheduler, args.record, model=name))

        tree = None
        if draws_tree(args, entries):
            from watch.tree import TreeScreen  # for several texts of a prompt only

            tree = TreeScreen(engine.scheduler, sys.stderr)
            engine.watchers.append(tree)

        # A beam search has no text before its end: any beam may still be dropped. So it is with the
        # texts of best_of.
        is_one_text = len(entries) == 1 and getattr(entries[0].params, "num_sampled", 0) == 1
        if is_one_text and not args.jsonl and args.out is None:
            outputs = stream_one(llm, entries[0])
        else:
            if tree is None:  # both would draw in the same place
                engine.watchers.append(Screen(meter, args.is_demo, stream=sys.stderr))
            outputs = serve_all(llm, entries, writer, args)
    print(f"\n{meter.summary()}", file=sys.stderr)
    if tree is not None:
        print(tree.summary(), file=sys.stderr)
    if explainer is not None:
        print("", *explainer.report(), sep="\n", file=sys.stderr)
    check_errors(outputs)


def flush_stdout() -> None:
    """Python flushes it again at exit, and would print a traceback if it cannot be written."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run it; a caller's mistake is one sentence and exit code 1."""
    if sys.stderr is None:  # closed: print(file=None) would write to standard output
        sys.stderr = open(os.devnull, "w")
    try:
        run(parse_args(argv))
    except KeyboardInterrupt as error:
        flush_stdout()
        print(f"\ngenerate.py: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        flush_stdout()
        sentence = str(error).replace("\n", " ")
        if len(sentence) > 360:  # with a value of 3,000 numbers, for example
            sentence = f"{sentence[:240]} ... {sentence[-100:]}"
        raise SystemExit(f"generate.py: {sentence}") from None


if __name__ == "__main__":
    main()
