"""A vocabulary is merges in the order they were learnt, and tokens that were added afterwards.

GPT-2's 50,257 tokens are 256 bytes, 50,000 merges and one token that was added: <|endoftext|>.
Whoever fine-tunes it adds more, [PAD] or <|user|>, and years of exporters have written the same
facts into six files. Read one of them wrongly and nothing fails: the model is fed other ids.

    tokenizer.json           {"model": {"vocab": {...}, "merges": [...]}, "added_tokens": [...]}
    vocab.json, merges.txt   the same two, where there is no tokenizer.json
    tokenizer_config.json    its "added_tokens_decoder" repeats the list, "eos_token" names a role
    added_tokens.json        the list in old folders: {"[PAD]": 50257}
    special_tokens_map.json  the roles in old folders

tokenizer.json is believed first, because transformers believes it first, and then vocab.json is not
opened: a folder must mean the same ids here and there. Two lists of added tokens have to agree. A
field that would change the ids in a way not done here is refused by name: nearly right ids produce
fluent nonsense. What a production engine does beyond this: normalizers, other rules for cutting
words, WordPiece and Unigram vocabularies.

Format: github.com/huggingface/tokenizers, and transformers' `save_pretrained` since version 2.
Run: python -m checkpoints.vocabulary
Try: give the demo's [PAD] the content "ab", which the merges make already, and read which id it has
to have; or take the merge "Ġ ab" out of the list, and a token is left that nothing makes.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from checkpoints.untrusted import read_json, read_text, shown

END_OF_TEXT = "<|endoftext|>"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS_OF_ROLES = ("additional_special_tokens", "extra_special_tokens")

# What reads a text as GPT-2 does: a field and its values, None where it is left out. Not here are
# fields that change no id: the offsets; padding and truncation, which are the caller's business.
OFF = (None, False, 0, "", {})
PLAIN_TOKENIZER = {
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),  # True reads "Hello" as " Hello"
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": (None, "ByteLevel", "TemplateProcessing"),
    # The template of the text alone: others put <s> and </s> around it.
    "post_processor.single": (None, [{"Sequence": {"id": "A", "type_id": 0}}]),
    "decoder.type": ("ByteLevel",),
    "model.type": ("BPE", None),  # files of 2020, GPT-2's own among them, do not say it
    **dict.fromkeys(("model.continuing_subword_prefix", "model.end_of_word_suffix"), OFF),
    **dict.fromkeys(("normalizer", "model.dropout", "model.byte_fallback"), OFF),
    "model.ignore_merges": OFF,
}
CLASSES = (*GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")
SWITCHES = ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens")
PLAIN_CONFIG = {"tokenizer_class": CLASSES} | dict.fromkeys(SWITCHES, OFF)


class AddedToken(NamedTuple):
    """A token that is looked for in a text as a whole, before any merge."""

    content: str
    token_id: int
    special: bool  # it has a role and leaves no text; otherwise it is a word like any other
    normalized: bool  # looked for in a second round, in what the tokens without it have left over


class Vocabulary(NamedTuple):
    """What a tokenizer needs to know."""

    ranks: dict[bytes, int]  # a token's bytes and its id; of two merges the lower id goes first
    added: tuple[AddedToken, ...] = ()  # in the order of their ids
    eos_token: str | None = None  # the added token that ends a text


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


def read_vocabulary(folder: str | Path) -> Vocabulary | None:
    """The vocabulary of a model's folder, in any of the layouts above; None for a folder without.

    Raises ValueError, naming the file and the field or token, for what is missing, damaged, not
    GPT-2's kind, or in contradiction to itself.
    """
    folder = Path(folder)
    path, whole = folder / "tokenizer.json", {}
    if path.exists():
        whole = read_json(path)
        require_plain(path, whole, PLAIN_TOKENIZER)
        vocab = check_vocab(path, look_up(whole, "model.vocab"))
        ranks = ranks_of(vocab, merges_of_list(path, look_up(whole, "model.merges")))
    elif (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
        path = folder / "vocab.json"
        vocab, ranks = read_vocab_and_merges(path, folder / "merges.txt")
    else:
        return None
    config = read_optional(folder / "tokenizer_config.json")
    require_plain(folder / "tokenizer_config.json", config, PLAIN_CONFIG)
    listed = listed_tokens(folder, whole, config, vocab)
    # GPT-2's own folder does not name its last token: its class in transformers does.
    is_gpt2 = config.get("tokenizer_class") in GPT2_CLASSES
    has_end = END_OF_TEXT in listed or (is_gpt2 and END_OF_TEXT in vocab)
    roles = {role: [added_token(path, END_OF_TEXT, 0)] for role in ROLES[:3] if has_end}
    roles |= named_tokens(folder, config)
    added = add_tokens(path, vocab, ranks, listed, roles)
    ends = [token.content for token in roles.get("eos_token", [])]
    return Vocabulary(ranks, added, ends[0] if ends else None)


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tuple[dict, dict]:
    """`vocab.json` and `merges.txt`: ids by the tokens as they are written, and by their bytes."""
    for path in (vocab_path, merges_path):
        if not path.exists():
            raise ValueError(f"{path} is missing: a tokenizer is vocab.json and merges.txt")
    vocab = check_vocab(vocab_path, read_json(vocab_path))
    return vocab, ranks_of(vocab, merges_of_text(merges_path))


# ---- The files -----------------------------------------------------------------------------------
def read_optional(path: Path) -> dict:
    """A file of one JSON object, and {} for one that is not there."""
    return read_json(path) if path.exists() else {}


def look_up(fields: object, name: str) -> object:
    """A field within fields, "model.vocab"; None where there is none."""
    for key in name.split("."):
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


def require_plain(path: Path, fields: dict, plain: dict[str, tuple]) -> None:
    """Refuse what would cut or merge a text in another way than GPT-2 does."""
    for name, accepted in plain.items():
        if (value := look_up(fields, name)) not in accepted:
            values = [repr(one) for one in accepted if one is not None]
            want = "leaving it out" if accepted is OFF else " or ".join(values)
            raise ValueError(f"{path}: {name} is {shown(value)}, only {want} gives GPT-2's ids")


def check_vocab(path: Path, vocab: object) -> dict[str, int]:
    """Tokens, written in `byte_to_char`'s characters, and their ids: 0, 1, 2 and so on."""
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError(f"{path}: the vocabulary is not one object of tokens and their ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of its {len(vocab)} tokens are not 0, 1, 2 and so on")
    for byte, char in BYTE_TO_CHAR.items():
        if char not in vocab:
            raise ValueError(f"{path}: no token for the byte 0x{byte:02X}, written {char!r}")
    return vocab


