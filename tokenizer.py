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
Run: python tokenizer.py
Try: take the merge of S and T out of the demo's list and see what is held back then; or let
`_search` hold nothing back (`keep = len(window)`), and watch "STOP" walk through in two halves.
"""

import codecs
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's rule for cutting a text into words

END_OF_TEXT = "<|endoftext|>"


def byte_to_char() -> dict[int, str]:
    """The printable character that stands for each byte in the files: " " is written "Ġ".

    Printable bytes stand for themselves; the other 68, which would be lost or invisible in a text
    file, take the characters from 256 on. From `bytes_to_unicode` of github.com/openai/gpt-2.
    """
    # ! to ~, ¡ to ¬, ® to ÿ: left out are the blanks and U+00AD, a hyphen that is seldom shown.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]  # 32 is others[32] -> chr(288)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Tokenizer:
    """A GPT-2 vocabulary: bytes that may be merged, and special tokens that are no text."""

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]):
        """`ranks` maps a token's bytes to its id, where the lower id is merged first."""
        self._encoding = tiktoken.Encoding(
            "gpt2-from-files", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )
        self._special = {token_id: name for name, token_id in special.items()}
        self._bytes = [b""] * self.vocab_size
        for token, token_id in ranks.items():
            self._bytes[token_id] = token

    @property
    def vocab_size(self) -> int:
        """Highest id + 1. A model's table may have more rows, padded to a multiple of 64 or 128."""
        return self._encoding.max_token_value + 1

    @property
    def eos_token_id(self) -> int | None:
        """The id of <|endoftext|>; None for a vocabulary without it."""
        return next((i for i, name in self._special.items() if name == END_OF_TEXT), None)

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
        return self._encoding.encode(text, allowed_special="all")

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


class StreamDecoder:
    """Turns one sequence's tokens into text as they come, and looks for stop strings.

    `push` each id, then `finish` once. A character is sent by the token that completes it (a code
    point: an accent may still follow its letter). Nothing is sent that may be the start of one of
    the `stop` strings; after a match the text ends before it and all later pushes return "". The
    earliest match wins, and of two at the same place the one listed first. A match has to end
    after the text of the first `min_tokens` tokens, though it may begin inside it, as in vLLM.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)  # "END" is not E, N and D
        if "" in self._stop:
            raise ValueError("a stop string is empty, which every text contains: leave it out")
        self._longest = max(map(len, self._stop), default=0)  # characters
        self._min_tokens = min_tokens
        self._num_tokens = 0
        # Keeps the bytes of an unfinished character, up to 3, and gives U+FFFD where none can come.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole characters that may begin a stop string: fewer than the longest has
        self._sent: list[str] = []  # joined on demand: adding to one string would copy it each time
        self._stopped: str | None = None

    @property
    def text(self) -> str:
        """All text sent so far; after `finish` the whole text, or what stands before the stop."""
        if len(self._sent) > 1:
            self._sent = ["".join(self._sent)]  # asked for after every token: join only once
        return self._sent[0] if self._sent else ""

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Take one token, return the text that has become final with it, often ""."""
        self._num_tokens += 1
        return self._advance(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """No token will follow: return what was held back, an unfinished character as U+FFFD."""
        last = self._advance(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return last + self._send(held)

    def _advance(self, new: str) -> str:
        if self._stopped is not None:
            return ""
        # All text before `_held` is known to begin no stop string, so the window is short whatever
        # the length of the text: fewer characters than the longest stop string, plus the new ones.
        window = self._held + new
        found = self._find_stops(window) if self._num_tokens > self._min_tokens else []
        if found:
            at, order = min(found)  # the earliest; at the same place, the one listed first
            self._stopped, self._held = self._stop[order], ""
            return self._send(window[:at])
        keep = self._first_possible_start(window)
        self._held = window[keep:]
        return self._send(window[:keep])

    def _find_stops(self, window: str) -> list[tuple[int, int]]:
        """(place, order in the list) of each stop string that ends in the window's new text."""
        found = []
        for order, stop in enumerate(self._stop):
            # What ends within the held text came too early to count: `min_tokens`.
            at = window.find(stop, max(0, len(self._held) - len(stop) + 1))
            if at >= 0:
                found.append((at, order))
        return found

    def _first_possible_start(self, window: str) -> int:
        """Where a stop string may have begun that later text completes; len(window) if nowhere.

        Example: with the stop string "STOP", "a BUST" -> 4 and "a BUSTLE" -> 8.
        """
        # A stop string of 4 characters that is not complete has shown at most its first 3.
        for start in range(max(0, len(window) - self._longest + 1), len(window)):
            if any(stop.startswith(window[start:]) for stop in self._stop):
                return start
        return len(window)

    def _send(self, text: str) -> str:
        if text:
            self._sent.append(text)
        return text


# --------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Read `vocab.json` and `merges.txt`, as Hugging Face writes them for GPT-2.

    Returns None for a folder with neither (a model can run on ids alone). Raises ValueError, naming
    the file, when one of them is missing or damaged, or when the two do not belong together.
    """
    vocab_path, merges_path = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    missing = [path for path in (vocab_path, merges_path) if not path.exists()]
    if len(missing) == 2:
        return None
    if missing:
        raise ValueError(f"{missing[0]} is missing: a tokenizer is vocab.json and merges.txt")
    vocab = read_vocab(vocab_path)
    ranks = read_ranks(merges_path, vocab)
    made = set(ranks.values()) | {vocab.get(END_OF_TEXT)}
    strangers = [token for token, token_id in vocab.items() if token_id not in made]
    if strangers:
        what = f"{len(strangers)} tokens are neither bytes nor made by {merges_path.name}"
        raise ValueError(f"{vocab_path}: {what}, the first is {strangers[0]!r}")
    return Tokenizer(ranks, {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {})


def read_text(path: Path) -> str:
    """A file's text; Windows line ends become plain ones. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_vocab(path: Path) -> dict[str, int]:
    """`vocab.json`: each token, written in `byte_to_char`'s characters, and its id."""
    text = read_text(path)
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError(f"{path} is not one object of tokens and their ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of its {len(vocab)} tokens are not 0, 1, 2 and so on")
    for byte, char in BYTE_TO_CHAR.items():
        if char not in vocab:
            raise ValueError(f"{path}: no token for the byte 0x{byte:02X}, written {char!r}")
    return vocab


def read_ranks(path: Path, vocab: dict[str, int]) -> dict[bytes, int]:
    """`merges.txt`: one merge of two tokens a line, in the order in which they were learnt.

    Hugging Face merges the listed pair that stands highest in this file; tiktoken merges the two
    neighbours whose joined bytes have the lowest id. That is the same when each merge joins tokens
    that exist by then and its own id is higher than all before, as training leaves them.
    """
    made = {char: vocab[char] for char in CHAR_TO_BYTE}
    newest = -1
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):  # "# #" is a merge
            continue
        where = f"{path}, line {number}: {line[:40]!r}"
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{where} is not two tokens with one space between them")
        if not (pair[0] in made and pair[1] in made):
            raise ValueError(f"{where} joins a token that is neither a byte nor made further up")
        token_id = vocab.get("".join(pair))
        if token_id is None:
            raise ValueError(f"{where} makes a token that vocab.json does not have")
        if token_id <= newest:
            raise ValueError(f"{where} makes id {token_id} after id {newest}: ids have to rise")
        made["".join(pair)] = newest = token_id
    return {bytes(map(CHAR_TO_BYTE.get, token)): token_id for token, token_id in made.items()}


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
