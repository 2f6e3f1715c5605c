"""Turn a text into token ids and back, as the files of a model's folder say.

GPT-2's tokens are runs of bytes, not of letters: 256 single bytes and 50,000 merges, each of which
joins two tokens that stood side by side most often in the training text. Any text can be written in
them, but 344 of the 50,256 hold only a part of a character. A cat emoji takes three tokens:

    text         " 🐈"
    bytes        20 F0 9F 90 88
    tokens       |20 F0 9F|  |90|  |88|      each alone is no valid UTF-8: it decodes to U+FFFD

So tokens are joined as bytes first and decoded as UTF-8 afterwards, in `outputs.py` too. What
stands in `tokenizer.json`, or in `vocab.json` and `merges.txt`, is read by the library
`tokenizers`, and the ids are those of transformers' AutoTokenizer. Where two such files hold
nothing but bytes and merges, tiktoken encodes: the same ids in a fifth of the time. A folder of
another family is `Unreadable`. A model of GPT-2's vocabulary in a folder without any gets GPT-2's
own, from the files that tiktoken has fetched.

Sennrich et al. 2016, arXiv:1508.07909, section 3.2 (merges); Radford et al. 2019, section 2.2.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.hub import OTHER_TOKENIZERS
from checkpoints.untrusted import Unreadable, call, read_json, read_text, shown

if TYPE_CHECKING:  # imported where they are needed
    from tiktoken import Encoding
    from tokenizers import AddedToken, Tokenizer

END_OF_TEXT = "<|endoftext|>"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
PLAIN_CLASSES = (*GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")
ADVICE = "transformers' AutoTokenizer may read it, and saves it as tokenizer.json"

# What the library compiles takes up to 340 bytes of memory a character. Real files have a third.
MOST_CHARS = 4_000_000
MOST_TEXT_CHARS = 10_000  # of one text
MOST_BLANKS = 900_000  # in a row; tiktoken's regular expression fails at 999,999
NOT_COMPILED = {"precompiled_charsmap", "chat_template", "merges"}  # long texts; pairs of tokens
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
LACKING = "\0no-such-token"  # the library looks for it where a vocabulary lacks a character

# GPT-2's vocabulary and merges in tiktoken's cache: the name of each file, and its SHA-1.
GPT2_FILES = {
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "f0223209235343bc067d7da838328bced8085ae1",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "396d4d8ec90cb02f4d56e049e0e4add868bcd943",
}

# In the files a character stands for each byte: " " is written "Ġ". Printable bytes stand for
# themselves: ! to ~, ¡ to ¬, ® to ÿ. The 68 others take the characters from 256 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]  # 32 is OTHERS[32] -> chr(288)
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


# ---- text to ids and back ------------------------------------------------------------------------
class FileTokenizer:
    """A tokenizer of the library `tokenizers`, of any kind. An id without a token gives no text."""

    def __init__(self, tokenizer: "Tokenizer", eos_token_id: int | None, pairs: list = ()):
        """Raises `Unreadable` if the text of a token depends on the one after it."""
        self._encoding = plain_encoding(tokenizer, pairs) if pairs else None
        tokenizer.no_truncation()  # both are the caller's business
        tokenizer.no_padding()
        if hasattr(model := tokenizer.model, "dropout"):  # BPE
            model.dropout = None  # merges are left out at random in training only
            model.unk_token = model.unk_token or LACKING  # else what it lacks is left out silently
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id  # the token that ends a text
        self._added = tokenizer.get_added_tokens_decoder()
        # The special tokens, which leave no text.
        self.names = {i: token.content for i, token in self._added.items() if token.special}
        ids = set(tokenizer.get_vocab().values())
        ordinary = sorted(ids - self._added.keys())
        self.vocab_size = max(ids, default=-1) + 1  # a model's table may be padded to more rows
        self.num_ordinary = len(ordinary)  # tokens that were not added
        self.token_bytes = functools.cache(self.token_bytes)  # a method's results, by id
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
        self._is_byte_level = kinds == ["ByteLevel"]
        # Some vocabularies have a token <0xE7> for each byte of the characters that they lack.
        self._byte_token = re.compile("<0x[0-9A-F]{2}>" if "ByteFallback" in kinds else "(?!)")
        if not self._is_byte_level:
            # A token's text is what it adds after another one: after this one, an "a" for example.
            words = (i for i in ordinary if tokenizer.decode([i]).isalnum())
            self._before = next(words, ordinary[0] if ordinary else 0)
            sample = [i for i in ordinary if not self._byte_token.match(tokenizer.id_to_token(i))]
            sample = [self._before, *sample[:: len(sample) // 200 + 1]]
            pieces = "".join(self.token_bytes(i).decode() for i in sample)
            whole = tokenizer.decode([self._before, *sample])
            if "ByteLevel" in kinds or whole != tokenizer.decode([self._before]) + pieces:
                raise Unreadable(f"its decoder ({', '.join(map(str, kinds))}) is not served")

    def __reduce__(self):
        """How it is sent to another process, where it is made anew. There the library encodes."""
        return FileTokenizer, (self._tokenizer, self.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, "<|endoftext|>" in it too. Raises ValueError if it cannot."""
        problem = "the text cannot be written in tokens"
        call(problem, text.encode)  # JSON can hold half of a surrogate pair, UTF-8 cannot
        if self._encoding is not None:
            if re.search(rf"(?<!\s)\s{{{MOST_BLANKS}}}", text):
                raise ValueError(f"{problem}: {MOST_BLANKS:,} blanks or more in a row")
            return call(problem, self._encoding.encode, text, allowed_special="all")
        try:
            return call(problem, self._tokenizer.encode, text).ids
        except ValueError as error:
            if LACKING[1:] not in str(error):
                raise
            for char in dict.fromkeys(text) if len(text) > 1 else ():
                self.encode(char)  # raises for the one that is lacking
            raise ValueError(f"{problem}: the vocabulary has none for {shown(text)}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; broken UTF-8 gives U+FFFD. A first word has no blank before it."""
        if self._is_byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size])

    def token_text(self, token_id: int) -> str:
        """One token as a text, for a table or a log-probability. A stream needs `outputs.py`."""
        return self.names.get(token_id) or self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text that has begun: b"" for special, unknown ids."""
        is_known = 0 <= token_id < self.vocab_size and token_id not in self.names
        token = self._tokenizer.id_to_token(token_id) if is_known else None
        if token is None:
            return b""
        if self._byte_token.fullmatch(token):
            return bytes.fromhex(token[3:5])
        if not self._is_byte_level:
            start = len(self._tokenizer.decode([self._before]))
            return self._tokenizer.decode([self._before, token_id])[start:].encode()
        # An added token is its own text. (The library would take the letters of "für" for bytes.)
        is_added = token_id in self._added and self._tokenizer.model.token_to_id(token) is None
        if is_added or not CHAR_TO_BYTE.keys() >= set(token):
            return token.encode()
        return bytes(map(CHAR_TO_BYTE.__getitem__, token))


# ---- a folder's files ----------------------------------------------------------------------------
def load_tokenizer(folder: str | Path) -> FileTokenizer | None:
    """Load the tokenizer of a model's folder; None if it has none.

    Raises `Unreadable` for another family's files, and ValueError, naming the file or the folder,
    for those that are damaged or too large.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    config = read_optional(folder / "tokenizer_config.json")
    of_model = read_optional(folder / "config.json")
    kind = config.get("tokenizer_class") or of_model.get("tokenizer_class")
    others = [file.name for pattern in OTHER_TOKENIZERS for file in folder.glob(pattern)]
    pairs = []
    if path.exists():
        tokenizer = read_whole(path, config, kind)
    elif kind in PLAIN_CLASSES and (vocab.exists() or merges.exists()):
        if asked := [name for name in ("add_bos_token", "add_eos_token") if config.get(name)]:
            raise Unreadable(f"{folder}: {asked[0]} needs a tokenizer.json; {ADVICE}")
        tokenizer, pairs = byte_level(vocab, merges, bool(config.get("add_prefix_space")))
    elif others or kind not in PLAIN_CLASSES:
        named = shown(others[0] if kind in PLAIN_CLASSES else kind)
        family = f"its tokenizer ({named}) is of a family that is not read here"
        raise Unreadable(f"{folder}: {family}; {ADVICE}")
    else:
        return None
    problem = f"{folder}: its added tokens cannot be read"
    ids = call(problem, add_tokens, tokenizer, folder, config, kind in GPT2_CLASSES)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    file = path if path.exists() else vocab
    return call(file, FileTokenizer, tokenizer, ids.get("eos_token"), pairs)


