"""The command line: prompts in, streamed text out.

Without arguments the shipped model goes on with a dozen fairy tales at once, from a pool that is
too small for all of them: the strip shows which request holds which block, step by step. A capital
letter is a full block, a small one the block that is being filled, a dot is free. Requests join
when the pool has room, give their blocks back when they end, and the newest gives way when the pool
runs dry.

    pool |AAAaBBbCCCCc··DDd·EEe···|    41 tokens/step ...

With one prompt the text is streamed as it comes; with many, a line shows the progress, and the
texts follow in the order of the prompts. What a production engine does beyond this: it serves them
over HTTP.

Run: python generate.py
     python generate.py "Once upon a time" --max-tokens 200 --temperature 0.8
     python generate.py --file prompts.txt --jsonl --out texts.jsonl      (one prompt a line)
     python generate.py --file prompts.jsonl     ({"prompt": "The wolf", "max_tokens": 9, "n": 2})
     echo "The king's daughter" | python generate.py --file -
     python generate.py --record steps.jsonl     (python -m plots.draw pool --recording steps.jsonl)
     python generate.py --explain                (where the time of its steps went)
Try: --num-blocks 40 (more preemptions, the same texts), --block-size 1, --max-num-batched-tokens 8.
"""

import json
import sys
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

from kernels.backends import BACKENDS, DTYPES
from llm import LLM, SHIPPED_MODEL, EngineConfig, SamplingParams
from outputs import RequestOutput
from watch.explain import Explainer
from watch.recorder import Recorder
from watch.terminal import Meter, Screen, letter_of

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
DEMO_POOL_TOKENS = 480  # a little over half of what the twelve would fill together
DEMO_DEFAULTS = {"block_size": 8, "temperature": 0.7, "top_p": 0.95}  # flags that are given win


# ---- the command line ----------------------------------------------------------------------------
HELP = {
    "n": "texts for each prompt",
    "temperature": "0 is greedy",
    "top_k": "sample from the k likeliest tokens; 0 is all",
    "top_p": "sample from the likeliest tokens that hold this share of the probability",
    "min_p": "leave out tokens less likely than this share of the likeliest",
    "presence_penalty": "taken from the logit of each token that was generated",
    "frequency_penalty": "taken from it once for each time",
    "repetition_penalty": "divides the logits of tokens seen in prompt or text; 1 is none",
    "seed": "the same seed writes the same text, in any batch",
    "max_tokens": "tokens to write at most",
    "min_tokens": "tokens to write before the text may end",
    "stop": "a text that ends the output; may be given several times",
    "ignore_eos": "go on after the end-of-text token",
    "logprobs": "log-probabilities of this many likeliest tokens, in --jsonl output",
    "block_size": "tokens in a block",
    "num_blocks": "the pool in blocks",
    "kv_cache_mb": "the pool in MB (10**6 bytes); neither: what is free",
    "gpu_memory_utilization": "share of a GPU's free memory for the pool",
    "max_num_seqs": "sequences in one step",
    "max_num_batched_tokens": "tokens in one step",
    "max_seq_len": "tokens in one sequence; default: the model's",
    "cuda_graphs": "on a GPU, record decode steps once and replay them (on if nothing is said)",
    "fused": "on a GPU, join a decode step's small operations (off if not said)",
    "plan_ahead": "launch the next step before the last one's tokens are read (off if not said)",
}


