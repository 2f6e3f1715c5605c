"""Train the shipped model: a small GPT-2, on a folder of tales, on two CPU cores.

With nanoGPT's random initialisation, greedy decoding repeats one token whatever the KV cache holds.
Such a model cannot show a broken cache; a model that has learned to write shows it at once, to a
reader and to the tests. This repository therefore ships a trained one: 5.8 million parameters,
head_dim 64 as in every GPT-2, 1,024 trained positions, and a byte-level BPE of its own.

The model is `model.py`'s, unchanged. Training only needs another function for its socket `attend`:
the N flat rows are B windows of T tokens, and each window attends to itself. One cosine schedule
covers two phases:

    first two thirds   windows of 256 tokens, each at a random offset: all positions are trained
    last third         windows of 1,024 tokens: the model learns to look far back

Every thirtieth tale is held out: neither the model nor the tokenizer sees it in training. A
checkpoint is written every few minutes. `--resume` goes on from the last checkpoint and ends with
the same weights as a run that was never stopped, because a batch is a function of (seed, step). The
finished files move to `--out` together: a run that is stopped leaves the old model as it was.

Run: python -m checkpoints.train_tiny --text FOLDER_OF_TXT --out assets/tiny-gpt2
"""

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from block_allocator import BlockAllocator
from checkpoints.load import CONV1D, HEAD, load_model, transformers_fields, transformers_name
from checkpoints.tokenizer import load_tokenizer
from engine import InferenceEngine, eager_forward
from kv_cache import KVCache
from model import GPT, Attend, GPTConfig
from sampling import SamplingParams
from scheduler import Scheduler

CARD = Path(__file__).parents[1] / "assets" / "CARD.md"  # the model card's template
END_OF_TEXT = "<|endoftext|>"
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "‑": "-", "…": "..."})


# ---- data ----------------------------------------------------------------------------------------
def read_tales(paths: list[Path]) -> list[str]:
    """Cut text files into tales and straighten their quotes.

    A tale ends at two blank lines. A file without two blank lines is cut at its titles instead: a
    title is one short line between blank lines that does not end in punctuation. A piece of under
    200 characters is a heading and is joined to the next piece; the last heading of a file is
    dropped.
    """
    tales = []
    for path in paths:
        text = path.read_text(encoding="utf-8").translate(STRAIGHT).strip()
        pieces = text.split("\n\n\n")
        if len(pieces) == 1:
            pieces = []
            for paragraph in text.split("\n\n"):
                is_short = len(paragraph) < 60 and "\n" not in paragraph
                is_title = is_short and paragraph[-1:].isalnum()  # [-1:] works on "" too
                if is_title or not pieces:
                    pieces.append(paragraph)
                else:
                    pieces[-1] += "\n\n" + paragraph
        heading = ""
        for piece in pieces:
            heading += piece.strip() + "\n\n"
            if len(heading) >= 200:
                tales.append(heading.rstrip())
                heading = ""
    return tales


