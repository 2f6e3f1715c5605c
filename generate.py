"""The command line: prompts in, streamed text out.

Without arguments the shipped model continues twelve openings of fairy tales at once. All of them
together need nearly twice as many blocks as the pool has. A strip shows after each step which
request holds which block: a capital letter is a full block, a small letter a block that is not full
yet, a dot a free block. A request starts when the pool has room for it, and its blocks are free
again when its text ends. If the pool is full, the newest request is preempted.

    |AAAaBBbCCCCc··DDd·EEe···|
    step   12     96 tokens   ...   running   5  waiting   7  pool  80%

The text of one prompt is printed word by word; those of several prompts are printed at the end, in
the order of the prompts. Each option of the engine is a flag, with the default of `EngineConfig`.

Run: python generate.py
     python generate.py "Once upon a time" --max-tokens 200 --temperature 0.8
     python generate.py --file prompts.txt --jsonl --out texts.jsonl      (one prompt a line)
     python generate.py --file prompts.jsonl     ({"prompt": "The wolf", "max_tokens": 9, "n": 2})
     echo "The king's daughter" | python generate.py --file -
     python generate.py --record steps.jsonl     (python -m plots.draw pool --recording steps.jsonl)
     python generate.py --explain                (how long each kind of step takes, and why)
Try: --num-blocks 40: more preemptions, and the same texts.
     --block-size 1: no small letters, because a block of one token is always full.
"""

import json
import sys
import textwrap
from argparse import (
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
)
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import get_args

from kernels.backends import BACKENDS, DTYPES
from llm import LLM, SHIPPED_MODEL, EngineConfig, SamplingParams
from outputs import RequestOutput
from watch.terminal import Meter, Screen, letter_of

Prompt = str | list[int]  # text or token ids

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
    "stop": "a string that ends the text; may be given several times",
    "ignore_eos": "go on after the end-of-text token",
    "logprobs": "log-probabilities of this many likeliest tokens, in --jsonl output",
}
# These have no flag: a dict or a list of ids is hard to type. A line of JSONL may set them.
SAMPLING_WITHOUT_FLAG = {"logit_bias", "stop_token_ids", "prompt_logprobs"}


def add_flag(group: _ArgumentGroup, field: Field, help: str) -> None:
    """A flag for a field of a dataclass, with the field's name, type and default."""
    flag = "--" + field.name.replace("_", "-")
    if field.name == "stop":
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


