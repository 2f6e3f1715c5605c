"""A name becomes a folder: a local one stays what it is, a hub id is found in the cache or fetched.

`gpt2` is four letters, and the model behind them 548 MB in one file; its repository holds the same
weights again for TensorFlow, Flax, Rust and ONNX. What we need is the config, the tokenizer and one
set of weights, all of one commit, fetched once. And without a network we need one sentence at once:
the library, asked for a file, tries again after 1, 2, 4, 8 and 8 seconds before it gives up.

    name ──> a folder or a file here? ───────────── yes ──> that path, and nothing else is asked
              no │
             whole in the cache? ────────────────── yes ──> its snapshot, and no request is sent
              no │
             the hub: which files are there? ── no answer ──> one sentence, in 3 s at most
                 │
             config, tokenizer, then the best set of weights ──> the snapshot of that commit

The cache, its variables (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), progress
bars and retries are huggingface_hub's own. What is cached is not compared with the hub: `gpt2`
stays the commit that came first, `gpt2@COMMIT` asks for another. What a production engine does
beyond this: quantised variants, object stores, weights streamed from the network into the GPU.

Layout of the cache: huggingface.co/docs/huggingface_hub/guides/manage-cache
Run: python -m checkpoints.hub
Try: let `is_whole` look for the index alone, and see which line of the demo lies; or set
HF_HUB_OFFLINE=1 and ask find_folder for "gpt2".
"""

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

from checkpoints.weight_files import WEIGHT_FILES, read_index

# The names that everybody writes, and the repositories that the hub sends them to.
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
CONFIG = "config.json"
TOKENIZER = (  # what there is of them: a repository has the first two, or the third, or all
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The first that exists is taken, the others hold the same numbers: safetensors come first, since a
# .bin is a pickle, a program. An index names the files (shards) that the weights are spread over.
WEIGHTS = WEIGHT_FILES[:-1]  # the first that exists is taken; nanoGPT's ckpt.pt is on no hub
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".json")
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")  # as git names branches; `..` leads out of the cache
LIST_TIMEOUT_S = 3.0  # whoever has no network waits so long; a hub that is there takes a tenth