def add_flags(group, cls, skip: str = "") -> None:
    """A flag for each field of a dataclass that HELP knows; its default is the field's."""
    for field in (f for f in fields(cls) if f.name in HELP and f.name != skip):
        default, flag, text = field.default, "--" + field.name.replace("_", "-"), HELP[field.name]
        if field.name == "stop":
            group.add_argument(flag, action="append", help=text)
        elif isinstance(default, bool):
            group.add_argument(flag, action=BooleanOptionalAction, default=default, help=text)
        else:
            kind = type(default) if default is not None else get_args(field.type)[0]  # int | None
            group.add_argument(flag, type=kind, default=default, help=f"{text} (default {default})")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line; engine and sampling flags come from their dataclasses.

    Without prompts it is the demonstration's, which has other defaults for some flags.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="prompts; none: the demonstration")
    parser.add_argument("--file", help="prompts, one a line or JSONL; - is standard input")
    models = "a name on the hub, a folder, ckpt.pt, or random:gpt2"
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help=models)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--threads", type=int, help="CPU threads; the shipped model: 1")
    parser.add_argument("--out", type=Path, help="write the texts to this file")
    parser.add_argument("--jsonl", action="store_true", help="write JSON, one line a prompt")
    parser.add_argument("--record", type=Path, help="write what each step did to this file")
    parser.add_argument("--explain", action="store_true", help="say where the steps' time went")
    add_flags(parser.add_argument_group("the engine"), EngineConfig, skip="seed")
    add_flags(parser.add_argument_group("sampling"), SamplingParams)
    args = parser.parse_args(argv)
    args.is_demo = not args.prompts and args.file is None
    if args.is_demo:
        parser.set_defaults(**DEMO_DEFAULTS, is_demo=True)
        args = parser.parse_args(argv)
        if args.num_blocks is None and args.kv_cache_mb is None and args.block_size > 0:
            args.num_blocks = -(-DEMO_POOL_TOKENS // args.block_size)
    return args


def sampling_params(args: Namespace, **overrides) -> SamplingParams:
    """SamplingParams from the flags, with one prompt's own values on top."""
    names = {field.name for field in fields(SamplingParams)}
    if unknown := set(overrides) - names:
        raise ValueError(f"{min(unknown)!r} is no sampling parameter")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return SamplingParams(**(values | overrides))


def read_entry(line: str, args: Namespace) -> tuple[str | list[int], SamplingParams]:
    """One line of JSONL: an object with a "prompt" and, if it likes, its own parameters."""
    entry = json.loads(line)
    if "prompt" not in entry:
        raise ValueError("there is no 'prompt'")
    prompt = entry.pop("prompt")
    if isinstance(entry.get("logit_bias"), dict):  # a key of JSON is a string, a token id is not
        entry["logit_bias"] = {int(key): bias for key, bias in entry["logit_bias"].items()}
    return prompt, sampling_params(args, **entry)


def read_prompts(args: Namespace) -> list[tuple[str | list[int], SamplingParams]]:
    """The prompts of arguments and file, each with its parameters. ValueError names a bad line."""
    from_flags = sampling_params(args)  # first of all: no line is to blame for a flag
    if args.is_demo:
        # Each writes half of its tokens at least: a tale that ends at once would show nothing.
        return [(t, replace(from_flags, max_tokens=n, min_tokens=n // 2)) for t, n in OPENINGS]
    prompts = [(prompt, from_flags) for prompt in args.prompts]
    if args.file is None:
        return prompts
    try:  # "-sig": some editors begin a file with an invisible mark
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.file} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.lstrip().startswith("{"):
                prompts.append(read_entry(line, args))
            elif line.strip():
                prompts.append((line.rstrip("\r"), from_flags))
        except (ValueError, TypeError, RecursionError) as error:  # TypeError: a value of odd type
            raise ValueError(f"{args.file}, line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{args.file} holds no prompt: one a line, or JSONL with a 'prompt' each")
    return prompts


# ---- running -------------------------------------------------------------------------------------
def run_all(llm: LLM, prompts: list, screen: Screen) -> list[RequestOutput]:
    """Serve all prompts together; outputs in their order. A refused prompt stops everything."""
    engine = llm.engine
    ids, outputs = [engine.add_request(prompt, params) for prompt, params in prompts], {}
    while engine.has_unfinished():
        screen.meter.add(step := engine.step())
        outputs |= {output.request_id: output for output in step.outputs if output.finished}
        screen.show(last=not engine.has_unfinished())
    return [outputs[request_id] for request_id in ids]


def stream_one(llm: LLM, prompt: str | list[int], params: SamplingParams, meter: Meter) -> None:
    """Print a single text while it is written."""
    llm.engine.add_request(prompt, params)
    print(prompt if isinstance(prompt, str) else "", end="", flush=True)
    shown = 0
    while llm.engine.has_unfinished():
        meter.add(step := llm.engine.step())
        for output in step.outputs:
            text, ids = output.outputs[0].text, output.outputs[0].token_ids
            print(text[shown:] if llm.tokenizer else f" {ids[-1]}", end="", flush=True)
            shown = len(text)
    print()


def as_json(output: RequestOutput, llm: LLM) -> str:
    """One line of JSONL for a request."""
    row = {"model": llm.model_name, "weights": llm.weights} | asdict(output)
    return json.dumps(row, ensure_ascii=False)


def as_text(output: RequestOutput, llm: LLM, named: bool) -> str:
    """A request's texts for a reader, wrapped; token ids where there is no tokenizer."""
    name, shown = f"[{letter_of(output.request_id)}] " if named else "", []
    for completion in output.outputs:
        written = completion.text if llm.tokenizer else " ".join(map(str, completion.token_ids))
        lines = f"{name}{output.prompt or ''}{written}".split("\n")
        shown.append("\n".join(textwrap.fill(line, 98) for line in lines if line.strip()))
    return "\n\n".join(shown)


def write_all(outputs: list[RequestOutput], llm: LLM, args: Namespace) -> None:
    """All texts, or one line of JSON each, to where the flags say; the demonstration names them."""
    texts = [as_json(o, llm) if args.jsonl else as_text(o, llm, args.is_demo) for o in outputs]
    whole = ("\n" if args.jsonl else "\n\n").join(texts)
    if args.out is None:
        print(whole)
    else:
        args.out.write_text(f"{whole}\n", encoding="utf-8")


def run(args: Namespace) -> None:
    """Load the model, serve the prompts, print or write what came out."""
    prompts = read_prompts(args)
    # Rather now than after the work:
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out} is a folder, or there is no folder {args.out.parent}")
    if args.plan_ahead and (args.explain or args.record is not None):
        raise ValueError("--explain and --record want one step at a time: leave out --plan-ahead")
    config = {f.name: getattr(args, f.name) for f in fields(EngineConfig) if f.name != "seed"}
    config |= {name: getattr(args, name) for name in ("device", "dtype", "backend", "threads")}
    if args.threads is None and args.model == str(SHIPPED_MODEL):
        config["threads"] = 1  # so small a model that a second thread waits more than it works
    llm = LLM(args.model, **config)
    if args.explain:
        llm.engine = explainer = Explainer(llm.engine, llm.model)
    if args.record is not None:
        llm.engine = Recorder(llm.engine, args.record, model=Path(llm.model_name).name)
    meter = Meter(llm)
    if len(prompts) == 1 and prompts[0][1].n == 1 and not args.jsonl and args.out is None:
        stream_one(llm, *prompts[0], meter)
    else:
        outputs = run_all(llm, prompts, Screen(meter, strip=args.is_demo, stream=sys.stderr))
        print(file=sys.stderr)
        write_all(outputs, llm, args)
    print(f"\n{meter.summary()}", file=sys.stderr)
    if args.explain:
        print("", *explainer.report(), sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run it; a caller's mistake is one sentence and exit code 1."""
    try:
        run(parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"generate.py: {error}") from None


if __name__ == "__main__":
    main()
