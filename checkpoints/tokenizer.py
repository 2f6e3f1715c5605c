"""Text to ids and back, and back again one token at a time without breaking a character.

GPT-2's tokens are runs of bytes, not of letters: 256 single bytes, then 50,000 merges of two tokens
that stood side by side most often in the training text. So any text can be written, and so 344 of
its 50,256 tokens hold pieces of characters. A cat emoji takes three of them, and whoever decodes
each token as it comes shows three U+FFFD marks where the cat should be.

    tokens          |F0 9F|  |90|  |88|  |ST|  |EP|  |ST|  |OP|    with stop=["STOP"]
    each alone         ?      ?     ?     ST    EP    ST    OP
    StreamDecoder      -      -    cat    -    STEP   -     -
                       └ no whole character yet       └ may become "STOP", and then does

A stream cannot take back what it has sent. Text is therefore sent when no later token can change
it: its character is whole, and it cannot be the beginning of a stop string.
What a production engine does beyond this: vocabularies of other families (where a token's text
depends on its neighbours), and decoding in another process than the one that feeds the GPU.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
arXiv:1508.07909, section 3.2 (the merges); Radford et al. 2019 (GPT-2), section 2.2 (on bytes).
Run: python -m checkpoints.tokenizer
Try: take the merge of S and T out of the demo's list and see what is held back then; or let
`_search` hold nothing back (`keep = len(window)`), and watch "STOP" walk through in two halves.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's rule for cutting a text into words

from checkpoints.vocabulary import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    AddedToken,
    Vocabulary,
    read_vocab_and_merges,
    read_vocabulary,
)
from outputs import StreamDecoder

# Where tiktoken fetches GPT-2's files, and the SHA-256 of what it must find there.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class BPETokenizer:
    """A GPT-2 vocabulary: bytes that may be merged, and tokens that are matched whole."""

    def __init__(self, vocabulary: Vocabulary):
        """The merging is tiktoken's; added tokens are cut out of the text before."""
        ranks, added, eos_token = vocabulary
        self._num_ordinary = len(ranks)
        self._added = {token.content: token.token_id for token in added}
        self._encoding = tiktoken.Encoding(
            "gpt2-from-files",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens=self._added,
        )
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
        """Highest id + 1. A model's table may have more rows, padded to a multiple of 64 or 128."""
        return self._encoding.max_token_value + 1

    @property
    def num_ordinary(self) -> int:
        """How many tokens are bytes or merges; the others were added, some perhaps to no model."""
        return self._num_ordinary

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text; None for a vocabulary without one."""
        return self._eos_token_id

    def encode(self, text: str) -> list[int]:
        """Text to ids. As in Hugging Face, "<|endoftext|>" in a text is the token, not its letters.

        Raises ValueError for half of a surrogate pair (JSON can carry one, UTF-8 cannot).
        """
        try:
            text.encode("utf-8")  # tiktoken would silently write U+FFFD in its place
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            where = f"character {error.start} of the text is {half}, half of a surrogate pair"
            raise ValueError(f"{where}: send whole characters") from None
        return self._encode(text, self._rounds)

    def _encode(self, text: str, rounds: list[re.Pattern]) -> list[int]:
        """Cut out the added tokens that these rounds look for, then merge what stands between.

        From left to right, and of those that begin at the same place the longest, where tiktoken's
        own search takes any of them. A later round sees only what the earlier ones have left over.
        """
        if not rounds:
            return self._encoding.encode_ordinary(text)
        ids = []
        for number, part in enumerate(rounds[0].split(text)):  # text, token, text, token, text
            ids += [self._added[part]] if number % 2 else self._encode(part, rounds[1:])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: special and unknown ids leave none, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text: b"" for a special or unknown id."""
        # Both ends are compared: -1 would quietly be the last token, a padding row has no entry.
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """How one token looks alone, in a table or beside its log-probability; not for streams."""
        name = self._special.get(token_id)
        return name if name is not None else self.decode([token_id])


def one_of(contents: list[str]) -> re.Pattern:
    """A pattern whose `split` keeps what it finds: any of these texts, the longest first."""
    longest_first = sorted(contents, key=len, reverse=True)  # `|` takes the first that fits
    # (?!) fits nowhere: an empty list of alternatives would fit everywhere.
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# --------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> BPETokenizer | None:
    """The tokenizer of a model's folder, from the files that `checkpoints/vocabulary.py` reads.

    Returns None for a folder without (a model can run on ids alone). Raises ValueError, naming the
    file, when one of them is missing or damaged, or asks for what would give other ids.
    """
    vocabulary = read_vocabulary(folder)
    return None if vocabulary is None else BPETokenizer(vocabulary)


def gpt2_tokenizer() -> BPETokenizer | None:
    """GPT-2's own, from the files that tiktoken has fetched before; None where it has not.

    Asked for "gpt2", tiktoken fetches what it does not have, and deletes what is damaged to fetch
    it again. Here nothing is fetched and nothing deleted. Raises ValueError for a damaged file.
    """
    default = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    paths = [
        Path(cache) / hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES
    ]
    if not cache or not all(path.is_file() for path in paths):  # "" tells tiktoken to keep nothing
        return None
    for path, (name, sha256) in zip(paths, GPT2_FILES.items(), strict=True):
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is not GPT-2's whole {name}: delete it")
    vocab, ranks = read_vocab_and_merges(*paths)
    end = AddedToken(END_OF_TEXT, vocab[END_OF_TEXT], special=True, normalized=False)
    return BPETokenizer(Vocabulary(ranks, (end,), END_OF_TEXT))


def save_vocabulary(folder: Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Write both files for a vocabulary made by hand: 256 bytes, the merges, <|endoftext|> last."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [["".join(BYTE_TO_CHAR[byte] for byte in part) for part in merge] for merge in merges]
    tokens = [*BYTE_TO_CHAR.values(), *("".join(pair) for pair in pairs), END_OF_TEXT]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
def demo():
    """A tiny vocabulary, one text, three ways to show its tokens as they come."""
    merges = [(b" ", b"\xf0"), (b" \xf0", b"\x9f"), (b"\xe7", b"\x8c")]  # as GPT-2 cuts 🐈 and 猫
    merges += [(b"S", b"T"), (b"O", b"P"), (b"E", b"P")]
    with tempfile.TemporaryDirectory() as name:
        save_vocabulary(Path(name), merges)
        tokenizer = load_tokenizer(name)
    text = "猫 🐈 STEP STOP!"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    print(f"{text!r}: {len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens\n")

    whole, stopping = StreamDecoder(tokenizer), StreamDecoder(tokenizer, stop=["STOP"])
    naive = ""
    print("  id  bytes     alone             StreamDecoder   with stop=['STOP']")
    for token_id in ids:
        alone = tokenizer.token_text(token_id)
        naive += tokenizer.decode([token_id])
        raw = tokenizer.token_bytes(token_id).hex(" ")
        row = f"{token_id:4}  {raw:8}  {alone!r:17} {whole.push(token_id)!r:15}"
        print(row, repr(stopping.push(token_id)))
    rest, stopping_rest = whole.finish(), stopping.finish()
    print(f"\neach alone    {naive!r}")
    print(f"stream        {whole.text!r}")
    print(f"with stop     {stopping.text!r}, stopped by {stopping.stopped!r}")
    assert (rest, stopping_rest) == ("", "") and tokenizer.decode(ids) == whole.text == text
    assert naive.count("\ufffd") == 5 and stopping.text == "猫 🐈 STEP "
    print("ok: the stream is the text, each character whole, and the stop string never got out")


if __name__ == "__main__":
    demo()