def read_eos_ids(folder: Path) -> set[int]:
    """The ids that end a text in `config.json` and `generation_config.json`; each may list many."""
    found = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        ids = read_optional(path).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
        if not all(token_id is None or type(token_id) is int for token_id in found):
            raise ValueError(f"{path}: eos_token_id is neither an integer nor a list of integers")
    return {*found} - {None}


def gpt2_tokenizer() -> FileTokenizer | None:
    """GPT-2's own, from the files that tiktoken has fetched; None if it has not. Deletes none."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    paths = [Path(cache) / name for name in GPT2_FILES]
    if not cache or not all(path.is_file() for path in paths):  # "" means: no cache
        return None
    for path in paths:
        if sha1(path.read_bytes()).hexdigest() != GPT2_FILES[path.name]:
            raise ValueError(f"{path} is not GPT-2's whole file: delete it")
    tokenizer, pairs = byte_level(*paths, with_space=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return FileTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT), pairs)


def read_optional(path: Path) -> dict:
    """A file of one JSON object; {} for none. Refuses texts that are too long to be compiled."""
    fields = read_json(path) if path.exists() else {}
    todo, count = [fields], 0
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value, *(value[key] for key in value.keys() - NOT_COMPILED)]
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str):
            count += len(value)
            if len(value) > MOST_TEXT_CHARS or count > MOST_CHARS:
                limits = f"{MOST_TEXT_CHARS:,} characters in one and {MOST_CHARS:,} in all are read"
                raise ValueError(f"{path} has texts that are too long: at most {limits}")
    return fields


def read_whole(path: Path, config: dict, kind: str | None) -> "Tokenizer":
    """The tokenizer of `tokenizer.json`; `kind` names its class."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = call(f"{path} cannot be read", Tokenizer.from_str, json.dumps(read_optional(path)))
    # With a class of GPT-2's the config has the last word, in transformers too.
    if kind in GPT2_CLASSES and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = bool(config.get("add_prefix_space"))
        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(vocab: Path, merges: Path, with_space: bool) -> "tuple[Tokenizer, list[tuple]]":
    """The tokenizer of `vocab.json`, and its merges; `with_space` puts a blank before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    lines = read_text(merges).split("\n")
    lines = lines[lines[0].startswith("#version") :]  # "# #" is a merge
    pairs = [tuple(line.split(" ")) for line in lines if line]
    model = call(f"{vocab} and {merges.name}", models.BPE, read_json(vocab), pairs)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=with_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pairs


def plain_encoding(tokenizer: "Tokenizer", pairs: list[tuple]) -> "Encoding | None":
    """The same tokenizer for tiktoken; None if it has more than bytes, merges and <|endoftext|>.

    tiktoken knows no merges: it joins the two neighbours whose bytes together are the token of the
    lowest id. That is the same if the ids rise from pair to pair, and merges lead to each token.
    """
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's cut into words

    vocab = tokenizer.get_vocab(with_added_tokens=False)
    vocab.pop(END_OF_TEXT, None)
    ids = [vocab.get("".join(pair), -1) for pair in pairs]
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: token_id for token_id, token in added.items()}
    surprises = (
        tokenizer.pre_tokenizer.add_prefix_space or tokenizer.encode_special_tokens,
        special.keys() - {END_OF_TEXT},
        any(token.lstrip or token.rstrip or token.single_word for token in added.values()),
        not vocab.keys() >= CHAR_TO_BYTE.keys() >= set("".join(vocab)),
        ids != sorted({*ids}) or len(vocab) > len({*vocab.values()}),
    )
    if any(surprises) or any(len(tokenizer.model.tokenize(token)) != 1 for token in vocab):
        return None
    ranks = {bytes(map(CHAR_TO_BYTE.get, token)): vocab[token] for token in vocab}
    return Encoding("plain", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


# ---- added tokens --------------------------------------------------------------------------------
def added_token(entry: str | dict, **flags: bool) -> "AddedToken":
    """The library's form of a token that a file names, or describes with its flags."""
    from tokenizers import AddedToken

    fields = {"content": entry} if isinstance(entry, str) else entry
    known = {name: fields[name] for name in TOKEN_FIELDS if fields.get(name) is not None}
    return AddedToken(**(known | flags))


