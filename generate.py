"""The command line: prompts in, streamed text out.

Without arguments the shipped model goes on with a dozen fairy tales at once, from a pool that is
too small for all of them: the strip shows which request holds which block, step by step. A capital
letter is a full block, a small one the block that is being filled, a dot is free. Requests join
when the pool has room, give their blocks back when they end, and the newest gives way when the pool
runs dry.

    pool |AAAaBBbCCCCc··DDd·EEe···|    41 tokens/step ...

With one prompt the text is streamed as it comes; with many a line shows the progress and the texts
follow in the order of the prompts. What a production engine does beyond this: it serves them over
HTTP.

Run: python generate.py
     python generate.py "Once upon a time" --max-tokens 200 --temperature 0.8
     python generate.py --file prompts.txt --jsonl --out texts.jsonl      (one prompt a line)
     python generate.py --file prompts.jsonl      ({"prompt": "The wolf", "max_tokens": 30, "seed": 7})
     echo "The king's daughter" | python generate.py --file -
Try: --num-blocks 40 (more preemptions, the same texts), --block-size 1, --max-num-batched-tokens 8.
"""

import argparse
import json
import sys
import textwrap
import time
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from engine import EngineConfig
from llm import BACKENDS, DTYPES, LLM, SHIPPED_MODEL, SamplingParams
from outputs import RequestOutput, StepOutput

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
DEMO_POOL = {"num_blocks": 60, "block_size": 8}
COLOURS = [31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96]  # of a terminal, one a request
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
}
KINDS = {"seed": int, "max_tokens": int, "logprobs": int, "num_blocks": int, "max_seq_len": int}
KINDS |= {"kv_cache_mb": float}


def add_flags(group, cls, skip: set[str]) -> None:
    """A flag for each field of a dataclass that HELP knows; its default is the field's."""
    for field in fields(cls):
        if field.name not in HELP or field.name in skip:
            continue
        default = field.default if field.default is not MISSING else None
        flag, text = "--" + field.name.replace("_", "-"), HELP[field.name]
        if field.name == "stop":
            group.add_argument(flag, action="append", help=text)
        elif isinstance(default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            kind = KINDS.get(field.name) or type(default)
            group.add_argument(flag, type=kind, default=default, help=f"{text} (default {default})")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; engine and sampling flags come from their dataclasses."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("prompts", nargs="*", help="prompts; none: the demonstration")
    parser.add_argument(
        "--file", help="prompts from a file, one a line or JSONL; - is standard input"
    )
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="a folder, or random:gpt2")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--out", type=Path, help="write the texts to this file")
    parser.add_argument("--jsonl", action="store_true", help="write JSON, one line a prompt")
    add_flags(parser.add_argument_group("the engine"), EngineConfig, skip={"seed"})
    add_flags(parser.add_argument_group("sampling"), SamplingParams, skip=set())
    return parser.parse_args(argv)


def sampling_params(args: argparse.Namespace, **overrides) -> SamplingParams:
    """SamplingParams from the flags, with one prompt's own values on top."""
    names = {field.name for field in fields(SamplingParams)}
    unknown = set(overrides) - names
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is no sampling parameter")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return SamplingParams(**(values | overrides))


def read_prompts(args: argparse.Namespace) -> list[tuple[str | list[int], SamplingParams]]:
    """The prompts of arguments and file, each with its parameters. ValueError names a bad line."""
    prompts = [(prompt, sampling_params(args)) for prompt in args.prompts]
    if args.file is None:
        return prompts
    try:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.file} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            prompts.append((line.rstrip("\r"), sampling_params(args)))
            continue
        try:
            entry = json.loads(line)
            prompts.append((entry.pop("prompt"), sampling_params(args, **entry)))
        except KeyError:
            raise ValueError(f"{args.file}, line {number}: there is no 'prompt'") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{args.file}, line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{args.file} holds no prompt: one a line, or JSONL with a 'prompt' each")
    return prompts


