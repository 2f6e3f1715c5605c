"""Find the folder of a model by its name: a local folder, the hub's cache, or a download.

The repository of `gpt2` on the hub holds the same weights several times: for PyTorch (548 MB),
TensorFlow, Flax, Rust and ONNX. This file fetches the configs, the tokenizer's files and one set of
weights, all from the same commit. What is here, or whole in the cache, costs no request. Without a
network the user gets one sentence within 3 seconds.

Files, the cache, its variables (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) and
progress bars are huggingface_hub's. A cached model is not compared with the hub again: `gpt2` stays
at the commit that was fetched first, `gpt2@COMMIT` asks for another one. The tests run the real
library against a local server that answers as the hub does.

Layout of the cache: huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
import re
import threading
from concurrent.futures import Future
from pathlib import Path

from checkpoints.weight_files import WEIGHT_FILES, other_weights, read_index

# Short names, and the repositories that the hub redirects them to.
ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")}
ALIASES |= {"gpt2-xl": "openai-community/gpt2-xl", "distilgpt2": "distilbert/distilgpt2"}
CONFIG = "config.json"
SMALL_FILES = (  # some repositories hold only a few of them
    *(CONFIG, "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json"),  # other families' tokenizers
)
WEIGHTS = WEIGHT_FILES[:-1]  # the first one that exists; nanoGPT's ckpt.pt is not used on the hub
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
    try:  # imported here: a local folder works without the package
        import huggingface_hub.constants
        import huggingface_hub.errors as errors
    except ImportError as error:
        advice = "install huggingface_hub to look for it on the hub, or give a folder"
        raise ValueError(f"{str(name)!r} is no folder here: {advice} ({error})") from None
    try:
        found = find_in_cache(repo_id, revision, cache_dir)
        return found or download(repo_id, revision, cache_dir)
    except errors.HFValidationError as error:  # a space in the id, for example
        raise ValueError(f"{str(name)!r} is no folder here and no hub id: {error}") from None
    # A failed download raises an OSError or the error of the HTTP client, which depends on the
    # library's version: the parents of HfHubHTTPError are these two. hf_xet, the library's second
    # way to fetch weights, raises RuntimeError.
    except (*errors.HfHubHTTPError.__bases__, RuntimeError) as error:
        cache = cache_dir or huggingface_hub.constants.HF_HUB_CACHE
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


# ---- in the cache --------------------------------------------------------------------------------
def find_in_cache(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return the cached snapshot of a revision if it is whole, else None. Sends no request.

    transformers uses the same cache, so a model that it has fetched is found too. Old versions kept
    `gpt2` under its short name, so short names are looked up as well.
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
    """The files that an index names, sorted. A file that is no index gives []."""
    is_index = weights.name.endswith(".index.json")
    return sorted(file.name for file in read_index(weights)) if is_index else []


# ---- from the hub --------------------------------------------------------------------------------
def download(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch configs, tokenizer and the best set of weights into the cache; return their snapshot.

    Raises ValueError if the repository lacks a config or weights, and the library's own errors,
    which `find_folder` turns into sentences.
    """
    listed = list_files(repo_id, revision)
    weights = next((name for name in WEIGHTS if name in listed), None)
    if CONFIG not in listed or weights is None:
        others = other_weights(listed) or "it is no model that runs here"
        missing = f"weights, that is one of {', '.join(WEIGHTS)}: {others}"
        raise ValueError(
            f"the repository {repo_id} has no {missing if CONFIG in listed else CONFIG}"
        )

    def fetch(revision: str, *names: str) -> Path:
        import huggingface_hub as hub

        options = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": list(names)}
        return Path(hub.snapshot_download(repo_id, **options))

    # The first files are fetched from the branch: the library notes its commit for the next call.
    # All others are fetched from that commit, because somebody may push a new one in between. The
    # weights come last: a snapshot with whole weights has all other files too.
    folder = fetch(revision, *SMALL_FILES)  # .../snapshots/COMMIT
    fetch(folder.name, weights)
    shards = shard_names(folder / weights)  # [] if the weights are one file
    if absent := [shard for shard in shards if shard not in listed]:
        raise ValueError(f"{weights} of {repo_id} names {absent[0]!r}, which is not there")
    if shards:
        fetch(folder.name, *shards)
    if not is_whole(folder):  # the library is content with less if the connection breaks
        raise ValueError(f"{repo_id} did not arrive whole in {folder}: start again")
    return folder


def list_files(repo_id: str, revision: str) -> set[str]:
    """All file names of a repository. This first request also shows whether a hub is reachable.

    Raises ValueError if the answer is not a hub's, TimeoutError after LIST_TIMEOUT_S, and the
    library's error if the hub refuses. The HTTP client's own timeout does not limit the whole call:
    it starts again for each address of the server, and does not cover the lookup of its name.
    """
    import huggingface_hub as hub

    api = hub.HfApi()  # outside of the thread: its import must not count against the limit
    answer: Future[set[str]] = Future()

    def ask() -> None:
        try:
            info = api.model_info(repo_id, revision=revision, timeout=LIST_TIMEOUT_S)
            answer.set_result({sibling.rfilename for sibling in info.siblings})
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # a daemon does not keep the process alive
    try:
        return answer.result(LIST_TIMEOUT_S)
    except TimeoutError:
        raise TimeoutError(f"no answer in {LIST_TIMEOUT_S:.0f} seconds") from None
    except hub.errors.HfHubHTTPError.__bases__:  # refused or unreachable: `explain` says why
        raise
    except Exception as error:  # a login page instead of JSON, or a malformed URL: any error at all
        problem = f"{hub.constants.ENDPOINT} does not answer as a hub does ({first_line(error)})"
        raise ValueError(f"{problem}: is HF_ENDPOINT right, or is a proxy in between?") from error


def explain(error: Exception, repo_id: str, revision: str, cache: str | Path) -> str:
    """Turn the library's error into one sentence that says what the user can do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # its cause is the reason
        error = error.__cause__ or error
    endpoint, log_in = constants.ENDPOINT, "log in with `hf auth login`"
    nowhere = f"{repo_id}@{revision} is no folder here, nor whole in the cache {cache}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = (
        f"{log_in}, or renew the token in HF_TOKEN" if status in (401, 403) else "try again later"
    )
    sentences = {  # the first class that fits: some are subclasses of later ones
        errors.OfflineModeIsEnabled: f"{nowhere}, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is "
        "set: unset it and connect once, or give a folder",
        errors.GatedRepoError: f"{repo_id} is given only to users who accepted its terms: accept "
        f"them at {endpoint}/{repo_id}, then {log_in}",
        errors.RepositoryNotFoundError: f"{nowhere}, and {endpoint} has no such repository (or it "
        f"is private: {log_in})",
        errors.RevisionNotFoundError: f"{repo_id} has no branch, tag or commit {revision!r}: look "
        f"for it at {endpoint}",
        errors.HfHubHTTPError: f"{endpoint} answered status {status} for {repo_id}: {again}",
    }
    for kind, sentence in sentences.items():
        if isinstance(error, kind):
            return sentence
    if isinstance(error, OSError) and error.errno is not None:  # from the file system: disk full
        advice = "make room there, or name another place in HF_HUB_CACHE"
        return f"{repo_id} cannot be kept in the cache {cache} ({first_line(error)}): {advice}"
    advice = "connect and start again (files that arrived whole are kept), or give a folder"
    return f"{nowhere}, and {endpoint} did not deliver it ({first_line(error)}): {advice}"


def first_line(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
