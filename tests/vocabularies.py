"""A small vocabulary as files, for tests that need a tokenizer."""

import json
from pathlib import Path

from checkpoints.tokenizer import BYTE_TO_CHAR, END_OF_TEXT


def save_vocabulary(folder: Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Write `vocab.json` and `merges.txt`: 256 bytes, these merges, and <|endoftext|> last."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [["".join(BYTE_TO_CHAR[byte] for byte in part) for part in merge] for merge in merges]
    tokens = [*BYTE_TO_CHAR.values(), *("".join(pair) for pair in pairs), END_OF_TEXT]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