def add_tokens(tokenizer: "Tokenizer", folder: Path, config: dict, is_gpt2: bool) -> dict[str, int]:
    """Add the tokens of the files beside tokenizer.json; return the ids of roles like "eos_token".

    A role that is null does not exist. A token that the vocabulary lacks gets no role: transformers
    would give it an id for which the model has no row.
    """
    decoder = config.get("added_tokens_decoder")
    # Where the config has this list, the two older files are relics.
    old = read_optional(folder / "special_tokens_map.json") if decoder is None else {}
    # GPT-2's class has three roles without being told.
    fields = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) if is_gpt2 else {}
    fields |= config | old
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [  # add_bos_token is a switch
        (role, added_token(value, special=True))
        for role, value in [*fields.items(), *(("extra_token", one) for one in extra)]
        if role.endswith("_token") and not isinstance(value, bool | None)
    ]
    if decoder is not None:
        tokenizer.add_tokens([added_token(decoder[key]) for key in sorted(decoder, key=int)])
    else:  # no flags: special is what has a role
        ids = read_optional(folder / "added_tokens.json")
        special = {token.content for _, token in named}
        texts = sorted(ids, key=ids.get)
        tokenizer.add_tokens([added_token(text, special=text in special) for text in texts])
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    found = [(role, t) for role, t in named if tokenizer.token_to_id(t.content) is not None]
    tokenizer.add_special_tokens([known.get(token.content, token) for _, token in found])
    return {role: tokenizer.token_to_id(token.content) for role, token in found}
