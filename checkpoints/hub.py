"""Find the folder of a model by its name: a local folder, the hub's cache, or a download.

The repository of `gpt2` on the hub holds the same weights several times: for PyTorch (548 MB),
TensorFlow, Flax, Rust and ONNX. This file fetches the config, the tokenizer's files and one set of
weights, all from the same commit. Without a network the user gets one sentence within 3 seconds:
huggingface_hub by itself retries a file after 1, 2, 4, 8 and 8 seconds before it gives up.

    name ──> is it a file or folder here? ───────── yes ──> that path; no request is sent
              no │
             is the whole model in the cache? ───── yes ──> its snapshot; no request is sent
              no │
             ask the hub for its list of files ── no answer ──> one sentence, after 3 s at most
                 │
             fetch config, tokenizer, the best set of weights ──> the snapshot of that commit

The cache, its environment variables (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE), progress bars and retries are huggingface_hub's own. A cached model is not compared
with the hub again: `gpt2` stays at the commit that was fetched first, `gpt2@COMMIT` asks for
another one. The tests run the real library against a local server that answers as the hub does.

Layout of the cache: huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

from checkpoints.weight_files import WEIGHT_FILES, read_index

# Short names, and the repositories that the hub redirects them to.
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
CONFIG = "config.json"
TOKENIZER = (  # some repositories hold only the first two, some only the third
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The first one that exists is taken, since the others hold the same numbers. safetensors come
# first, because a .bin is a pickle and a pickle is a program. An index names the files (shards)
# that hold the weights. The last of WEIGHT_FILES, nanoGPT's ckpt.pt, is not used on the hub.
WEIGHTS = WEIGHT_FILES[:-1]
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".json")
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")  # a git branch; `..` would leave the cache
LIST_TIMEOUT_S = 3.0  # the wait without a network; the hub answers in about 0.3 s


def find_folder(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the folder (or file) on this machine that `name` means; fetch it if necessary.

    `name` is a local path, one of ALIASES, or `org/name`. The last two may end in `@revision`: a
    branch, tag or commit. The default of `cache_dir` is huggingface_hub's cache.
    Raises ValueError with one sentence if there is no such model. Files that arrived whole stay in
    the cache for the next call.
    """
    if os.path.exists(name):
        return Path(name)
    repo_id, revision = parse_name(str(name))
    hub = import_hub(name)
    try:
        found = find_in_cache(repo_id, revision, cache_dir)
        return found or download(repo_id, revision, cache_dir)
    except hub.errors.HFValidationError as error:  # a space in the id, for example
        raise ValueError(f"{str(name)!r} is no folder here and no hub id: {error}") from None
    # A failed download raises an OSError or the HTTP client's own error. The client is httpx or
    # httpx2, depending on the library's version; HfHubHTTPError inherits from OSError and from that
    # client's error, so its two parents are what we catch. hf_xet, the library's second way to
    # fetch weights, raises RuntimeError.
    except (*hub.errors.HfHubHTTPError.__bases__, RuntimeError) as error:
        cache = cache_dir or hub.constants.HF_HUB_CACHE
        raise ValueError(explain(error, repo_id, revision, cache)) from error


def parse_name(name: str) -> tuple[str, str]:
    """Split a name that is no local path into (repository, revision), without any request.

    Example: "gpt2" -> ("openai-community/gpt2", "main"), "me/tales@v2" -> ("me/tales", "v2").
    """
    repo_id, at, revision = name.partition("@")
    # A name with one slash may be a path (`assets/tiny`) or an id (`org/name`): the hub decides.
    is_path = name.startswith((".", "/", "~")) or "\\" in name or repo_id.count("/") > 1
    if is_path or repo_id.endswith(("/", *FILE_ENDINGS)):
        raise ValueError(f"no folder or file {name!r}: correct the path, or give an id, org/name")
    repo_id = ALIASES.get(repo_id, repo_id)
    if "/" not in repo_id:
        ids = ", ".join(ALIASES)
        choices = f"give a folder, a hub id (org/name, {ids}) or random:gpt2"
        raise ValueError(f"{name!r} is no folder here and no hub id: {choices}")
    if at and not REVISION.fullmatch(revision):
        raise ValueError(f"{name!r}: {revision!r} is not the name of a branch, a tag or a commit")
    return repo_id, revision or "main"


def import_hub(name: str | Path) -> ModuleType:
    """Import huggingface_hub only when it is needed: a local folder works without the package."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        advice = "install huggingface_hub to look for it on the hub, or give a folder"
        raise ValueError(f"{str(name)!r} is no folder here: {advice} ({error})") from None
    return huggingface_hub


# ---- in the cache --------------------------------------------------------------------------------
def find_in_cache(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return the cached snapshot of a revision if it is whole, else None. Sends no request.

    transformers uses the same cache, so a model that it has fetched is found too. Old versions kept
    `gpt2` under its short name, so short names are looked up as well.
    """
    hub = import_hub(repo_id)
    short_names = [short for short, full in ALIASES.items() if full == repo_id]
    for known_as in (repo_id, *short_names):
        config = hub.try_to_load_from_cache(known_as, CONFIG, cache_dir, revision)
        # The library returns a path, None, or a marker for "the hub has no such file".
        if isinstance(config, str) and is_whole(Path(config).parent):
            return Path(config).parent
    return None