# ---- what is shown while it runs -----------------------------------------------------------------
class Meter:
    """Counts what steps did, from outside: tokens, time, blocks, utilisation, preemptions."""

    def __init__(self, llm: LLM):
        self.scheduler = llm.engine.scheduler
        self.started = time.monotonic()
        self.steps = self.generated = self.prompt_tokens = self.peak_blocks = 0
        self.tokens_held = self.places_held = 0  # summed over the steps

    def add(self, step: StepOutput) -> None:
        """Take one step into account."""
        allocator = self.scheduler.allocator
        self.steps += 1
        self.generated += len(step.plan.sampled)
        # The blocks of sequences that ended in this step are back already: count what was freed.
        held = sum(len(seq.block_table) for seq in self.scheduler.running)
        self.peak_blocks = max(self.peak_blocks, held + step.blocks_freed)
        self.places_held += held * allocator.block_size
        self.tokens_held += sum(seq.num_computed_tokens for seq in self.scheduler.running)

    @property
    def tokens_per_s(self) -> float:
        return self.generated / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """One line for a terminal that waits."""
        allocator, scheduler = self.scheduler.allocator, self.scheduler
        used = 1 - allocator.num_free / allocator.num_blocks
        return (
            f"step {self.steps:4}  {self.generated:6} tokens  {self.tokens_per_s:7.1f} tokens/s  "
            f"running {len(scheduler.running):3}  waiting {scheduler.num_waiting:3}  pool {used:4.0%}"
        )

    def summary(self, llm: LLM) -> str:
        """What the run came to."""
        blocks = self.scheduler.allocator.num_blocks
        seconds = time.monotonic() - self.started
        utilisation = self.tokens_held / max(self.places_held, 1)
        return (
            f"{self.generated} tokens in {seconds:.1f} s: {self.generated / seconds:.1f} tokens/s "
            f"({llm.weights}, {llm.backend}, {str(llm.model.wte.weight.dtype)[6:]})\n"
            f"peak {self.peak_blocks} of {blocks} blocks, utilisation {utilisation:.1%}, "
            f"{self.scheduler.num_preemptions} preemptions, "
            f"{self.scheduler.num_recomputed_tokens} tokens computed again"
        )


def pool_strip(llm: LLM, colour: bool, width: int = 96) -> list[str]:
    """The pool, one cell a block: whose it is, capital when full; lines of `width` cells."""
    allocator = llm.engine.scheduler.allocator
    cells = ["·"] * allocator.num_blocks
    for seq in llm.engine.scheduler.running:
        number = int(seq.request.request_id)
        letter = LETTERS[number % len(LETTERS)]
        for i, block_id in enumerate(seq.block_table):
            full = (i + 1) * allocator.block_size <= seq.num_computed_tokens
            cell = letter if full else letter.lower()
            code = COLOURS[number % len(COLOURS)]
            cells[block_id] = f"\033[{code}m{cell}\033[0m" if colour else cell
    return ["".join(cells[i : i + width]) for i in range(0, len(cells), width)]


class Screen:
    """Shows the progress on a terminal in place, elsewhere as plain lines now and then."""

    def __init__(self, llm: LLM, meter: Meter, strip: bool, stream=sys.stderr):
        self.llm, self.meter, self.strip, self.stream = llm, meter, strip, stream
        self.is_terminal = stream.isatty()
        self.lines_up = 0
        self.shown_at = -1e9

    def show(self, last: bool = False) -> None:
        """Draw the state after a step; a terminal is redrawn at most 20 times a second."""
        now = time.monotonic()
        every_s = 0.05 if self.is_terminal else 1.0
        if now - self.shown_at < every_s and not last:
            return
        self.shown_at = now
        lines = [self.meter.line()]
        if self.strip:
            lines = [f"|{line}|" for line in pool_strip(self.llm, self.is_terminal)] + lines
        if self.is_terminal:
            up = f"\033[{self.lines_up}A" if self.lines_up else ""
            self.stream.write(up + "".join(f"\r\033[K{line}\n" for line in lines))
            self.lines_up = len(lines)
        else:
            self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()


