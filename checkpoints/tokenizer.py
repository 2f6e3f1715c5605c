"""Turn a text into token ids and back, with GPT-2's byte-level BPE.

GPT-2's tokens are runs of bytes, not of letters. There are 256 single bytes and 50,000 merges; a
merge joins two tokens that stood side by side most often in the training text. Any text can
therefore be written in tokens, but 344 of the 50,256 tokens hold a part of a character. The emoji
🐈, for example, takes three tokens:

    text         " 🐈"
    bytes        20 F0 9F 90 88
    tokens       |20 F0 9F|  |90|  |88|      each alone is no valid UTF-8: it decodes to U+FFFD

So tokens are joined as bytes first and decoded as UTF-8 afterwards. `outputs.py` does the same for
a stream of tokens. Added tokens such as `<|endoftext|>` are cut out of the text before it is
merged. The merging itself is done by tiktoken; the tests compare the ids with Hugging Face's.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
arXiv:1508.07909, section 3.2 (the merges); Radford et al. 2019 (GPT-2), section 2.2 (on bytes).
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts a text into words

from checkpoints.vocabulary import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    AddedToken,
    Vocabulary,
    read_vocab_and_merges,
    read_vocabulary,
)

# Where tiktoken fetches GPT-2's two files from, and the SHA-256 of each.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class BPETokenizer:
    """GPT-2's tokenizer: bytes that are merged, and added tokens that are matched whole."""

    def __init__(self, vocabulary: Vocabulary):
        """Prepare tiktoken's merging and the search for added tokens."""
        ranks, added, eos_token = vocabulary
        self._num_ordinary = len(ranks)
        self._added = {token.content: token.token_id for token in added}
        self._encoding = tiktoken.Encoding(
            "gpt2-from-files",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens=self._added,
        )
        # Hugging Face searches twice: first for added tokens that are not "normalized", then, in
        # the text between them, for the others.
        self._rounds = [
            one_of([token.content for token in added if token.normalized == normalized])
            for normalized in (False, True)
        ]
        self._special = {token.token_id: token.content for token in added if token.special}
        self._bytes = [b""] * self.vocab_size
        for token, token_id in ranks.items():
            self._bytes[token_id] = token
        for content, token_id, special, _ in added:
            self._bytes[token_id] = b"" if special else content.encode()
        self._eos_token_id = self._added.get(eos_token)

    @property
    def vocab_size(self) -> int:
        """The highest id + 1. A model's table may have more rows: it may be padded to 64 or 128."""
        return self._encoding.max_token_value + 1

    @property
    def num_ordinary(self) -> int:
        """How many tokens are bytes or merges. The others are added tokens."""
        return self._num_ordinary

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text; None for a vocabulary without one."""
        return self._eos_token_id

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids. As in Hugging Face, "<|endoftext|>" in a text becomes that token.

        Raises ValueError for half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        """
        try:
            text.encode("utf-8")  # tiktoken would replace the half by U+FFFD without an error
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            problem = f"character {error.start} of the text is {half}, half of a surrogate pair"
            raise ValueError(f"{problem}: send whole characters") from None
        return self._encode(text, self._rounds)

    def _encode(self, text: str, rounds: list[re.Pattern]) -> list[int]:
        """Cut out the added tokens of the first round; encode the text between by the next rounds.

        After the last round the text is merged. The search goes from left to right. Of the tokens
        that begin at one place it takes the longest; tiktoken's own search would take any of them.
        """
        if not rounds:
            return self._encoding.encode_ordinary(text)
        ids = []
        for index, part in enumerate(rounds[0].split(text)):  # text, token, text, token, text
            if index % 2:
                ids.append(self._added[part])
            else:
                ids += self._encode(part, rounds[1:])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text. Special and unknown ids give no text, broken UTF-8 gives U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text: b"" for a special or unknown id."""
        # Without `0 <=`, id -1 would be the last token. Ids of padding rows lie above the list.
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """One token as a text, for a table or a log-probability. A stream needs `outputs.py`."""
        name = self._special.get(token_id)
        return name if name is not None else self.decode([token_id])


def one_of(contents: list[str]) -> re.Pattern:
    """A pattern that matches any of these texts, the longest first; its `split` keeps them."""
    longest_first = sorted(contents, key=len, reverse=True)  # `|` takes the first that matches
    # An empty list of alternatives would match everywhere; (?!) matches nowhere.
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# --------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> BPETokenizer | None:
    """Load the tokenizer of a model's folder, from the files that `vocabulary.py` reads.

    Returns None if the folder has none: a model also runs on ids alone. Raises ValueError, naming
    the file, if one is missing or damaged, or asks for something that would give other ids.
    """
    vocabulary = read_vocabulary(folder)
    return None if vocabulary is None else BPETokenizer(vocabulary)


def gpt2_tokenizer() -> BPETokenizer | None:
    """GPT-2's own tokenizer, if tiktoken has fetched its files before; None if it has not.

    tiktoken itself would fetch missing files, and delete damaged ones. This function fetches and
    deletes nothing. Raises ValueError for a damaged file.
    """
    default = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    paths = [
        Path(cache) / hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES
    ]
    if not cache or not all(path.is_file() for path in paths):  # "" means: no cache
        return None
    for path, (name, sha256) in zip(paths, GPT2_FILES.items(), strict=True):
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is not GPT-2's whole {name}: delete it")
    vocab, ranks = read_vocab_and_merges(*paths)
    end = AddedToken(END_OF_TEXT, vocab[END_OF_TEXT], special=True, normalized=False)
    return BPETokenizer(Vocabulary(ranks, (end,), END_OF_TEXT))


def save_vocabulary(folder: Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Write `vocab.json` and `merges.txt`: 256 bytes, these merges, and <|endoftext|> last."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [["".join(BYTE_TO_CHAR[byte] for byte in part) for part in merge] for merge in merges]
    tokens = [*BYTE_TO_CHAR.values(), *("".join(pair) for pair in pairs), END_OF_TEXT]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