def build_parser() -> ArgumentParser:
    """The flags: a few of this program, then those of EngineConfig and SamplingParams.

    Raises KeyError for a field without help text.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="prompts; none: the demonstration")
    parser.add_argument("--file", help="prompts, one a line or JSONL; - is standard input")
    models = "a name on the hub, a folder, ckpt.pt, or random:gpt2"
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help=models)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--threads", type=int, help="CPU threads (default 1 for the shipped model)")
    parser.add_argument("--out", type=Path, help="write the texts to this file")
    parser.add_argument("--jsonl", action="store_true", help="write JSON, one line a prompt")
    parser.add_argument("--record", type=Path, help="write what each step did to this file")
    parser.add_argument("--explain", action="store_true", help="say why steps take so long")
    engine_flags = parser.add_argument_group("the engine")
    for field in fields(EngineConfig):
        if field.name != "seed":  # --seed is the requests' seed
            add_flag(engine_flags, field, field.metadata["help"])
    sampling_flags = parser.add_argument_group("sampling")
    for field in fields(SamplingParams):
        if field.name not in SAMPLING_WITHOUT_FLAG:
            add_flag(sampling_flags, field, SAMPLING_HELP[field.name])
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags and prompts of the command line; `is_demo` is True if it has no prompts."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.is_demo = not args.prompts and args.file is None
    if not args.is_demo:
        return args
    parser.set_defaults(**DEMO_DEFAULTS)  # a flag on the command line replaces its default
    args = parser.parse_args(argv)
    args.is_demo = True
    if args.num_blocks is None and args.kv_cache_mb is None and args.block_size > 0:
        args.num_blocks = -(-DEMO_POOL_TOKENS // args.block_size)  # rounded up
    return args


# ---- the prompts ---------------------------------------------------------------------------------
def sampling_params(args: Namespace, **overrides) -> SamplingParams:
    """SamplingParams from the flags; `overrides`, the values of one line of JSONL, replace them.

    Raises ValueError for a name or a value that SamplingParams does not have.
    """
    names = {field.name for field in fields(SamplingParams)}
    if unknown := set(overrides) - names:
        raise ValueError(f"{min(unknown)!r} is no sampling parameter")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return SamplingParams(**(values | overrides))


def read_entry(line: str, args: Namespace) -> tuple[Prompt, SamplingParams]:
    """One line of JSONL: an object with a "prompt", and parameters if it has its own."""
    entry = json.loads(line)
    if "prompt" not in entry:
        raise ValueError("there is no 'prompt'")
    prompt = entry.pop("prompt")
    if not isinstance(prompt, str | list):
        raise ValueError(f"the prompt is {prompt!r}: give text or a list of token ids")
    if isinstance(entry.get("logit_bias"), dict):  # JSON has strings as keys: make them integers
        entry["logit_bias"] = {int(key): bias for key, bias in entry["logit_bias"].items()}
    return prompt, sampling_params(args, **entry)


def read_file(args: Namespace, from_flags: SamplingParams) -> list[tuple[Prompt, SamplingParams]]:
    """The prompts of --file. Raises ValueError that names the line."""
    try:
        if args.file == "-":
            text = sys.stdin.read()
        else:
            # "-sig": some editors begin a file with an invisible mark, which is left out
            text = Path(args.file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.file} cannot be read: {error}") from None
    prompts: list[tuple[Prompt, SamplingParams]] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.lstrip().startswith("{"):
                prompts.append(read_entry(line, args))
            elif line.strip():
                prompts.append((line.rstrip("\r"), from_flags))
        # TypeError: JSON of an unexpected type; RecursionError: too many nested brackets
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{args.file}, line {number}: {error}") from None
    return prompts


def read_prompts(args: Namespace) -> list[tuple[Prompt, SamplingParams]]:
    """The prompts of the arguments, then those of --file, each with its parameters."""
    from_flags = sampling_params(args)  # first, so that no line is blamed for a bad flag
    if args.is_demo:
        # At least half of the tokens are written, so that no text ends at once.
        return [
            (opening, replace(from_flags, max_tokens=num, min_tokens=num // 2))
            for opening, num in OPENINGS
        ]
    prompts: list[tuple[Prompt, SamplingParams]] = [(p, from_flags) for p in args.prompts]
    if args.file is not None:
        prompts += read_file(args, from_flags)
    if not prompts:
        raise ValueError(f"{args.file} holds no prompt: one a line, or JSONL with a 'prompt' each")
    return prompts


# ---- running -------------------------------------------------------------------------------------
def stream_one(llm: LLM, prompt: Prompt, params: SamplingParams) -> list[RequestOutput]:
    """Print a single text while it is written; without a tokenizer its token ids."""
    engine = llm.engine
    engine.add_request(prompt, params)
    print(prompt if isinstance(prompt, str) else "", end="", flush=True)
    finished: list[RequestOutput] = []
    while engine.has_unfinished():
        output = engine.step()
        finished += output.finished
        for delta in output.deltas:
            ids = "".join(f" {token_id}" for token_id in delta.token_ids)
            print(delta.text if llm.tokenizer else ids, end="", flush=True)
    print()
    return finished


def as_json(output: RequestOutput, llm: LLM) -> str:
    """One line of JSONL for a request."""
    row = {"model": llm.model_name, "weights": llm.weights} | asdict(output)
    return json.dumps(row, ensure_ascii=False)


def as_text(output: RequestOutput, llm: LLM, has_letter: bool) -> str:
    """A request's texts, wrapped at 98 columns; token ids if there is no tokenizer."""
    letter = f"[{letter_of(output.request_id)}] " if has_letter else ""
    texts = []
    for completion in output.outputs:
        written = completion.text if llm.tokenizer else " ".join(map(str, completion.token_ids))
        lines = f"{letter}{output.prompt or ''}{written}".split("\n")
        texts.append("\n".join(textwrap.fill(line, 98) for line in lines if line.strip()))
    return "\n\n".join(texts)


def write_all(outputs: list[RequestOutput], llm: LLM, args: Namespace) -> None:
    """Print all outputs or write them to --out, as texts or as lines of JSON."""
    if args.jsonl:
        whole = "\n".join(as_json(output, llm) for output in outputs)
    else:
        whole = "\n\n".join(as_text(output, llm, args.is_demo) for output in outputs)
    if args.out is None:
        print(whole)
    else:
        args.out.write_text(f"{whole}\n", encoding="utf-8")


def check_errors(outputs: list[RequestOutput]) -> None:
    """Raise ValueError for a text that ended with an error; the others have been written."""
    for number, output in enumerate(outputs, 1):
        for completion in output.outputs:
            if completion.error is not None:
                raise ValueError(f"prompt {number}: {completion.error}")


def check_flags(args: Namespace) -> None:
    """Raise ValueError for flags that would fail only after the texts are written."""
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out} is a folder, or there is no folder {args.out.parent}")


def build_llm(args: Namespace) -> LLM:
    """The LLM that the flags describe."""
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
    )


def run(args: Namespace) -> None:
    """Load the model, serve the prompts, print or write their texts."""
    prompts = read_prompts(args)
    check_flags(args)
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

    is_one_text = len(prompts) == 1 and prompts[0][1].n == 1
    if is_one_text and not args.jsonl and args.out is None:
        outputs = stream_one(llm, *prompts[0])
    else:
        engine.watchers.append(Screen(meter, args.is_demo, stream=sys.stderr))
        outputs = llm.generate([p for p, _ in prompts], [params for _, params in prompts])
        print(file=sys.stderr)
        write_all(outputs, llm, args)
    print(f"\n{meter.summary()}", file=sys.stderr)
    if explainer is not None:
        print("", *explainer.report(), sep="\n", file=sys.stderr)
    check_errors(outputs)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run it; a caller's mistake is one sentence and exit code 1."""
    try:
        run(parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"generate.py: {error}") from None


if __name__ == "__main__":
    main()
