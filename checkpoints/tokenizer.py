"""Turn a text into token ids and back, as the files of a model's folder say.

GPT-2's tokens are runs of bytes, not of letters: 256 single bytes and 50,000 merges, each of which
joins two tokens that stood side by side most often in the training text. Any text can be written in
them, but 344 of the 50,256 hold only a part of a character. A cat emoji takes three tokens:

    text         " 🐈"
    bytes        20 F0 9F 90 88
    tokens       |20 F0 9F|  |90|  |88|      each alone is no valid UTF-8: it decodes to U+FFFD

So tokens are joined as bytes first and decoded as UTF-8 afterwards, in `outputs.py` too. People
have trained GPT-2 models with other vocabularies. All that stand in `tokenizer.json`, in
`vocab.json` and `merges.txt`, or in a BertTokenizer's `vocab.txt` are read by the library
`tokenizers`, and the ids are those of transformers' AutoTokenizer. A folder of another family is
`Unreadable`. A model of GPT-2's vocabulary in a folder without any gets GPT-2's own, by tiktoken.

Sennrich et al. 2016, arXiv:1508.07909, section 3.2 (merges); Radford et al. 2019, section 2.2.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.untrusted import MOST_SHOWN, read_json, read_text, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # imported where it is needed, and so is tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
PLAIN_CLASSES = (*GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
OTHER_FILES = ("vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")  # of other families
# The roles that a class has without being told.
GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
BERT_ROLES = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}

# What the library compiles takes up to 340 bytes of memory a character. Real files have a third.
MOST_VOCABULARY_CHARS = 4_000_000
MOST_OTHER_CHARS = 1_000_000  # of added tokens and rules
MOST_TEXT_CHARS = 10_000  # of one of them
MOST_BLANKS = 900_000  # in a row; tiktoken's regular expression fails at 999,999
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
LACKING = "\0none"  # the library looks for it where a vocabulary lacks a character

# Where tiktoken fetches GPT-2's two files from, and the SHA-256 of each.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Unreadable(ValueError):
    """A folder has a tokenizer that is not read here. Its model runs on token ids alone."""


def byte_to_char() -> dict[int, str]:
    """The printable character that stands for each byte in the files: " " is written "Ġ".

    The 68 bytes that no text file shows take the characters from 256 on, as OpenAI chose.
    """
    # ! to ~, ¡ to ¬, ® to ÿ; left out are blanks and U+00AD, a hyphen that is seldom shown
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]  # 32 is others[32] -> chr(288)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def call(problem: object, function: Callable, *args, **options) -> Any:
    """Call a library; what it raises becomes a ValueError that begins with `problem`."""
    try:
        return function(*args, **options)
    except BaseException as error:  # a panic of Rust is no Exception, and neither is Ctrl-C
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = Unreadable if isinstance(error, Unreadable) else ValueError
        raise kind(f"{problem}: {str(error)[:MOST_SHOWN]}") from None


# ---- text to ids and back ------------------------------------------------------------------------
class FileTokenizer:
    """What the two kinds below share. An id without a token gives no text."""

    vocab_size: int  # the highest id + 1; a model's table may be padded to more rows
    num_ordinary: int  # tokens that were not added
    eos_token_id: int | None  # the token that ends a text
    names: dict[int, str]  # of the special tokens, which leave no text
    token_bytes: Callable[[int], bytes]  # what one token adds to a text

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids. As in Hugging Face, "<|endoftext|>" in a text becomes that token.

        Raises ValueError for a text that the vocabulary cannot write, and for half of a surrogate
        pair, which JSON can hold and UTF-8 cannot.
        """
        if half := re.search("[\ud800-\udfff]", text):  # tiktoken would write U+FFFD instead
            problem = f"character {half.start()} of the text is U+{ord(half[0]):04X}"
            raise ValueError(f"{problem}, half of a surrogate pair: send whole characters")
        return call("the text cannot be written in tokens", self._encode, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; broken UTF-8 gives U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token as a text, for a table or a log-probability. A stream needs `outputs.py`."""
        return self.names.get(token_id) or self.token_bytes(token_id).decode(errors="replace")


class GPT2Tokenizer(FileTokenizer):
    """GPT-2's own 50,257 tokens, by tiktoken."""

    vocab_size, num_ordinary, eos_token_id = 50257, 50256, 50256
    names = {50256: END_OF_TEXT}

    def __init__(self):
        """Read the files that tiktoken has fetched."""
        import tiktoken

        self._encoding = tiktoken.get_encoding("gpt2")

    def _encode(self, text: str) -> list[int]:
        blanks = re.findall(r"\s+", text) if len(text) > MOST_BLANKS else []
        if (longest := max(map(len, blanks), default=0)) > MOST_BLANKS:
            raise ValueError(f"{longest:,} blanks in a row, at most {MOST_BLANKS:,} are read")
        return self._encoding.encode(text, allowed_special="all")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text: b"" for a special or unknown id."""
        is_ordinary = 0 <= token_id < self.num_ordinary
        return self._encoding.decode_single_token_bytes(token_id) if is_ordinary else b""


class LibraryTokenizer(FileTokenizer):
    """Any tokenizer of the library `tokenizers`."""

    def __init__(self, tokenizer: "Tokenizer", eos_token_id: int | None):
        """Raises `Unreadable` if the text of a token depends on the one after it."""
        tokenizer.no_truncation()  # both are the caller's business
        tokenizer.no_padding()
        if hasattr(model := tokenizer.model, "dropout"):  # BPE
            model.dropout = None  # merges are left out at random in training only
            model.unk_token = model.unk_token or LACKING  # else what it lacks is left out silently
        self._tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self._added = tokenizer.get_added_tokens_decoder()
        self.names = {i: token.content for i, token in self._added.items() if token.special}
        ids = set(tokenizer.get_vocab().values())
        ordinary = sorted(ids - self._added.keys())
        self.vocab_size, self.num_ordinary = max(ids, default=-1) + 1, len(ordinary)
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
        self._is_byte_level = kinds == ["ByteLevel"]
        # Some vocabularies have a token <0xE7> for each byte of the characters that they lack.
        self._byte_token = re.compile("<0x[0-9A-F]{2}>" if "ByteFallback" in kinds else "(?!)")
        self.token_bytes = functools.cache(self.token_bytes)  # a method's results, by id
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

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text).ids
        except Exception as error:
            if LACKING in str(error):
                for char in dict.fromkeys(text) if len(text) > 1 else ():
                    self._encode(char)  # raises for the one that is lacking
                raise ValueError(f"the vocabulary has no token for {shown(text)}") from None
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; broken UTF-8 gives U+FFFD. A first word has no blank before it."""
        if self._is_byte_level:
            return super().decode(ids)
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text that has begun: b"" for a special or unknown id.

        A word of WordPiece adds a blank and the word: what a model writes continues its prompt.
        """
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
def load_tokenizer(folder: str | Path) -> LibraryTokenizer | None:
    """Load the tokenizer of a model's folder; None if it has none.

    Raises `Unreadable` for the files of a family that is not read here, and ValueError, naming the
    file or the folder, for those that are damaged or too large.
    """
    folder = Path(folder)
    config = read_optional(folder / "tokenizer_config.json")
    kind, model = config.get("tokenizer_class"), folder / "config.json"
    if kind is None and model.exists():
        kind = read_json(model).get("tokenizer_class")
    path, tokenizer = read_vocabulary(folder, kind, config)
    if tokenizer is None:
        return None
    is_bert = kind in BERT_CLASSES
    own = GPT2_ROLES if kind in GPT2_CLASSES else BERT_ROLES if is_bert else {}
    problem = f"{folder}: its added tokens cannot be read"
    ids = call(problem, add_tokens, tokenizer, *call(problem, read_added, folder, config, own))
    if path.name != "tokenizer.json":  # which says itself what stands around a text
        begin, end = ("cls_token", "sep_token") if is_bert else ("bos_token", "eos_token")
        around = {role: ids[role] for role in ids if is_bert or config.get(f"add_{role}")}
        add_template(tokenizer, begin, end, around)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return call(path, LibraryTokenizer, tokenizer, ids.get("eos_token"))


def read_vocabulary(folder: Path, kind: object, config: dict) -> tuple[Path, "Tokenizer | None"]:
    """The tokenizer without what other files add to it, and its file; `kind` names its class."""
    others = [path.name for pattern in OTHER_FILES for path in folder.glob(pattern)]
    if (path := folder / "tokenizer.json").exists():
        return path, read_whole(path, config, kind)
    if kind in PLAIN_CLASSES and any((folder / f).exists() for f in ("vocab.json", "merges.txt")):
        path = folder / "vocab.json"
        return path, byte_level(path, folder / "merges.txt", config)
    if kind in BERT_CLASSES and "vocab.txt" in others:
        path = folder / "vocab.txt"
        return path, word_piece(path, config)
    if others or kind not in PLAIN_CLASSES:
        named = shown(others[0] if kind in PLAIN_CLASSES else kind)
        raise Unreadable(f"{folder}: its tokenizer ({named}) is of a family that is not read here")
    return path, None


def read_eos_ids(folder: Path) -> set[int]:
    """The ids that end a text in `config.json` and `generation_config.json`; each may list many."""
    found = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token_id) is int for token_id in ids):
            raise ValueError(f"{path}: eos_token_id is neither an integer nor a list of integers")
        found |= {*ids}
    return found


def gpt2_tokenizer() -> GPT2Tokenizer | None:
    """GPT-2's own tokenizer, if tiktoken has fetched its files before; None if it has not.

    tiktoken itself would fetch missing files, and delete damaged ones. This function fetches and
    deletes nothing. Raises ValueError for a damaged file.
    """
    default = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    urls = [GPT2_URL + name for name in GPT2_FILES]
    paths = [Path(cache) / hashlib.sha1(url.encode()).hexdigest() for url in urls]
    if not cache or not all(path.is_file() for path in paths):  # "" means: no cache
        return None
    for path, (name, sha256) in zip(paths, GPT2_FILES.items(), strict=True):
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is not GPT-2's whole {name}: delete it")
    return GPT2Tokenizer()


def read_optional(path: Path) -> dict:
    """A file of one JSON object, with texts of a sane length; {} for one that is not there."""
    fields = read_json(path) if path.exists() else {}
    check_sizes(path, fields, MOST_OTHER_CHARS)
    return fields


def check_sizes(path: Path, value: object, most: int) -> None:
    """Refuse texts that are too long to be compiled, wherever they stand in `value`."""
    todo, count = [value], 0
    while todo:
        value = todo.pop()
        if isinstance(value, dict):  # the two that are left out are long, and not compiled
            parts = value.keys() - {"precompiled_charsmap", "chat_template"}
            todo += [*value, *map(value.get, parts)]
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str):
            count += len(value)
            if len(value) > MOST_TEXT_CHARS or count > most:
                limits = f"{MOST_TEXT_CHARS:,} characters in one and {most:,} in all are read"
                raise ValueError(f"{path} has texts that are too long: at most {limits}")


# ---- tokenizers of the library -------------------------------------------------------------------
def read_whole(path: Path, config: dict, kind: str | None) -> "Tokenizer":
    """`tokenizer.json`, read after its sizes are checked."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    whole = read_json(path)
    rules, model = {name: whole[name] for name in whole if name != "model"}, whole.get("model")
    check_sizes(path, rules, MOST_OTHER_CHARS)
    check_sizes(path, isinstance(model, dict) and model.get("vocab"), MOST_VOCABULARY_CHARS)
    tokenizer = call(f"{path} cannot be read", Tokenizer.from_str, json.dumps(whole))
    # With a class of GPT-2's the config has the last word, in transformers too.
    if kind in GPT2_CLASSES and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = bool(config.get("add_prefix_space"))
        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(vocab: Path, merges: Path, config: dict) -> "Tokenizer":
    """The tokenizer of `vocab.json` and `merges.txt`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    lines = read_text(merges).split("\n")
    lines = lines[lines[0].startswith("#version") :]  # "# #" is a merge
    pairs = [tuple(line.split(" ")) for line in lines if line]
    model = call(f"{vocab} and {merges.name}", models.BPE, vocab=read_json(vocab), merges=pairs)
    tokenizer = Tokenizer(model)
    with_space = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=with_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece(path: Path, config: dict) -> "Tokenizer":
    """The tokenizer of BERT's `vocab.txt`: a token a line, its id is the line's number."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = read_text(path).removesuffix("\n").split("\n")
    vocab = {line.rstrip(): token_id for token_id, line in enumerate(lines)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = call(
        path.with_name("tokenizer_config.json"),
        normalizers.BertNormalizer,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def add_template(tokenizer: "Tokenizer", begin: str, end: str, ids: dict[str, int]) -> None:
    """Put the tokens of two roles around each text that is encoded, where `ids` has them."""
    from tokenizers import processors

    single = [name for name in (begin, "$A", end) if name == "$A" or name in ids]
    special = [(role, ids[role]) for role in single if role != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


# ---- added tokens --------------------------------------------------------------------------------
def read_added(folder: Path, config: dict, own: dict) -> tuple[list, list]:
    """What files beside tokenizer.json add: tokens in the order of their ids, and (role, token).

    `own` are the roles of the class. A role that is null does not exist.
    """
    from tokenizers import AddedToken

    def token(entry: str | dict, **flags: bool) -> AddedToken:
        fields = {"content": entry} if isinstance(entry, str) else entry
        known = {name: fields[name] for name in TOKEN_FIELDS if fields.get(name) is not None}
        return AddedToken(**(known | flags))

    decoder = config.get("added_tokens_decoder")
    # Where the config has this list, the two older files are relics.
    old = read_optional(folder / "special_tokens_map.json") if decoder is None else {}
    fields = own | config | old
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [  # add_bos_token is a switch
        (role, token(value, special=True))
        for role, value in [*fields.items(), *(("extra_token", one) for one in extra)]
        if role.endswith("_token") and not isinstance(value, bool | None)
    ]
    if decoder is not None:
        return [token(decoder[key]) for key in sorted(decoder, key=int)], named
    ids = read_optional(folder / "added_tokens.json")  # no flags: special is what has a role
    special = {one.content for _, one in named}
    return [token(text, special=text in special) for text in sorted(ids, key=ids.get)], named


def add_tokens(tokenizer: "Tokenizer", listed: list, named: list) -> dict[str, int]:
    """Add the listed tokens, and make those with a role special; returns the ids of the roles.

    A token that the vocabulary lacks gets no role: transformers would give it an id for which the
    model has no row.
    """
    tokenizer.add_tokens(listed)
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    found = [(role, t) for role, t in named if tokenizer.token_to_id(t.content) is not None]
    tokenizer.add_special_tokens([known.get(token.content, token) for _, token in found])
    return {role: tokenizer.token_to_id(token.content) for role, token in found}