# ---- The merges ----------------------------------------------------------------------------------
Merges = Iterator[tuple[str, list]]  # where each stands, for an error, and its two tokens


def merges_of_text(path: Path) -> Merges:
    """`merges.txt`: one merge of two tokens a line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line and not (number == 1 and line.startswith("#version")):  # "# #" is a merge
            yield f"{path}, line {number}: {shown(line)}", line.split(" ")


def merges_of_list(path: Path, merges: object) -> Merges:
    """`model.merges` in tokenizer.json: "a b" in old files, ["a", "b"] in new ones."""
    if not isinstance(merges, list):
        raise ValueError(f"{path}: model.merges is {shown(merges)}, not a list")
    for number, merge in enumerate(merges, start=1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"{path}, merge {number}: {shown(merge)} is not two tokens")
        yield f"{path}, merge {number}: {shown(' '.join(pair))}", pair


def ranks_of(vocab: dict[str, int], merges: Merges) -> dict[bytes, int]:
    """The bytes of every token that the merges make, and its id.

    Hugging Face merges the listed pair that stands highest in the list; tiktoken merges the two
    neighbours whose joined bytes have the lowest id. That is the same when each merge joins tokens
    that exist by then and its own id is higher than all before, as training leaves them.
    """
    made = {char: vocab[char] for char in CHAR_TO_BYTE}
    newest = -1
    for where, pair in merges:
        if len(pair) != 2:
            raise ValueError(f"{where} is not two tokens with one space between them")
        if not (pair[0] in made and pair[1] in made):
            raise ValueError(f"{where} joins a token that is neither a byte nor made further up")
        token_id = vocab.get("".join(pair))
        if token_id is None:
            raise ValueError(f"{where} makes a token that the vocabulary does not have")
        if token_id <= newest:
            raise ValueError(f"{where} makes id {token_id} after id {newest}: ids have to rise")
        made["".join(pair)] = newest = token_id
    return {bytes(map(CHAR_TO_BYTE.get, token)): token_id for token, token_id in made.items()}


# ---- The added tokens ----------------------------------------------------------------------------
def added_token(where: object, entry: object, token_id: object) -> AddedToken:
    """One entry of a list or a role: a string, or an object with flags. `where` is for errors."""
    if isinstance(entry, str):
        entry = {"content": entry}
    content = look_up(entry, "content")
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where}: {shown(entry if content is None else content)} is no token")
    if any("\ud800" <= char <= "\udfff" for char in content):
        raise ValueError(f"{where}: {shown(content)} holds half of a surrogate pair")
    if type(token_id) is not int:
        raise ValueError(f"{where}: the id of {shown(content)} is {shown(token_id)}, no integer")
    for flag in ("single_word", "lstrip", "rstrip"):  # they look at, or swallow, what is beside
        if entry.get(flag, False) is not False:
            raise ValueError(f"{where}: {flag} is set for {shown(content)}, only false is served")
    special, normalized = entry.get("special", False), entry.get("normalized")
    if type(special) is not bool or not isinstance(normalized, bool | None):
        raise ValueError(f"{where}: special or normalized of {shown(content)} is no boolean")
    return AddedToken(content, token_id, special, normalized)


def listed_tokens(folder: Path, whole: dict, config: dict, vocab: dict) -> dict[str, AddedToken]:
    """The added tokens by their text, from those of the three lists that the folder has.

    The lists are copies of one another. Where they differ, one of them is out of date, and nobody
    can tell which. `added_tokens.json` knows no flags: its tokens are special if they have a role.
    """
    tables = {}
    if (entries := whole.get("added_tokens")) is not None:
        path = folder / "tokenizer.json"
        if not isinstance(entries, list):
            raise ValueError(f"{path}: added_tokens is {shown(entries)}, not a list")
        table = table_of(path, [(entry, look_up(entry, "id")) for entry in entries], vocab)
        if list(table) != [entry["content"] for entry in entries]:
            raise ValueError(f"{path}: added_tokens is not in the order of the ids")
        tables[path] = table
    if (entries := config.get("added_tokens_decoder")) is not None:
        path = folder / "tokenizer_config.json"
        if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
            raise ValueError(f"{path}: added_tokens_decoder is not an object with ids for keys")
        # Fifteen digits are enough to be refused, and thousands would take int() long.
        tables[path] = table_of(path, [(entries[key], int(key[:15])) for key in entries], vocab)
    path = folder / "added_tokens.json"
    if ids := read_optional(path):
        plain = table_of(path, [({"content": text}, ids[text]) for text in ids], vocab)
        known = next(iter(tables.values()), plain)  # this list may leave out what vocab.json has
        tables[path] = known | {text: known.get(text, plain[text]) for text in plain}
    listed = next(iter(tables.values()), {})
    for path, table in tables.items():
        for text in listed | table:
            if listed.get(text) != table.get(text):
                raise ValueError(f"{path}: the added token {shown(text)} is not the same elsewhere")
    return listed


def table_of(path: Path, pairs: list[tuple[object, object]], vocab: dict) -> dict[str, AddedToken]:
    """The tokens of one list by text, in the order of their ids: the ids transformers would give.

    A token that the vocabulary has keeps its id, and another takes the next free one. A list that
    says otherwise has holes, or belongs to another vocabulary.
    """
    tokens = [added_token(path, entry, token_id) for entry, token_id in pairs]
    table = {token.content: token for token in sorted(tokens, key=lambda token: token.token_id)}
    if len(table) < len(tokens):
        raise ValueError(f"{path} lists an added token twice")
    free = len(vocab)
    for text, token in table.items():
        place = vocab.get(text, free)
        free += text not in vocab
        if token.token_id != place:
            wrong = f"the id {token.token_id}, but its place is {place}"
            raise ValueError(f"{path}: the added token {shown(text)} has {wrong}")
    return table


def named_tokens(folder: Path, config: dict) -> dict[str, list[AddedToken]]:
    """The tokens to which a field such as "eos_token" gives a role; none where it is null."""
    roles, path = {}, folder / "special_tokens_map.json"
    # Where tokenizer_config.json has the map's successor, the map is a relic.
    by_map = {} if "added_tokens_decoder" in config else read_optional(path)
    for role, value in (config | by_map).items():
        if role in LISTS_OF_ROLES:
            values = list(value.values()) if isinstance(value, dict) else value or []
        elif role in ROLES or (role.endswith("_token") and isinstance(value, str)):
            values = [] if value is None else [value]
        else:
            continue
        where = f"{path if role in by_map else folder / 'tokenizer_config.json'}, {role}"
        if not isinstance(values, list):
            raise ValueError(f"{where} is {shown(values)}, not a list")
        roles[role] = [added_token(where, one, 0) for one in values]
    return roles


def add_tokens(path: Path, vocab: dict, ranks: dict, listed: dict, roles: dict) -> tuple:
    """All added tokens in the order of their ids; what has a role is special, listed or not."""
    tokens = dict(listed)
    for role, token in ((role, token) for role, named in roles.items() for token in named):
        text = token.content
        if text not in listed and text not in vocab:
            raise ValueError(f"{path} has no token {shown(text)}, but that is the {role}")
        token = listed.get(text) or token._replace(token_id=vocab[text])
        tokens[text] = token._replace(special=True)
    bytes_of = {token_id: token for token, token_id in ranks.items()}
    for text, token in tokens.items():
        # "é" is how the files write the byte 0xE9: the text é is two bytes and another token.
        if bytes_of.get(token.token_id, text.encode()) != text.encode():
            raise ValueError(f"{path}: the added token {shown(text)} has the id of another token")
        if token.normalized is None:  # no file says it
            tokens[text] = token._replace(normalized=not token.special)
    strangers = [t for t, token_id in vocab.items() if token_id not in bytes_of and t not in tokens]
    if strangers:
        what = f"{len(strangers)} tokens are neither bytes nor merged nor added, the first is"
        raise ValueError(f"{path}: {what} {shown(strangers[0])}")
    return tuple(sorted(tokens.values(), key=lambda token: token.token_id))


# --------------------------------------------------------------------------------------------------
def demo():
    """A tokenizer.json of 259 tokens, and what becomes of one more that somebody adds to it."""
    tokens = [*BYTE_TO_CHAR.values(), "ab", "Ġab", END_OF_TEXT]
    model = {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": ["a b", "Ġ ab"]}
    level = {"type": "ByteLevel", "add_prefix_space": False}
    end, pad = ({"content": text, "special": True} for text in (END_OF_TEXT, "[PAD]"))
    refused = []
    for more in ({"id": 259}, {"id": 263}, {"id": 259, "lstrip": True}, {"id": 259, "content": ""}):
        added = [end | {"id": 258}, pad | more]
        whole = {"pre_tokenizer": level, "decoder": level, "model": model, "added_tokens": added}
        print(f"[PAD] with {more}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
            try:
                ranks, read, _ = read_vocabulary(folder)
                print(f"  {len(ranks)} bytes and merges, and {len(read)} added:", *read, sep="\n  ")
            except ValueError as error:
                refused.append(str(error).removeprefix(folder))
                print(f"  {refused[-1]}")
    assert ranks[b" ab"] == 257 and read[1].token_id == 259 and len(refused) == 3
    print("ok: the first is read, the others are refused with the file and the token")


if __name__ == "__main__":
    demo()