def train_tokenizer(tales: list[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Learn a byte-level BPE like GPT-2's, with `<|endoftext|>` as the last id; save its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(tales, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])  # the trainer would make it id 0
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab[END_OF_TEXT] = tokenizer.token_to_id(END_OF_TEXT)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    return tokenizer


def batch_at(stream: Tensor, step: int, seed: int, rows: int, length: int, max_seq_len: int):
    """The batch of a step, a pure function of (seed, step).

    `stream (num_tokens,)` is the whole text. Returns ids, positions and targets, each
    (rows * length,): `rows` windows of `length` tokens, end to end.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
    # A short window begins at a random position, so that all position embeddings are trained.
    offsets = torch.randint(max_seq_len - length + 1, (rows, 1), generator=generator)
    steps = torch.arange(length)
    ids, targets = stream[starts + steps], stream[starts + steps + 1]
    return ids.flatten(), (offsets + steps).flatten(), targets.flatten()


# ---- the training socket -------------------------------------------------------------------------
def attend_windows(rows: int) -> Attend:
    """The socket for training: N flat tokens are `rows` equal windows with causal attention."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (N, H, D) each
        windows = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        out = F.scaled_dot_product_attention(*windows, is_causal=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


@torch.inference_mode()
def held_out_losses(model: GPT, tales: list[str], tokenizer: Tokenizer) -> dict[str, float]:
    """The loss on whole tales: nats per character, and nats per token by position in the window.

    A tale longer than the context is read in windows that overlap by half. Each token is counted
    once, in the window where it sees more of its past. A tale starts after `<|endoftext|>`, as in
    training.
    """
    model.eval()
    size = model.config.max_seq_len
    stride = max(1, size // 2)
    overlap = size - stride  # tokens of a later window that the previous window has counted
    end = tokenizer.token_to_id(END_OF_TEXT)
    total_loss = 0.0
    num_characters = 0
    num_tokens = 0
    by_position = torch.zeros(2, size)  # row 0: sum of losses, row 1: count
    for tale in tales:
        ids = torch.tensor([end, *tokenizer.encode(tale).ids])
        for start in range(0, max(1, len(ids) - 1 - overlap), stride):
            targets = ids[start + 1 : start + size + 1]
            window = ids[start : start + len(targets)]
            hidden = model(window, torch.arange(len(window)), attend_windows(1))
            losses = F.cross_entropy(model.logits(hidden), targets, reduction="none")
            by_position[0, : len(losses)] += losses
            by_position[1, : len(losses)] += 1
            new = losses if start == 0 else losses[overlap:]
            total_loss += new.sum().item()
            num_tokens += len(new)
        num_characters += len(tale)
    near = by_position[:, :256].sum(1)  # (2,): sum of losses, count
    far = by_position[:, size // 2 :].sum(1)
    return {
        "nats_per_character": total_loss / num_characters,
        "nats_per_token": total_loss / num_tokens,
        "nats_per_token_at_0_to_255": (near[0] / near[1]).item(),
        "nats_per_token_at_512_to_1023": (far[0] / far[1]).item(),
        "characters": num_characters,
        "tales": len(tales),
    }


# ---- the loop ------------------------------------------------------------------------------------
def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 2% of the steps, then a cosine to 5%."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 to 1
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: GPT, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, biases and gains.

    Muon replaces each matrix's step by the nearest orthogonal matrix (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). After 60 steps its loss was 5.1; AdamW's was 6.0.
    """
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2]
    tables = [model.wte.weight, model.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adamw_groups = [
        {"params": tables, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95),
        torch.optim.AdamW(adamw_groups, lr=lr / 10, betas=(0.9, 0.95)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def save_state(path: Path, model: GPT, optimizers: list, step: int, loss: float) -> None:
    """Write everything that `--resume` needs. A run killed meanwhile leaves the old file whole."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    partial = path.with_suffix(".partial")
    torch.save({**state, "step": step, "loss": loss, "rng": torch.get_rng_state()}, partial)
    partial.replace(path)


def load_state(path: Path, model: GPT, optimizers: list) -> tuple[int, float]:
    """Read what `save_state` wrote; return the next step and the running mean of the loss."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(saved["rng"])  # for dropout; batches depend on (seed, step) only
    return saved["step"], saved["loss"]


def train(model: GPT, stream: Tensor, args: argparse.Namespace, checkpoint: Path) -> float:
    """Train up to step `args.steps` or `args.stop_after`; return the training loss.

    The loss is a running mean, in nats per token. The state after the last step is always saved.
    """
    optimizers = make_optimizers(model, args.lr, args.weight_decay)
    first = 0
    loss_mean = math.log(model.config.vocab_size)  # the loss of a model that knows nothing
    if args.resume and checkpoint.exists():
        first, loss_mean = load_state(checkpoint, model, optimizers)
    model.train()
    saved_at = time.monotonic()
    last = args.steps if args.stop_after is None else min(args.steps, args.stop_after)
    bar = tqdm(range(first, last), initial=first, total=args.steps, unit="step")
    for step in bar:
        is_short = step < args.steps * 2 // 3 or args.no_long
        length = args.short_length if is_short else model.config.max_seq_len
        rows = args.tokens_per_step // length
        batch = batch_at(stream, step, args.seed, rows, length, model.config.max_seq_len)
        ids, positions, targets = batch
        logits = model.logits(model(ids, positions, attend_windows(rows)))
        loss = F.cross_entropy(logits, targets)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, args.steps)
            optimizer.step()
        loss_mean = 0.98 * loss_mean + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {loss_mean:.3f}, T {length}", refresh=False)
        if time.monotonic() - saved_at > args.save_every_s or step + 1 == last:
            save_state(checkpoint, model, optimizers, step + 1, loss_mean)
            saved_at = time.monotonic()
    return loss_mean


# ---- the model's files ---------------------------------------------------------------------------
def save_model(model: GPT, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` as transformers does, weights in `dtype`."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue  # safetensors refuses one tensor under two names
        tensor = tensor.detach().to(dtype)
        turned = tensor.t() if name.endswith(CONV1D) else tensor
        tensors[transformers_name(name)] = turned.contiguous()
    fields = transformers_fields(model.config) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "bos_token_id": model.config.eos_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(fields, indent=2) + "\n"
        (Path(name) / "config.json").write_text(text, encoding="utf-8")
        move_together(Path(name), folder)


def move_together(source: Path, folder: Path) -> None:
    """Move all files of a new model into a folder, whose other files stay.

    The old weights go first and the new ones come last. A run that is stopped in between leaves a
    folder without weights, which is refused. It leaves no tokenizer beside another model's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    arrived = {  # from another disk this takes a while, so the old files stay
        folder / file.name: Path(shutil.move(file, folder / f".{file.name}.new"))
        for file in source.iterdir()
    }
    weights.unlink(missing_ok=True)
    for path in sorted(arrived, key=lambda path: path == weights):
        arrived[path].replace(path)


# ---- the model card ------------------------------------------------------------------------------
def write_samples(folder: Path, held_out: list[str]) -> list[str]:
    """Let the saved model continue five held-out tales; return Markdown quotes."""
    model = load_model(folder)  # from the file: float16 rounds the weights
    tokenizer = load_tokenizer(folder)
    config = model.config
    # A tale's first paragraph is its title. The prompt is what follows the title: twelve tokens.
    bodies = [tale.split("\n\n", 1)[-1] for tale in held_out[:5]]
    prompts = [tokenizer.decode(tokenizer.encode(body)[:12]) for body in bodies]
    num_blocks = len(prompts) * -(-config.max_seq_len // 16)  # room for all: none is preempted
    cache = KVCache(config.n_layer, num_blocks, 16, config.n_head, config.head_dim)
    scheduler = Scheduler(BlockAllocator(num_blocks, 16), 5, 2048, config.max_seq_len)
    engine = InferenceEngine(
        eager_forward(model, cache),
        cache,
        scheduler,
        config.vocab_size,
        tokenizer,
        [config.eos_token_id],
    )
    length = min(150, config.max_seq_len - 24)
    common = {"temperature": 0.8, "top_p": 0.95, "max_tokens": length, "min_tokens": length}
    for seed, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(**common, seed=seed))
    texts = {}
    while engine.has_unfinished():
        finished = engine.step().finished
        texts |= {int(output.request_id): output.outputs[0].text for output in finished}
    # Each sample on one line, because Markdown drops single line breaks.
    lines = [re.sub(r"\s+", " ", texts[index]) for index in range(len(prompts))]
    return [f"> **{prompt}**{line}" for prompt, line in zip(prompts, lines, strict=True)]


def write_model_card(folder: Path, settings: dict, report: dict, samples: list[str]) -> None:
    """Write README.md into the model's folder: numbers, data, and five unselected samples."""
    facts = settings | report | {"files": len(settings["files"])}
    card = CARD.read_text(encoding="utf-8").format(**facts, samples="\n\n".join(samples))
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---- the program ---------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. The defaults made the shipped model; its card names the exceptions."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="a folder of .txt files, or one file")
    add("--skip", nargs="*", default=["tinyshakespeare.txt"], help="names of files to leave out")
    add("--out", type=Path, default=Path("assets/tiny-gpt2"), help="folder of the finished model")
    add("--notes", type=Path, default=Path("assets/NOTES.md"), help="about the texts, for the card")
    add("--work", type=Path, default=Path("train_tiny_work"), help="folder of the checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--steps", type=int, default=2200, help="length of the schedule")
    add("--stop-after", type=int, help="end after this many steps, and write the model")
    add("--tokens-per-step", type=int, default=4096)
    add("--short-length", type=int, default=256, help="tokens of a window in the first two thirds")
    add("--no-long", action="store_true", help="keep short windows to the end")
    add("--max-seq-len", type=int, default=1024)
    add("--vocab-size", type=int, default=3072)
    add("--n-layer", type=int, default=6)
    add("--n-head", type=int, default=4, help="heads of 64")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=0.015, help="peak for matrices; a tenth of it for the rest")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--save-every-s", type=float, default=300.0, help="seconds between checkpoints")
    return parser.parse_args(argv)


def split_tales(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Read `--text`: the tales to train on, the held-out tales, and the names of the files."""
    files = [args.text] if args.text.is_file() else sorted(args.text.glob("*.txt"))
    files = [file for file in files if file.name not in args.skip]
    if not files:
        raise SystemExit(f"no .txt file in {args.text}: name a folder that has some")
    tales = read_tales(files)
    if len(tales) < 30:
        found = f"{len(tales)} tales in {args.text}"
        raise SystemExit(f"{found}: 30 are needed, so that one is held out")
    training = [tale for i, tale in enumerate(tales) if i % 30 != 29]
    return training, tales[29::30], [file.name for file in files]


def check_window(args: argparse.Namespace, num_tokens: int) -> None:
    """End the program now if a window of the last phase would not fit."""
    longest = max(args.short_length, 0 if args.no_long else args.max_seq_len)
    limits = (args.tokens_per_step, args.max_seq_len, num_tokens - 1)
    if longest > min(limits):
        have = f"--tokens-per-step, --max-seq-len and the text's tokens are {limits}"
        raise SystemExit(f"{have}: too few for a window of {longest}, make it shorter")


def main(argv: list[str] | None = None) -> None:
    """Read, train, save, and print the loss on the held-out tales."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    training, held_out, names = split_tales(args)
    model_folder = args.work / "model"  # the finished model moves to --out, all files together
    shutil.rmtree(model_folder, ignore_errors=True)
    tokenizer = train_tokenizer(training, args.vocab_size, model_folder)
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(training)
    stream = torch.tensor([end] + [i for tale in encoded for i in (*tale.ids, end)])
    characters = sum(map(len, training))
    print(f"{len(training)} tales, {characters:,} characters, {len(stream):,} tokens to learn from")
    check_window(args, len(stream))
    config = GPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=args.max_seq_len,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=64 * args.n_head,
        dropout=args.dropout,
        eos_token_id=end,
    )
    model = GPT(config).init_weights(seed=args.seed)
    num_tokens = args.steps * args.tokens_per_step
    print(f"{model.num_parameters():,} parameters, {num_tokens:,} tokens to train on")
    loss = train(model, stream, args, args.work / "checkpoint.pt")
    save_model(model, model_folder, torch.float16)
    report = {"training_loss_nats_per_token": loss, **held_out_losses(model, held_out, tokenizer)}
    for name, value in report.items():
        print(f"{name:32} {value:,.4f}" if isinstance(value, float) else f"{name:32} {value:,}")
    # File names are recorded, because they say what the model was trained on. Folders are not.
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    settings |= {"files": names, "characters_seen": characters}
    text = json.dumps({**settings, **report}, indent=1) + "\n"
    (model_folder / "training.json").write_text(text, encoding="utf-8")
    settings["notes"] = args.notes.read_text(encoding="utf-8") if args.notes.is_file() else ""
    report |= {"parameters": model.num_parameters(), "vocab_size": config.vocab_size}
    write_model_card(model_folder, settings, report, write_samples(model_folder, held_out))
    move_together(model_folder, args.out)


if __name__ == "__main__":
    main()
