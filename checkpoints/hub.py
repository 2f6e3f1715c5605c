"""Find the folder of a model by its name: a local folder, the hub's cache, or a download.

The repository of `gpt2` on the hub holds the same weights several times: for PyTorch (548 MB),
TensorFlow, Flax, Rust and ONNX. This file fetches the configs, the tokenizer's files and one set of
weights, all from one commit, by huggingface_hub, whose cache and variables (HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) are used. What is here, or whole in the cache, costs no
request, and is not compared with the hub again: `gpt2` stays at the commit that was fetched first,
`gpt2@COMMIT` asks for another one. Without a network the user gets one sentence within 3 seconds.
"""

import multiprocessing
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

from checkpoints.untrusted import call
from checkpoints.weight_files import WEIGHT_FILES, files_of, other_weights

# Short names, and the repositories that the hub redirects them to.
ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")}
ALIASES |= {"gpt2-xl": "openai-community/gpt2-xl", "distilgpt2": "distilbert/distilgpt2"}
CONFIG = "config.json"
OTHER_TOKENIZERS = ("vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")  # not GPT-2's
SMALL_FILES = (  # some repositories hold only a few of them
    *(CONFIG, "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *OTHER_TOKENIZERS),
)
WEIGHTS = WEIGHT_FILES[:-1]  # the first one that exists; nanoGPT's ckpt.pt is not used on the hub
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".json")
LIST_TIMEOUT_S = 3.0  # the wait without a network; the hub answers in about 0.3 s


def find_folder(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the folder (or file) on this machine that `name` means; fetch it if necessary.

    `name` is a local path, one of ALIASES, or `org/name`. The last two may end in `@revision`: a
    branch, tag or commit. The default of `cache_dir` is huggingface_hub's cache.
    Raises ValueError with one sentence if there is no such model.
    """
    if os.path.exists(name):
        return Path(name)
    repo_id, revision = parse_name(str(name))
    try:  # imported here: a local folder works without the package
        from huggingface_hub import constants
    except ImportError as error:
        raise ValueError(f"{str(name)!r} is no folder here, and for the hub: {error}") from None
    nowhere = f"{str(name)!r} is no folder here, nor whole in {cache_dir or constants.HF_HUB_CACHE}"
    problem = f"{nowhere}, and {constants.ENDPOINT} did not deliver it"  # and the library's words
    place = repo_id, revision, cache_dir
    return call(problem, lambda: find_in_cache(*place) or download(*place))


def parse_name(name: str) -> tuple[str, str]:
    """Split a name that is no local path into (repository, revision), without any request.

    Example: "gpt2" -> ("openai-community/gpt2", "main"), "me/tales@v2" -> ("me/tales", "v2").
    """
    repo_id, _, revision = name.partition("@")
    repo_id = ALIASES.get(repo_id, repo_id)
    is_path = name.startswith((".", "/", "~")) or "\\" in name or repo_id.endswith(FILE_ENDINGS)
    # A name with one slash may be a path (`assets/tiny`) or an id (`org/name`): the hub decides.
    if is_path or repo_id.count("/") != 1:
        choices = f"correct the path, or give an id (org/name, {', '.join(ALIASES)}) or random:gpt2"
        raise ValueError(f"{name!r} is no folder here and no hub id: {choices}")
    return repo_id, revision or "main"


def find_in_cache(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return the cached snapshot of a revision if it is whole, else None. Sends no request.

    transformers uses the same cache; old versions of it kept `gpt2` under its short name.
    """
    import huggingface_hub as hub

    short_names = [short for short, full in ALIASES.items() if full == repo_id]
    for known_as in (repo_id, *short_names):
        config = hub.try_to_load_from_cache(known_as, CONFIG, cache_dir, revision)
        # The library returns a path, None, or a marker for "the hub has no such file".
        if isinstance(config, str) and is_whole(Path(config).parent):
            return Path(config).parent
    return None


def is_whole(folder: Path) -> bool:
    """Whether a snapshot holds a config and all files of its best weights, which then are whole."""
    try:
        needed = (folder / CONFIG, *files_of(folder))
    except ValueError:  # no weights, or an index that cannot be read: fetch it again
        return False
    return all(path.is_file() for path in needed)  # False for a broken link


def download(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch configs, tokenizer and the best weights into the cache; return their snapshot."""
    import huggingface_hub as hub

    listed = list_files(repo_id, revision)
    if CONFIG not in listed:
        raise ValueError(f"there is no {CONFIG}")
    weights = next((name for name in WEIGHTS if name in listed), None)
    if weights is None:
        raise ValueError(f"there is {other_weights(listed) or 'none of ' + ', '.join(WEIGHTS)}")

    def fetch(revision: str, *names: str) -> Path:
        options = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": [*names]}
        return Path(hub.snapshot_download(repo_id, **options))

    # The first files come from the branch, whose commit the library notes, all others from that
    # commit: somebody may push. Weights come last: a snapshot that has them has all other files.
    folder = fetch(revision, *SMALL_FILES)  # .../snapshots/COMMIT
    fetch(folder.name, weights)
    files = [path.name for path in files_of(folder / weights)]  # an index names its shards
    if absent := [file for file in files if file not in listed]:
        raise ValueError(f"{weights} names {absent[0]!r}, which is not there")
    fetch(folder.name, *files)
    if not is_whole(folder):  # the library is content with less if the connection breaks
        raise ValueError(f"it did not arrive whole in {folder}: start again")
    return folder


def list_files(repo_id: str, revision: str) -> set[str]:
    """All file names of a repository. Raises TimeoutError after LIST_TIMEOUT_S.

    The HTTP client's own timeout starts again for each address, and omits the lookup of a name.
    """
    import huggingface_hub as hub

    options = {"revision": revision, "timeout": LIST_TIMEOUT_S}
    pool = ThreadPool(1)  # its thread is a daemon: a request without an answer keeps no process
    asked = pool.apply_async(hub.HfApi().model_info, (repo_id,), options)
    pool.close()
    try:
        return {sibling.rfilename for sibling in asked.get(LIST_TIMEOUT_S).siblings}
    except multiprocessing.TimeoutError:
        raise TimeoutError(f"no answer in {LIST_TIMEOUT_S:.0f} seconds") from None