def find_folder(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder (or file) on this machine that `name` means, fetched if it has to be.

    `name` is a local path, one of ALIASES, or `org/name`; the last two may end in `@revision`, a
    branch, tag or commit. `cache_dir` is the library's own cache unless given. Raises ValueError,
    one sentence, when there is nothing to return; whole files stay cached for the next call.
    """
    if os.path.exists(name):
        return Path(name)
    repo_id, revision = parse_name(str(name))
    hub = import_hub(name)
    try:
        found = find_in_cache(repo_id, revision, cache_dir)
        return found or download(repo_id, revision, cache_dir)
    except hub.errors.HFValidationError as error:  # spaces, 97 characters, a dash at the end
        raise ValueError(f"{str(name)!r} is no folder here and no hub id: {error}") from None
    # What goes wrong on the way is an OSError or an error of the HTTP client, httpx or httpx2
    # according to the version: HfHubHTTPError inherits from both, so its parents are the two. And
    # hf_xet, through which the library fetches weights where it is installed, says RuntimeError.
    except (*hub.errors.HfHubHTTPError.__bases__, RuntimeError) as error:
        cache = cache_dir or hub.constants.HF_HUB_CACHE
        raise ValueError(explain(error, repo_id, revision, cache)) from error


def parse_name(name: str) -> tuple[str, str]:
    """A name that is no local path to (repository, revision); no network is asked.

    Example: "gpt2" -> ("openai-community/gpt2", "main"), "me/tales@v2" -> ("me/tales", "v2").
    """
    repo_id, at, revision = name.partition("@")
    # With one slash it may be either, `assets/tiny` or `org/name`: then the hub has to say.
    is_path = name.startswith((".", "/", "~")) or "\\" in name or repo_id.count("/") > 1
    if is_path or repo_id.endswith(("/", *FILE_ENDINGS)):
        raise ValueError(f"no folder or file {name!r}: correct the path, or give an id, org/name")
    repo_id = ALIASES.get(repo_id, repo_id)
    if "/" not in repo_id:
        ids = ", ".join(ALIASES)
        what = f"give a folder, a hub id (org/name, {ids}) or random:gpt2"
        raise ValueError(f"{name!r} is no folder here and no hub id: {what}")
    if at and not REVISION.fullmatch(revision):
        raise ValueError(f"{name!r}: {revision!r} is not the name of a branch, a tag or a commit")
    return repo_id, revision or "main"


def import_hub(name: str | Path) -> ModuleType:
    """huggingface_hub, imported only by who needs it: a local folder works without the package."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        how = "install huggingface_hub to look for it on the hub, or give a folder"
        raise ValueError(f"{str(name)!r} is no folder here: {how} ({error})") from None
    return huggingface_hub


# ---- in the cache --------------------------------------------------------------------------------
def find_in_cache(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path | None:
    """The cached snapshot of a revision if it is whole, else None. Never sends a request.

    What others fetched counts too: transformers uses the same cache, and years ago `gpt2` was
    kept under this short name.
    """
    hub = import_hub(repo_id)
    short_names = [short for short, full in ALIASES.items() if full == repo_id]
    for known_as in (repo_id, *short_names):
        config = hub.try_to_load_from_cache(known_as, CONFIG, cache_dir, revision)
        if isinstance(config, str) and is_whole(Path(config).parent):  # else None, or a marker
            return Path(config).parent
    return None


def is_whole(folder: Path) -> bool:
    """Does a snapshot hold a config and all files of its best set of weights?

    A file that is still on its way has another name, so each file that is there is whole.
    """
    weights = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if weights is None:
        return False
    try:
        needed = (CONFIG, weights, *shard_names(folder / weights))
        return all((folder / name).is_file() for name in needed)  # a link may lead nowhere
    except ValueError:  # an index that cannot be read: the hub may have a better one by now
        return False


def shard_names(weights: Path) -> list[str]:
    """The files that an index names, each once, sorted; none for a file that is no index.

    An index was written by a stranger, and what it names will be opened: `../x` is refused.
    """
    is_index = weights.name.endswith(".index.json")
    return sorted(file.name for file in read_index(weights)) if is_index else []


# ---- from the hub --------------------------------------------------------------------------------
def download(repo_id: str, revision: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch what the cache lacks of config, tokenizer and the best set of weights: their snapshot.

    Raises ValueError when the repository lacks a config or weights. The library's own errors pass
    through (see `explain`); within a file it resumes a connection that broke off.
    """
    hub = import_hub(repo_id)
    there = list_files(repo_id, revision)
    weights = next((name for name in WEIGHTS if name in there), None)
    if CONFIG not in there or weights is None:
        lacks = CONFIG if CONFIG not in there else f"weights, that is one of {', '.join(WEIGHTS)}"
        raise ValueError(f"the repository {repo_id} has no {lacks}: it is no model that runs here")

    def fetch(file: str, revision: str) -> Path:
        return Path(hub.hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir))

    # The config's snapshot is named after a commit, and all other files are asked of that commit:
    # somebody may be pushing a new one at this moment. Asked of a branch, the library also notes
    # which commit the branch meant, or the next call would not find it.
    folder = fetch(CONFIG, revision).parent
    # The weights come last, so that a snapshot that has them whole has all the rest.
    for file in (*(name for name in TOKENIZER if name in there), weights):
        fetch(file, folder.name)
    shards = shard_names(folder / weights)  # none of weights in one file
    absent = [shard for shard in shards if shard not in there]
    if absent:  # said now, not after the gigabytes of the others
        raise ValueError(f"{weights} of {repo_id} names {absent[0]!r}, which is not there")
    for shard in shards:
        fetch(shard, folder.name)
    assert is_whole(folder), f"{folder} lacks files that have just been fetched"
    return folder


def list_files(repo_id: str, revision: str) -> set[str]:
    """All file names of a repository; the one request that tells whether there is a hub at all."""
    hub = import_hub(repo_id)
    api = hub.HfApi()  # here, since its import takes time that is not the hub's

    def ask() -> set[str]:
        info = api.model_info(repo_id, revision=revision, timeout=LIST_TIMEOUT_S)
        return {sibling.rfilename for sibling in info.siblings}

    try:
        return within(LIST_TIMEOUT_S, ask)
    except hub.errors.HfHubHTTPError.__bases__:  # a refusal, or nobody there: see `explain`
        raise
    except Exception as error:  # what a hotel's login page is to a parser, a bad URL to a client
        what = f"{hub.constants.ENDPOINT} does not answer as a hub does ({first_line(error)})"
        raise ValueError(f"{what}: is HF_ENDPOINT right, or is a proxy in between?") from error


def within(seconds: float, function: Callable[[], set[str]]) -> set[str]:
    """What `function` returns or raises, but TimeoutError if that takes longer.

    A timeout of the HTTP client does not bound the whole: behind a firewall that swallows packets
    it counts anew for each of the server's addresses, and a search for their name knows none.
    """
    future: Future[set[str]] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: the process may end before it
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds") from None


def explain(error: Exception, repo_id: str, revision: str, cache: str | Path) -> str:
    """What the library raised, as one sentence that says what to do."""
    hub = import_hub(repo_id)
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError):  # "nor cached": what came before says why
        error = error.__cause__ or error
    nowhere = f"{repo_id}@{revision} is no folder here, nor whole in the cache {cache}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        how = "unset it and connect once, or give a folder"
        return f"{nowhere}, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: {how}"
    if isinstance(error, errors.GatedRepoError):  # before the next, of which it is a special case
        how = f"accept its terms at {endpoint}/{repo_id}, then log in with `hf auth login`"
        return f"{repo_id} is given only to who asked for it: {how}"
    if isinstance(error, errors.RepositoryNotFoundError):  # 404, or 401: who it is for is secret
        why = "no such repository (or it is private: log in with `hf auth login`)"
        return f"{nowhere}, and {endpoint} has {why}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision!r}: look for it at {endpoint}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            how = "log in with `hf auth login`, or renew the token in HF_TOKEN"
            return f"{endpoint} refuses {repo_id} with status {status}: {how}"
        return f"{endpoint} answered status {status} for {repo_id}: try again later"
    if isinstance(error, OSError) and error.errno is not None:  # it has a number from the system
        how = "make room there, or name another place in HF_HUB_CACHE"
        return f"{repo_id} cannot be kept in the cache {cache} ({first_line(error)}): {how}"
    how = "connect and start again (files that arrived whole are kept), or give a folder"
    return f"{nowhere}, and {endpoint} did not deliver it ({first_line(error)}): {how}"


def first_line(error: Exception) -> str:
    """What kind of error it is, and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --------------------------------------------------------------------------------------------------
def demo():
    """A cache written by hand, in the library's layout, and what is found in it without a hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"wte.weight": shards[0], "wpe.weight": shards[1]}}
    files = {CONFIG: "{}", WEIGHTS[1]: json.dumps(index), shards[0]: "", shards[1]: ""}
    with tempfile.TemporaryDirectory() as name:

        def show(text: object) -> str:
            return str(text).replace(name, "CACHE").replace(commit, commit[:7] + "...")

        repo = Path(name) / "models--me--tales"
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)  # the branch is a file that holds its commit
        found = []
        print(f"in {show(folder)}:")
        for file, text in files.items():
            (folder / file).write_text(text)
            found.append(find_in_cache("me/tales", "main", name) is not None)
            print(f"  after {file:34} {'whole' if found[-1] else 'not whole'}")
        assert found == [False, False, False, True]

        print()
        for asked, answer in {"me/tales": folder, f"me/tales@{commit}": folder, name: name}.items():
            assert find_folder(asked, name) == Path(answer)
            print(f"{show(asked):20} -> {show(answer)}")
        print()
        for asked in ("gpt3", "./gpt2", "me/tales@../../x"):
            try:
                find_folder(asked, name)
                refusal = ""
            except ValueError as error:
                refusal = str(error)
            print(refusal)
            assert repr(asked) in refusal
    print("ok: what was whole was found without a request, each other name got one sentence")


if __name__ == "__main__":
    demo()