# ---- running -------------------------------------------------------------------------------------
def run_all(llm: LLM, prompts: list, screen: Screen) -> list[RequestOutput]:
    """Serve all prompts together; outputs in their order. A refused prompt stops everything."""
    engine = llm.engine
    ids = [engine.add_request(prompt, params) for prompt, params in prompts]
    outputs = {}
    while engine.has_unfinished():
        step = engine.step()
        screen.meter.add(step)
        outputs |= {output.request_id: output for output in step.outputs if output.finished}
        screen.show(last=not engine.has_unfinished())
    return [outputs[request_id] for request_id in ids]


def stream_one(llm: LLM, prompt: str | list[int], params: SamplingParams, meter: Meter) -> None:
    """Print a single text while it is written."""
    llm.engine.add_request(prompt, params)
    if isinstance(prompt, str):
        print(prompt, end="", flush=True)
    shown = 0
    while llm.engine.has_unfinished():
        step = llm.engine.step()
        meter.add(step)
        for output in step.outputs:
            text = output.outputs[0].text
            ids = output.outputs[0].token_ids
            print(text[shown:] if llm.tokenizer else f" {ids[-1]}", end="", flush=True)
            shown = len(text)
    print()


def as_json(output: RequestOutput, llm: LLM) -> str:
    """One line of JSONL for a request."""
    texts = [asdict(completion) for completion in output.outputs]
    row = {"model": llm.model_name, "weights": llm.weights, "prompt": output.prompt}
    row |= {"prompt_token_ids": output.prompt_token_ids, "outputs": texts}
    return json.dumps(row, ensure_ascii=False)


def as_text(output: RequestOutput, letter: str = "") -> str:
    """A request's texts for a reader, wrapped."""
    shown = []
    for completion in output.outputs:
        written = completion.text if completion.text else " ".join(map(str, completion.token_ids))
        whole = f"{letter}{output.prompt or ''}{written}"
        paragraphs = [textwrap.fill(line, 98) for line in whole.split("\n") if line.strip()]
        shown.append("\n".join(paragraphs))
    return "\n\n".join(shown)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, run, print."""
    args = parse_args(argv)
    try:
        prompts = read_prompts(args)
        is_demo = not prompts
        config = {f.name: getattr(args, f.name) for f in fields(EngineConfig) if f.name != "seed"}
        if is_demo:
            unsized = args.num_blocks is None and args.kv_cache_mb is None
            config |= DEMO_POOL if unsized else {}
            wanted = [{"max_tokens": n, "temperature": 0.7, "top_p": 0.95} for _, n in OPENINGS]
            prompts = [
                (opening, sampling_params(args, seed=args.seed or i, **values))
                for i, ((opening, _), values) in enumerate(zip(OPENINGS, wanted, strict=True))
            ]
        llm = LLM(args.model, device=args.device, dtype=args.dtype, backend=args.backend, **config)
        meter = Meter(llm)
        if len(prompts) == 1 and prompts[0][1].n == 1 and not args.jsonl and args.out is None:
            stream_one(llm, *prompts[0], meter)
            print(f"\n{meter.summary(llm)}", file=sys.stderr)
            return
        outputs = run_all(llm, prompts, Screen(llm, meter, strip=is_demo))
    except ValueError as error:
        raise SystemExit(f"generate.py: {error}") from None
    letters = [f"[{LETTERS[i]}] " for i in range(len(outputs))] if is_demo else [""] * len(outputs)
    texts = [as_text(output, letter) for output, letter in zip(outputs, letters, strict=True)]
    lines = [as_json(output, llm) for output in outputs] if args.jsonl else ["\n\n".join(texts)]
    if args.out is None:
        print(("" if args.jsonl else "\n") + "\n".join(lines))
    else:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{meter.summary(llm)}", file=sys.stderr)


if __name__ == "__main__":
    main()