def is_whole(folder: Path) -> bool:
    """Whether a snapshot holds a config and all files of its best set of weights.

    The library gives a file its final name only after the last byte, so an existing file is whole.
    """
    weights = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if weights is None:
        return False
    try:
        needed = (CONFIG, weights, *shard_names(folder / weights))
        return all((folder / name).is_file() for name in needed)  # False for a broken link
    except ValueError:  # the index cannot be read: fetch it again
        return False


def shard_names(weights: Path) -> list[str]:
    """The files that an index names, each once, sorted. A file that is no index gives [].

    The index comes from a stranger, and the files that it names are opened later. A name that leads
    out of the folder, such as `../x`, is therefore refused with ValueError.
    """
    is_index = weights.name.endswith(".index.json")
    return sorted(file.name for file in read_index(weights)) if is_index else []


# ---- from the hub --------------------------------------------------------------------------------
def download(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch config, tokenizer and the best set of weights into the cache; return their snapshot.

    Files that are already cached are not fetched again, and a broken connection is resumed. Raises
    ValueError if the repository lacks a config or weights. The library's errors are not caught
    here: `find_folder` turns them into sentences with `explain`.
    """
    hub = import_hub(repo_id)
    listed = list_files(repo_id, revision)
    weights = next((name for name in WEIGHTS if name in listed), None)
    if CONFIG not in listed or weights is None:
        missing = CONFIG
        if CONFIG in listed:
            missing = f"weights, that is one of {', '.join(WEIGHTS)}"
        problem = f"has no {missing}: it is no model that runs here"
        raise ValueError(f"the repository {repo_id} {problem}")

    def fetch(file: str, revision: str) -> Path:
        return Path(hub.hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir))

    # The config is fetched from the branch. The library then notes which commit the branch points
    # to, which lets the next call find the snapshot. All other files are fetched from that commit,
    # because somebody may push a new one in between.
    folder = fetch(CONFIG, revision).parent  # .../snapshots/COMMIT
    # The weights come last: a snapshot with whole weights has all other files too.
    for file in (*(name for name in TOKENIZER if name in listed), weights):
        fetch(file, folder.name)
    shards = shard_names(folder / weights)  # [] if the weights are one file
    absent = [shard for shard in shards if shard not in listed]
    if absent:  # checked before gigabytes of other shards are fetched
        raise ValueError(f"{weights} of {repo_id} names {absent[0]!r}, which is not there")
    for shard in shards:
        fetch(shard, folder.name)
    assert is_whole(folder), f"{folder} lacks files that have just been fetched"
    return folder


def list_files(repo_id: str, revision: str) -> set[str]:
    """All file names of a repository. This first request also shows whether a hub is reachable.

    Raises ValueError if the answer is not a hub's, TimeoutError after LIST_TIMEOUT_S, and the
    library's error if the hub refuses.
    """
    hub = import_hub(repo_id)
    api = hub.HfApi()  # outside `ask`: this import must not count against the hub's time limit

    def ask() -> set[str]:
        info = api.model_info(repo_id, revision=revision, timeout=LIST_TIMEOUT_S)
        return {sibling.rfilename for sibling in info.siblings}

    try:
        return within(LIST_TIMEOUT_S, ask)
    except hub.errors.HfHubHTTPError.__bases__:  # refused or unreachable: `explain` says why
        raise
    except Exception as error:  # a login page instead of JSON, or a malformed URL: any error at all
        problem = f"{hub.constants.ENDPOINT} does not answer as a hub does ({first_line(error)})"
        raise ValueError(f"{problem}: is HF_ENDPOINT right, or is a proxy in between?") from error


def within(seconds: float, function: Callable[[], set[str]]) -> set[str]:
    """Call `function` with a time limit: its result or exception, or TimeoutError.

    The HTTP client's own timeout does not limit the whole call. It starts again for each address of
    the server, which matters behind a firewall that drops packets, and it does not cover the lookup
    of the server's name.
    """
    future: Future[set[str]] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon does not keep the process alive
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds") from None


def explain(error: Exception, repo_id: str, revision: str, cache: str | Path) -> str:
    """Turn the library's error into one sentence that says what the user can do."""
    hub = import_hub(repo_id)
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError):  # its cause is the reason
        error = error.__cause__ or error
    nowhere = f"{repo_id}@{revision} is no folder here, nor whole in the cache {cache}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        advice = "unset it and connect once, or give a folder"
        return f"{nowhere}, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: {advice}"
    if isinstance(error, errors.GatedRepoError):  # a subclass of the next error: tested first
        advice = f"accept its terms at {endpoint}/{repo_id}, then log in with `hf auth login`"
        return f"{repo_id} is given only to users who accepted its terms: {advice}"
    if isinstance(error, errors.RepositoryNotFoundError):  # 404; 401 for a private repository
        why = "no such repository (or it is private: log in with `hf auth login`)"
        return f"{nowhere}, and {endpoint} has {why}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision!r}: look for it at {endpoint}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            advice = "log in with `hf auth login`, or renew the token in HF_TOKEN"
            return f"{endpoint} refuses {repo_id} with status {status}: {advice}"
        return f"{endpoint} answered status {status} for {repo_id}: try again later"
    if isinstance(error, OSError) and error.errno is not None:  # from the file system: disk full
        advice = "make room there, or name another place in HF_HUB_CACHE"
        return f"{repo_id} cannot be kept in the cache {cache} ({first_line(error)}): {advice}"
    advice = "connect and start again (files that arrived whole are kept), or give a folder"
    return f"{nowhere}, and {endpoint} did not deliver it ({first_line(error)}): {advice}"


def first_line(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
